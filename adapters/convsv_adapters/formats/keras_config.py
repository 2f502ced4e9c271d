"""The configuration that a Keras file holds: the layers of a model, and which normalisation follows which layer."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

__all__ = ["Configured", "configured_layers"]


class Configured(NamedTuple):
    """A layer of the configuration.

    Attributes
    ----------
    name : str
        Its name, behind the names of the models around it.
    kind : str
        Its class.
    config : mapping
    input_shape : tuple of (int or None), or None
        With the batch.
    keys : tuple of str
        Where its arrays are, by classes: the path in a `.keras` archive.
    is_keras : bool
        Whether its class is one of Keras's own.
    wrapper : str
        The class of the layer around it, "" if there is none.
    follower : str
        The name of the batch normalisation that acts on its output and on nothing else, "" if none surely does.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    input_shape: tuple[int | None, ...] | None
    keys: tuple[str, ...]
    is_keras: bool
    wrapper: str = ""
    follower: str = ""


def configured_layers(
    entry: Mapping[str, Any],
    prefix: str = "",
    keys: tuple[str, ...] = (),
    input_shape: Any = None,
    wrapper: str = "",
    follower: str = "",
) -> Iterator[Configured]:
    """Yield the layers of a configuration in the order of the model, the layers of nested models in their place."""
    kind, config = entry["class_name"], entry["config"]
    built = (
        (entry.get("build_config") or {}).get("input_shape")
        or _inbound_shape(entry)
        or config.get("batch_input_shape")
        or input_shape
    )
    shape = tuple(built) if isinstance(built, list | tuple) and not _is_nested(built) else None
    name = f"{prefix}{config.get('name') or kind}"
    if isinstance(config.get("layers"), list):
        counts: dict[str, int] = {}
        followers = _followers(kind, config)
        fed: Any = None  # the shape that the first layer of a sequence takes, which an input layer states
        for inner in config["layers"]:
            key = _snake_case(inner["class_name"])
            counts[key] = counts.get(key, -1) + 1
            place = f"{key}_{counts[key]}" if counts[key] else key
            below = "" if not keys else f"{name}/"
            behind = followers.get(inner["config"].get("name"), "")
            yield from configured_layers(
                inner, below, (*keys, "layers", place), fed, wrapper, behind and f"{below}{behind}"
            )
            is_input = kind == "Sequential" and inner["class_name"] == "InputLayer"
            fed = inner["config"].get("batch_shape", inner["config"].get("batch_input_shape")) if is_input else None
        return
    if isinstance(config.get("layer"), Mapping):  # a wrapper, such as TimeDistributed
        yield from configured_layers(config["layer"], f"{name}/", (*keys, "layer"), wrapper=kind)
        return
    is_keras = str(entry.get("module", "keras")).startswith("keras") and not entry.get("registered_name")
    yield Configured(name, kind, config, shape, keys, is_keras, wrapper, follower)


def _followers(kind: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the batch normalisation by the layer on whose output it acts, where nothing else takes that output.

    In a functional model that is told by the nodes: the layer and the normalisation have one node each, and no other
    node and no output of the model has the layer's name. A model of a class of its own may call its layers otherwise.
    """
    entries = {str(e["config"].get("name")): e for e in config["layers"] if e["class_name"] != "InputLayer"}
    norms = {name for name, entry in entries.items() if entry["class_name"] == "BatchNormalization"}
    if kind == "Sequential":
        return {layer: behind for layer, behind in itertools.pairwise(entries) if behind in norms}
    if kind not in ("Functional", "Model"):
        return {}
    sources = {name: list(_named_in(entry.get("inbound_nodes"))) for name, entry in entries.items()}
    used = [*itertools.chain(*sources.values()), *_named_in(config.get("output_layers"))]
    called_once = {name for name, entry in entries.items() if len(entry.get("inbound_nodes") or ()) == 1}
    pairs = {sources[norm][0]: norm for norm in norms & called_once if len(sources[norm]) == 1}
    return {source: norm for source, norm in pairs.items() if source in called_once and used.count(source) == 1}


def _named_in(value: Any) -> Iterator[str]:
    """Yield the layer of each tensor in a configuration, where a tensor is a list of a name and two numbers."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return
    if len(value) > 2 and isinstance(value[0], str) and all(isinstance(number, int) for number in value[1:3]):
        yield value[0]
        return
    for part in value:
        yield from _named_in(part)


def _inbound_shape(entry: Mapping[str, Any]) -> Any:
    """Return the shape of the one tensor that a layer takes in a functional model; None if it is not told once."""
    nodes = entry.get("inbound_nodes") or ()
    tensors = [node["args"] for node in nodes if isinstance(node, Mapping) and "args" in node]
    if len(tensors) != 1 or len(tensors[0]) != 1 or not isinstance(tensors[0][0], Mapping):
        return None
    return tensors[0][0].get("config", {}).get("shape")


def _is_nested(shape: Any) -> bool:
    return any(isinstance(part, list | tuple | dict) for part in shape)


def _snake_case(name: str) -> str:
    """Return the name under which a `.keras` archive keeps a layer of a class.

    Examples
    --------
    >>> _snake_case("DepthwiseConv2D"), _snake_case("Conv2DTranspose"), _snake_case("ConvLSTM2D")
    ('depthwise_conv2d', 'conv2d_transpose', 'conv_lstm2d')
    """
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
