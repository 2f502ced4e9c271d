"""The plugins that find the convolutions and the graphs of model objects, one for each framework.

None of them imports its framework: an object can be of a framework only if that is imported already.
"""

from __future__ import annotations

import importlib
import operator
import sys

from convsv_core.layers import Layer
from convsv_core.networks import Graph
from convsv_core.plugins import hookimpl

__all__ = ["equinox", "flax", "jax", "keras", "torch"]


class ModelPlugin:
    """Plugin that hands the models of one framework to its adapter.

    Parameters
    ----------
    adapter : str
        Module of the adapter, whose function `model_layers` finds the convolutions.
    front_end : str
        Module whose function `model_graph` returns the model as a graph of maps.
    classes : mapping from str to str
        The attribute that is the class of the framework's models, by the module that has it.
    tryfirst : bool, default False
        Whether to ask this plugin before the others.
    """

    def __init__(self, adapter: str, front_end: str, classes: dict[str, str], *, tryfirst: bool = False) -> None:
        def is_model(model: object) -> bool:
            kinds = [
                operator.attrgetter(path)(sys.modules[module])
                for module, path in classes.items()
                if module in sys.modules
            ]
            return isinstance(model, tuple(kinds))

        @hookimpl(tryfirst=tryfirst)
        def convsv_model_layers(model: object, example_input: object, linear: bool) -> list[Layer] | None:
            """Find every layer of a model of the framework, or return None: see the adapter's `conv_layers`."""
            if not is_model(model):
                return None
            return importlib.import_module(adapter).model_layers(model, example_input, linear)

        @hookimpl(tryfirst=tryfirst)
        def convsv_model_graph(model: object, example_input: object) -> Graph | None:
            """Return a model of the framework as a graph, or None: see `model_graph` of the front end."""
            return importlib.import_module(front_end).model_graph(model, example_input) if is_model(model) else None

        self.convsv_model_layers = convsv_model_layers
        self.convsv_model_graph = convsv_model_graph


class FunctionPlugin:
    """Plugin that hands functions of JAX arrays to the front end of JAX."""

    @hookimpl(trylast=True)
    def convsv_model_graph(self, model: object, example_input: object) -> Graph | None:
        """Return a function as a graph, or None unless JAX has been imported and an argument is an array of JAX."""
        jax = sys.modules.get("jax")
        if jax is None or not callable(model):
            return None
        leaves = jax.tree.leaves(example_input)
        if not any(isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) for leaf in leaves):
            return None
        return importlib.import_module("convsv_adapters._jax.graph").model_graph(model, example_input)


torch = ModelPlugin("convsv_adapters.torch._reported", "convsv_adapters.torch._graph", {"torch": "nn.Module"})
flax = ModelPlugin("convsv_adapters.flax", "convsv_adapters._jax.graph", {"flax.nnx": "Module", "flax.linen": "Module"})
equinox = ModelPlugin("convsv_adapters.equinox", "convsv_adapters._jax.graph", {"equinox": "Module"})
# With its backend torch, a layer of Keras is a torch.nn.Module too.
keras = ModelPlugin(
    "convsv_adapters.keras._layers", "convsv_adapters.keras._graph", {"keras": "layers.Layer"}, tryfirst=True
)
jax = FunctionPlugin()
