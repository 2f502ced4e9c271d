"""The batch normalisations of flax models, nnx and linen, and the layers that they follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
from flax import linen, nnx

from convsv_adapters._jax.batch_norm import BatchNorm
from convsv_adapters._jax.flax_kinds import Kinds
from convsv_adapters._jax.following import Following, FollowingWatch

__all__ = ["FlaxNormalisations", "flax_normalisations"]


class FlaxNormalisations(NamedTuple):
    """The batch normalisations of a model by name, and what a call shows about the layers that they follow."""

    norms: dict[str, BatchNorm]
    following: Following


def flax_normalisations(model: nnx.Module | linen.Module, example_input: object, kinds: Kinds) -> FlaxNormalisations:
    """Return the normalisations of a model, which follow layers of the classes `kinds`."""
    if isinstance(model, nnx.Module):
        return _nnx_normalisations(model, example_input, kinds)
    return _linen_normalisations(model, example_input, kinds)


def _nnx_normalisations(model: nnx.Module, example_input: object, kinds: Kinds) -> FlaxNormalisations:
    watch = FollowingWatch()
    graph, state = nnx.split(model)
    norms: dict[str, BatchNorm] = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.BatchNorm):
            name = "/".join(map(str, path)) or "."
            inner = list(map(str, path))
            scale = "" if node.scale is None else "/".join([*inner, "scale"])
            shape = tuple(node.var.shape)
            norms[name] = _batch_norm(name, node, scale, "/".join([*inner, "var"]), shape)

    def call(state: object, *args: object, **kwargs: object) -> object:
        copy = nnx.merge(graph, state)
        copy.eval()
        for path, node in list(nnx.iter_graph(copy)):
            name = "/".join(map(str, path)) or "."
            if isinstance(node, nnx.BatchNorm):
                _changed(node, _taking(watch, name, node))
            elif isinstance(node, kinds):
                _changed(node, _making(watch, name))
        return copy(*args, **kwargs)

    return FlaxNormalisations(norms, watch.follow(call, state, example_input))


Method: TypeAlias = Callable[..., Any]
"""A forward pass."""


def _changed(module: nnx.Module, change: Callable[[Method], Method]) -> None:
    """Give a copy of a user's module another forward pass, made from its own."""
    own = type(module)

    def forward(self: Any, *args: object, **kwargs: object) -> Any:
        return change(lambda *given, **named: own.__call__(self, *given, **named))(*args, **kwargs)

    object.__setattr__(module, "__class__", type(own.__name__, (own,), {"__call__": forward}))


def _making(watch: FollowingWatch, name: str) -> Callable[[Method], Method]:
    """Return what makes a forward pass mark its result, whose last axis is the channels."""
    return lambda forward: lambda *args, **kwargs: watch.made(name, forward(*args, **kwargs), -1)


def _taking(watch: FollowingWatch, name: str, module: Any) -> Callable[[Method], Method]:
    """Return what makes the forward pass of a normalisation mark its input."""
    axis = module.axis if isinstance(module.axis, int) else module.axis[0] if len(module.axis) == 1 else None

    def change(forward: Method) -> Method:
        def taking(*args: Any, **kwargs: Any) -> Any:
            image, *rest = args or (kwargs.pop("x"),)
            return forward(watch.taken(name, image, axis), *rest, **kwargs)

        return taking

    return change


def _linen_normalisations(model: linen.Module, example_input: object, kinds: Kinds) -> FlaxNormalisations:
    watch = FollowingWatch()
    norms: dict[str, BatchNorm] = {}
    unbound, variables = (model, None) if model.scope is None else model.unbind()

    def note(following: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module: Any = context.module
        is_norm = isinstance(module, linen.BatchNorm)
        if context.method_name != "__call__" or not (is_norm or isinstance(module, kinds)):
            return following(*args, **kwargs)
        name = "/".join(module.path) or "."
        if not is_norm:
            return _making(watch, name)(following)(*args, **kwargs)
        image = args[0] if args else kwargs["x"]
        axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
        shape = tuple(image.shape[axis] for axis in sorted(axis % image.ndim for axis in axes))
        scale = "/".join([*module.path, "scale"]) if module.use_scale else ""
        norms[name] = _batch_norm(name, module, scale, "/".join([*module.path, "var"]), shape)
        return _taking(watch, name, module)(following)(*args, **kwargs)

    def call(variables: Any, *args: object, **kwargs: object) -> object:
        with linen.intercept_methods(note):
            if variables is None:
                return unbound.init_with_output(jax.random.key(0), *args, **kwargs)[0]
            return unbound.apply(variables, *args, rngs={"params": jax.random.key(0)}, mutable=True, **kwargs)[0]

    following = watch.follow(call, variables, example_input)
    return FlaxNormalisations(norms, following)


def _batch_norm(name: str, module: Any, scale: str, variance: str, shape: tuple[int, ...]) -> BatchNorm:
    own = not type(module).__module__.startswith("flax.")
    return BatchNorm(name, scale, variance, shape, float(module.epsilon), own)
