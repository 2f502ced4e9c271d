"""Decide by the arrays beside an array whether it is a kernel, and whether it is the layer's weight."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from convsv_adapters.parameters.parts import HostArray
from convsv_core.layers import Geometry

__all__ = ["Companions", "bias_of", "doubt_about", "look_around", "owner_of", "shown_names"]

WRAPPERS = ("_orig_mod", "module")
"""Parts of names that `torch.compile`, `DataParallel` and wrappers of a layer add."""

CHANGES_THE_WEIGHT = re.compile(
    r"_(mask|orig|bar|u|v|g|sigma|scale|scales|scale_inv|zero_point|zeros|gain|multiplier|absmax|fake_quant|quant\w*)"
    r"([._].*)?$|\.(absmax|quant_map|quant_state)([._].*)?$"
)
"""The rest of the name of an array that changes the weight whose name comes before. The list is a guess."""

CHANGES_THE_LAYER = re.compile(
    r"(gain|mask|scale|scales|sigma|zero_point|u|v|g|u0|sv0|weight_scale|weight_u|weight_v|lora_\w+|modulation|"
    r"weight_quantizer|weight_fake_quant|alpha|w_scale|scale_weight|conv_offset)(\.|$)"
)
"""The rest of the name of an array in the layer of a weight, which is then not the whole of the layer. A guess."""

CHANGES_NOTHING = re.compile(
    r"(weight|kernel|w|bias|b|num_batches_tracked|_extra_state|running_(mean|var)|gamma|beta|"
    r"(norm|bn|batch_?norm|group_?norm|layer_?norm|act|activation|relu|prelu|drop|pool)[^./]*)([./].*)?"
)
"""The rest of the names of arrays in a layer that leave its weight as it is: layers that other projects put into the
class of a convolution, behind it. A guess.
"""

ADAPTERS = re.compile(r"(lora|ia3|hada|lokr|oft|boft|vera|dora)_\w")
"""The beginnings of the names by which PEFT and LyCORIS call what they add to a layer, from their documentation."""

SAYS_FOURIER = re.compile(r"spec|fourier|fno|weights?\d+$", re.IGNORECASE)
"""Words in the name of a complex array that say that it holds numbers at frequencies, not taps. A guess."""

WRAPPER = re.compile(r"(?<![^/])(WeightNorm|SpectralNorm)_\d+/")
"""The part of a path by which flax's linen calls a wrapper of a layer."""

COLLECTION = re.compile(r"^(params|batch_stats)/")
"""The names by which a path of flax's linen begins."""

SAYS_CONVOLUTION = re.compile(r"conv|cnn|(^|[._/])fir|tdnn", re.IGNORECASE)
"""Words in the name of an array of three axes that say that it is the kernel of a convolution. A guess."""

SAYS_OTHERWISE = re.compile(
    r"biaffine|(^|[._/])bil|expert|attention|attn|query|(^|[._/])(key|value|out)[._/]", re.IGNORECASE
)
"""Words in the name of an array of three axes that say that a bias of a convolution's form is none. A guess."""

WEIGHT = re.compile(r"(.*[./])?(weight|kernel|w)")
"""The name of a weight inside the layer that owns it."""


class Companions(NamedTuple):
    """Hold the facts that the companions of an array state.

    Attributes
    ----------
    is_kernel : bool
        False if the array is surely none, such as the scale of a normalisation.
    doubt : str
        Why the array may not be the weight of a convolution; "" if nothing speaks against it.
    layout : str or None
        "transposed" if the second axis is known to hold the outputs, "last" if the last axis does. "last transposed"
        if the taps come first, then the outputs, and the inputs are last.
    groups : int or None
        The groups, where they are told.
    source : str
        What tells the layout: "bias", "class", or "" if it is only assumed.
    fixed : bool
        Whether the layout and the groups are sure, so that a user can state no others.
    """

    is_kernel: bool = True
    doubt: str = ""
    layout: str | None = None
    groups: int | None = None
    source: str = "bias"
    fixed: bool = False

    def contradicts(self, wanted: Geometry) -> bool:
        """Return whether a user states another kind of layer than the one that is sure."""
        other_kind = wanted.transposed is (self.layout != "last transposed")
        return self.fixed and (other_kind or wanted.groups not in (None, self.groups))


