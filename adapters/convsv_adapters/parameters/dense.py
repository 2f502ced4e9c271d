"""Decide by names whether an array is the matrix of a dense layer, and which normalisation follows a layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from convsv_adapters.parameters.companions import bias_of, doubt_about, owner_of
from convsv_adapters.parameters.parts import HostArray
from convsv_core.layers import Normalisation

__all__ = ["Matrix", "look_at_matrix", "normalisation_behind"]

SAYS_DENSE = re.compile(
    r"(^|[._/])(fc|lin|linear|dense|classifier|head|logits|mlp|proj|projection)s?_?\d*([._/]|$)|"
    r"_(fc|linear|dense|proj|head)\d*([._/]|$)",
    re.IGNORECASE,
)
"""Words in the name of a matrix that say that it is the weight of a dense layer. The list is a guess."""

SAYS_TABLE = re.compile(
    r"embed|(^|[._/])(emb|wte|wpe|shared)([._/]|$)|token|position|relative|codebook|lookup|lora_|norm"
)
"""Words in the name of an array of two axes that say that it is no matrix of a dense layer. The list is a guess."""

NUMBERED = re.compile(r"(?P<parent>.*[./])?(?P<index>\d+)\.(weight)")
"""The name of the weight of a module in a sequence, which PyTorch numbers."""


class Matrix(NamedTuple):
    """Hold what the companions of an array of two axes say.

    Attributes
    ----------
    layout : {"OI", "IO"}
        Whether the rows are outputs or inputs. The norm is the same.
    doubt : str
        Why the array may not be the matrix of the layer; "" if nothing speaks against it.
    """

    layout: str = "OI"
    doubt: str = ""


def look_at_matrix(name: str, array: HostArray, named: Mapping[str, HostArray | str]) -> Matrix | None:
    """Return what is known of an array of two axes; None unless something says that it is a dense layer's weight.

    It must have the name of a layer's weight. A bias with an entry for each row or each column says it, a normalisation
    behind it, or a word of `SAYS_DENSE`. A word of `SAYS_TABLE` says the contrary.
    """
    if owner_of(name) is None or SAYS_TABLE.search(name.lower()):
        return None
    bias = bias_of(name, named)
    if bias is not None and (bias.ndim != 1 or bias.size not in array.shape):
        return None
    if bias is None and not SAYS_DENSE.search(name) and normalisation_behind(name, array.shape[0], named) is None:
        return None
    if doubt := doubt_about(name, array, named):
        return Matrix(doubt=doubt)
    by_name = "IO" if name.endswith("kernel") else "OI"
    if bias is None or array.shape[0] == array.shape[1]:
        return Matrix(by_name)
    return Matrix("OI" if bias.size == array.shape[0] else "IO")


def normalisation_behind(name: str, outputs: int, named: Mapping[str, HostArray | str]) -> Normalisation | None:
    """Return the batch normalisation behind a layer in a sequence of PyTorch; None where it is not sure.

    It is taken to be sure where the layer is a numbered module without a bias, and the next number is a batch
    normalisation of as many channels: a sequence calls its modules in turn, and a bias would be of no use before the
    normalisation. Epsilon is not stored, and taken as 0, which makes no factor smaller.

    Parameters
    ----------
    name : str
        The name of the layer's weight.
    outputs : int
        The number of the layer's output channels.
    named : mapping from str to array or str
        All arrays of the network.
    """
    match = NUMBERED.fullmatch(name)
    if match is None or bias_of(name, named) is not None:
        return None
    behind = f"{match['parent'] or ''}{int(match['index']) + 1}."
    arrays = {key: named.get(f"{behind}{key}") for key in ("running_mean", "running_var", "weight", "bias")}
    if not all(isinstance(array, np.ndarray) and array.shape == (outputs,) for array in arrays.values()):
        return None
    return Normalisation.of_statistics(behind.removesuffix("."), arrays["weight"], arrays["running_var"])
