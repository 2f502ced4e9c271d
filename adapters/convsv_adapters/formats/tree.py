"""The tree that a checkpoint is: its networks, and the parts that are none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from convsv_core.layers import LeftOut

__all__ = ["Tree", "find_networks"]

OPTIMIZER = re.compile(r"(?i:optimi[sz]er|lr_sched|scheduler|grad_scaler)|(^|[^a-z])opt(im)?s?($|[^a-z])")
"""Keys under which training scripts keep the state of an optimizer. The list is a guess."""

MOMENTS = {
    "exp_avg",
    "exp_avg_sq",
    "exp_inf",
    "max_exp_avg_sq",
    "momentum_buffer",
    "square_avg",
    "grad_avg",
    "acc_delta",
    "sum",
    "prev",
    "step_size",
    "mu",
    "nu",
}
"""The names under which the optimizers of PyTorch keep an array for each parameter, from their documentation."""

LEAVES = {"weight", "bias", "kernel", "scale", "mean", "var", "embedding", "running_mean", "running_var"}
"""The names of a layer's own arrays, by which a mapping is one layer of a network that is stored as nested mappings."""

OPTIMIZER_STATE = "the state of an optimizer"
BESIDE_NETWORKS = "tensors beside the networks of the file"
SAME_ARRAYS = "the arrays of {}"


class Tree(NamedTuple):
    """The networks of a checkpoint, by path, with their arrays by name; and the parts that were left out."""

    networks: dict[str, dict[str, Any]]
    left_out: list[LeftOut]


class _Part(NamedTuple):
    """A mapping of the tree that holds arrays: its path, its arrays, and whether it holds networks too."""

    path: str
    arrays: dict[str, Any]
    holds_networks: bool


def find_networks(content: object, is_array: Callable[[object], bool], identity: Callable[[Any], object]) -> Tree:
    """Return the networks of a checkpoint.

    A network is a mapping of names to arrays. The arrays of an optimizer are none, nor are arrays in a mapping that
    also holds networks, such as metrics. A network whose arrays are all those of another network is left out.

    Parameters
    ----------
    content : object
        Mappings and sequences of anything.
    is_array : callable
        Tells arrays from other objects. They have the attribute `ndim`.
    identity : callable
        Returns the memory of an array, in a form that can be compared and hashed.
    """
    tree = Tree({}, [])
    parts = list(_walk(content, "", is_array, tree.left_out))
    owners: dict[frozenset[object], str] = {}
    for part in parts:
        large = [array for array in part.arrays.values() if array.ndim > 2]
        if part.holds_networks and _parts_below(part, parts):
            if large:
                tree.left_out.append(LeftOut(part.path, BESIDE_NETWORKS))
            continue
        memory = frozenset(map(identity, large))
        owner = next((path for known, path in owners.items() if memory and memory <= known), None)
        if owner is not None:
            tree.left_out.append(LeftOut(part.path, SAME_ARRAYS.format(owner)))
            continue
        owners.setdefault(memory, part.path)
        tree.networks[part.path] = part.arrays
    return tree


def _parts_below(part: _Part, parts: list[_Part]) -> bool:
    """Return whether another part with arrays lies below a part."""
    start = f"{part.path}/" if part.path else ""
    return any(other is not part and other.path.startswith(start) and len(other.arrays) > 0 for other in parts)


def _walk(content: object, path: str, is_array: Callable[[object], bool], left_out: list[LeftOut]) -> Iterator[_Part]:
    """Yield every mapping that holds arrays, in the order of the file, and note the states of optimizers."""
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if not isinstance(content, Mapping):
        return
    if _is_optimizer(content, path, is_array):
        if _holds_arrays(content, is_array):
            left_out.append(LeftOut(path, OPTIMIZER_STATE))
        return
    nested = _nested_layers(content, "", is_array) if len(content) > 1 else None
    if nested is not None:
        yield _Part(path, nested, False)
        return
    arrays = {str(key): value for key, value in content.items() if is_array(value)}
    inner = {key: value for key, value in content.items() if not is_array(value)}
    if arrays:
        yield _Part(path, arrays, bool(inner))
    for key, value in inner.items():
        yield from _walk(value, f"{path}/{key}" if path else str(key), is_array, left_out)


def _is_optimizer(content: Mapping[Any, Any], path: str, is_array: Callable[[object], bool]) -> bool:
    if "param_groups" in content and "state" in content:
        return True
    if OPTIMIZER.search(path.rpartition("/")[2]) and not any(is_array(value) for value in content.values()):
        return True
    names = {key for key, value in content.items() if is_array(value)}
    return bool(names) and names <= MOMENTS | {"step"}


def _holds_arrays(content: object, is_array: Callable[[object], bool]) -> bool:
    if is_array(content):
        return True
    if isinstance(content, Mapping):
        content = list(content.values())
    return isinstance(content, list | tuple) and any(_holds_arrays(value, is_array) for value in content)


def _nested_layers(
    content: Mapping[Any, Any], prefix: str, is_array: Callable[[object], bool]
) -> dict[str, Any] | None:
    """Return the arrays of a network whose layers are mappings of their own; None for any other mapping.

    Two mappings side by side with the names of a layer's arrays are two layers, and not two networks.
    """
    found: dict[str, Any] = {}
    layers = 0
    for key, value in content.items():
        if not isinstance(value, Mapping) or not value:
            return None
        names = {str(name) for name, inner in value.items() if is_array(inner)}
        if names and names == {str(name) for name in value} and names <= LEAVES:
            found |= {f"{prefix}{key}.{name}": array for name, array in value.items()}
            layers += 1
        else:
            below = _nested_layers(value, f"{prefix}{key}.", is_array)
            if below is None:
                return None
            found |= below
    return found if layers > 1 or (found and not layers) else None