def look_around(
    name: str, array: HostArray, named: Mapping[str, HostArray | str], fresh: bool, sure: bool
) -> Companions:
    """Return what the companions of an array of three to five axes say.

    Parameters
    ----------
    name, array
        The array that could be a kernel.
    named : mapping from str to array or str
        All arrays of the network.
    fresh : bool
        Whether the array was put together from parts, which says that it is a weight.
    sure : bool
        Whether the user says that it is a kernel.
    """
    bias = bias_of(name, named)
    if bias is not None and bias.shape == array.shape and not sure:
        return Companions(is_kernel=False)
    if doubt := doubt_about(name, array, named):
        return Companions(doubt=doubt)
    told = Companions()
    if bias is not None and bias.ndim == 1 and not sure:
        told = _told_by_bias(array.shape, bias.size)
    elif bias is not None and bias.ndim > 1 and not sure:
        if max(bias.shape) != bias.size or bias.shape[-1] != 1:
            return Companions(doubt=f"its bias has the shape {_by(bias.shape)}, which no convolution has")
        told = _told_by_bias(array.shape, bias.size)
    if not (sure or told.doubt) and (doubt := _doubt_about_kernel(name, array, bias, named)):
        return Companions(doubt=doubt)
    if array.ndim == 3 and not (sure or fresh or told.doubt) and not _says_convolution(name, array, told, bias, named):
        return Companions(
            doubt="its three axes may be those of a Conv1d kernel or of anything else, and nothing in the file says: "
            f"name it with --layer '{name}:stride=1' if it is one"
        )
    return told


def shown_names(names: Collection[str]) -> dict[str, str]:
    """Return the names to show, without the parts that wrappers add, unless two would be alike.

    Examples
    --------
    >>> shown_names(["module.conv.weight", "net._orig_mod.head.weight"])
    {'module.conv.weight': 'conv.weight', 'net._orig_mod.head.weight': 'net.head.weight'}
    """
    short = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names}
    counts: dict[str, int] = {}
    for shown in short.values():
        counts[shown] = counts.get(shown, 0) + 1
    return {name: shown if shown and counts[shown] == 1 else name for name, shown in short.items()}


def owner_of(name: str) -> str | None:
    """Return the prefix of the layer that owns a weight; None if the name is not one of a layer's weight."""
    match = WEIGHT.fullmatch(name)
    return None if match is None else (match[1] or "")


def bias_of(name: str, named: Mapping[str, HostArray | str]) -> HostArray | None:
    """Return the bias beside a weight; None if there is none."""
    owner = owner_of(name)
    candidates = [f"{name}_bias", f"{name}.bias", f"{name}_b"]
    if owner is not None:
        candidates = [f"{owner}bias", f"{owner}b", *candidates]
    elif (stem := re.sub(r"(weight|kernel)(?=s?$)", "bias", name)) != name:
        candidates.append(stem)
    found = (named.get(candidate) for candidate in candidates)
    return next((bias for bias in found if isinstance(bias, np.ndarray)), None)


