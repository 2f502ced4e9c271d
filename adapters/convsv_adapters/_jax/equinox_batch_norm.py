"""The batch normalisations of equinox models, and the layers that they follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax

from convsv_adapters._jax.batch_norm import BatchNorm
from convsv_adapters._jax.following import Following, FollowingWatch
from convsv_adapters._jax.trees import named_leaves
from convsv_adapters._layers import call_arguments

__all__ = ["EquinoxNormalisations", "equinox_normalisations", "with_forward"]


class EquinoxNormalisations(NamedTuple):
    """The batch normalisations of a model by name, and what a call shows about the layers that they follow."""

    norms: dict[str, BatchNorm]
    following: Following


def with_forward(module: Any, forward: Callable[..., Any]) -> Any:
    """Return a copy of a module whose forward pass is a function of it and of the arguments."""
    own = type(module)
    copy: Any = object.__new__(type(own.__name__, (own,), {"__call__": forward}))
    for name, value in vars(module).items():
        object.__setattr__(copy, name, value)
    return copy


def equinox_normalisations(
    model: eqx.Module, example_input: object, kinds: tuple[type[Any], ...]
) -> EquinoxNormalisations:
    """Return the normalisations of a model, which follow layers of the classes `kinds`.

    Raises ValueError if the model has normalisations, and the `example_input` holds no `State`.
    """
    watch = FollowingWatch()
    positional, named = call_arguments(example_input)
    states = [one for one in (*positional, *named.values()) if isinstance(one, eqx.nn.State)]
    norms: dict[str, BatchNorm] = {}

    def marking(keys: Any, module: Any) -> Any:
        name = jax.tree_util.keystr(keys, simple=True, separator="/") or "."
        own = type(module)
        if isinstance(module, eqx.nn.BatchNorm):

            def taking(self: Any, x: jax.Array, state: Any, **kwargs: Any) -> Any:
                return own.__call__(self, watch.taken(name, x, 0), state, **kwargs)

            return with_forward(module, taking)
        if isinstance(module, kinds):

            def making(self: Any, x: jax.Array, **kwargs: Any) -> Any:
                return watch.made(name, own.__call__(self, x, **kwargs), 0)

            return with_forward(module, making)
        return module

    def is_marked(node: object) -> bool:
        return isinstance(node, (eqx.nn.BatchNorm, *kinds))

    def call(model: eqx.Module, *args: object, **kwargs: object) -> object:
        model = eqx.nn.inference_mode(model)
        return jax.tree_util.tree_map_with_path(marking, model, is_leaf=is_marked)(*args, **kwargs)

    for keys, node in jax.tree_util.tree_flatten_with_path(model, is_leaf=is_marked)[0]:
        if isinstance(node, eqx.nn.BatchNorm):
            name = jax.tree_util.keystr(keys, simple=True, separator="/") or "."
            if not states:
                raise ValueError(
                    f"batch_norm='fold' needs the running statistics of {name!r}: wanted an example_input that holds "
                    f"the model's equinox.nn.State, such as (image, state)"
                )
            norms[name] = _batch_norm(name, node, states[0])
    return EquinoxNormalisations(norms, watch.follow(call, model, example_input))


def _batch_norm(name: str, module: Any, state: eqx.nn.State) -> BatchNorm:
    # A state in which each leaf is its own place says where the leaves of an index are.
    leaves, structure = jax.tree.flatten(state)
    places = jax.tree.unflatten(structure, range(len(leaves)))
    paths = {leaf.place: path for path, leaf in named_leaves(state).items()}
    batch = module.mode == "batch"
    _, variance = places.get(module.batch_state_index if batch else module.ema_state_index)
    return BatchNorm(
        name,
        "" if module.weight is None else "weight" if name == "." else f"{name}/weight",
        paths[variance],
        (module.input_size,),
        float(module.eps),
        type(module).__module__.partition(".")[0] != "equinox",
        paths[places.get(module.batch_counter)] if batch else "",
        float(module.momentum) if batch else 0.0,
    )
