"""The plugins that find the convolutions of model objects, one for each framework.

None of them imports its framework: an object can be of a framework only if that is imported already.
"""

from __future__ import annotations

import importlib
import operator
import sys

from convsv_core.layers import Layer
from convsv_core.plugins import hookimpl

__all__ = ["equinox", "flax", "keras", "torch"]


class ModelPlugin:
    """Plugin that hands the models of one framework to its adapter.

    Parameters
    ----------
    adapter : str
        Module of the adapter, whose function `model_layers` finds the convolutions.
    classes : mapping from str to str
        The attribute that is the class of the framework's models, by the module that has it.
    tryfirst : bool, default False
        Whether to ask this plugin before the others.
    """

    def __init__(self, adapter: str, classes: dict[str, str], *, tryfirst: bool = False) -> None:
        @hookimpl(tryfirst=tryfirst)
        def convsv_model_layers(model: object, example_input: object, linear: bool) -> list[Layer] | None:
            """Find every layer of a model of the framework, or return None: see the adapter's `conv_layers`."""
            kinds = [
                operator.attrgetter(path)(sys.modules[module])
                for module, path in classes.items()
                if module in sys.modules
            ]
            if not isinstance(model, tuple(kinds)):
                return None
            return importlib.import_module(adapter).model_layers(model, example_input, linear)

        self.convsv_model_layers = convsv_model_layers


torch = ModelPlugin("convsv_adapters.torch._reported", {"torch": "nn.Module"})
flax = ModelPlugin("convsv_adapters.flax", {"flax.nnx": "Module", "flax.linen": "Module"})
equinox = ModelPlugin("convsv_adapters.equinox", {"equinox": "Module"})
# With its backend torch, a layer of Keras is a torch.nn.Module too.
keras = ModelPlugin("convsv_adapters.keras._layers", {"keras": "layers.Layer"}, tryfirst=True)