def doubt_about(name: str, array: HostArray, named: Mapping[str, HostArray | str]) -> str:
    """Return the reason why a stored array is not the weight of the layer; "" if nothing says so."""
    owner = owner_of(name)
    if match := re.fullmatch(r"(.*\bparametrizations\.[^.]+)\..+", name):
        return f"a part of {match[1]}, of which the file does not say how it makes the weight"
    if re.search(r"(^|[._])(weight|kernel|w)_(orig|bar|v|g|mask)$", name):
        return "a part of a weight, whose other parts are not in the file"
    for other in named:
        if other != name and other.startswith(name) and CHANGES_THE_WEIGHT.match(other[len(name) :]):
            return f"{other} changes this weight in a way that the file does not say"
        beside = owner is not None and (owner or name != "w") and other != name and other.startswith(owner)
        if beside and CHANGES_THE_LAYER.match(other[len(owner or "") :]):
            return f"{other} changes this weight in a way that the file does not say"
    if owner and _is_adapted(owner, named):
        return "a low-rank adaptation or a scale is added to this layer, with a factor that the file does not hold"
    if wrapper := _wrapper_in_flax(name, named):
        return f"{wrapper} is a part of a weight, and the file does not say how it makes the weight"
    return ""


def _is_adapted(owner: str, named: Collection[str]) -> bool:
    """Return whether the layer that wraps the owner of a weight holds an adaptation, which stands beside the owner."""
    outer, _, inner = owner.rstrip("./").rpartition(".")
    outer = f"{outer}." if outer else ""
    return not ADAPTERS.match(inner) and any(
        other.startswith(outer) and ADAPTERS.match(other[len(outer) :]) for other in named
    )


def _wrapper_in_flax(name: str, named: Collection[str]) -> str:
    """Return the array that a wrapper of flax's linen keeps for a weight, under a path of its own; "" if none."""
    bare = COLLECTION.sub("", name)
    for other in named:
        if "Norm_" in other and COLLECTION.sub("", WRAPPER.sub("", other)).rpartition("/")[0] == bare:
            return other
    return ""


def _doubt_about_kernel(
    name: str, array: HostArray, bias: HostArray | None, named: Mapping[str, HostArray | str]
) -> str:
    """Return the reason why an array may be no kernel of a plain convolution, which the user can deny."""
    if array.dtype.kind == "c" and (
        SAYS_FOURIER.search(name) or (bias is not None and array.ndim > 3 and bias.dtype.kind != "c")
    ):
        return "its complex numbers may stand at frequencies, as in a layer of a Fourier neural operator"
    owner = owner_of(name) or ""
    for other in named if owner else ():
        rest = other.removeprefix(owner) if other.startswith(owner) else ""
        if rest and not CHANGES_NOTHING.fullmatch(rest):
            return (
                f"{other} stands in the same layer, and may change its weight: name it with --layer "
                f"'{name}:stride=1' if it does not"
            )
    return ""


def _told_by_bias(shape: tuple[int, ...], outputs: int) -> Companions:
    """Return what a bias of one entry for each output says of the axes of a kernel."""
    if outputs == shape[0]:
        return Companions()
    if outputs == shape[1]:
        return Companions(layout="transposed")
    if outputs == shape[-1]:
        return Companions(layout="last")
    groups = outputs // shape[1] if shape[1] else 0
    if groups and outputs == groups * shape[1] and shape[0] % groups == 0:
        return Companions(layout="transposed", groups=groups)
    return Companions(doubt=f"its bias has {outputs} entries, as many as no axis of {_by(shape)} has")


def _says_convolution(
    name: str,
    array: HostArray,
    told: Companions,
    bias: HostArray | None,
    named: Mapping[str, HostArray | str],
) -> bool:
    """Return whether something says that an array of three axes is the kernel of a convolution."""
    if SAYS_CONVOLUTION.search(name):
        return True
    if SAYS_OTHERWISE.search(name):
        return False
    if bias is not None and bias.ndim == 1:  # a bias along the last axis may also be that of a dense layer with heads
        return told.layout != "last"
    if all(isinstance(other, np.ndarray) and other.ndim == 3 for other in named.values()):
        return True  # the file holds nothing else, so kernels are what it was made for
    names = list(named)
    after = names[names.index(name) + 1 : names.index(name) + 6]  # a batch normalisation next to it has five arrays
    sizes = {other.size for key in after if isinstance(other := named[key], np.ndarray) and "running_mean" in key}
    return array.shape[0] in sizes


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
