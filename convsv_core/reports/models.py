"""Model objects of the frameworks that plugins know, to the report of `convsv spectrum`."""

from __future__ import annotations

import dataclasses

from convsv_core.layers import Layer
from convsv_core.plugins import backend_of, get_backend, plugins
from convsv_core.reports.analyze import LayerReport, analyse


def analyze(
    model: object,
    example_input: object = None,
    *,
    backend: str = "numpy",
    dtype: str | None = None,
    device: str | None = None,
) -> list[LayerReport]:
    """Report the singular values of every convolution of a model object, as `convsv spectrum` does for a file.

    Parameters
    ----------
    model : object
        Of a framework that an installed plugin knows, such as a `torch.nn.Module`.
    example_input : object, optional
        What the model is called with, from which the extents of each layer's input follow; the adapter of the
        framework says in which form. Without it, layers whose extents are open are reported without figures.
    backend : str, default "numpy"
        Name of the library to compute with. Kernels are copied to it through the host.
    dtype, device : str, optional
        As for `convsv_core.reports.analyze.analyse`.

    Returns
    -------
    list of LayerReport
        One a convolution, in the order of the model; a figure that could not be had is None, and the note says
        why.

    Raises
    ------
    TypeError
        `model` is of no framework that an installed plugin knows.
    ValueError
        There is no such backend.

    Notes
    -----
    Neither traceable nor differentiable. The operator reported is the circular one at each layer's extents, whatever
    padding the layer has: Sedghi, Gupta and Long, *The Singular Values of Convolutional Layers*, ICLR 2019.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU())
    >>> (report,) = analyze(model, torch.zeros(1, 3, 16, 16))
    >>> report.name, report.kernel_shape, report.input_shape
    ('0', (8, 3, 3, 3), (16, 16))
    """
    computing = get_backend(backend)
    layers = plugins().manager.hook.convsv_model_layers(model=model, example_input=example_input)
    if layers is None:
        known = [name for name, _ in plugins().manager.list_name_plugin() if name.startswith("convsv.models:")]
        names = ", ".join(sorted(name.partition(":")[2] for name in known)) or "none is installed"
        raise TypeError(
            f"model is a {type(model).__module__}.{type(model).__qualname__}: wanted a model of a framework that a "
            f"plugin knows ({names})"
        )
    return list(analyse(map(_on_host, layers), computing, dtype=dtype, device=device))


def _on_host(layer: Layer) -> Layer:
    if layer.kernel is None:
        return layer
    return dataclasses.replace(layer, kernel=backend_of(layer.kernel).to_numpy(layer.kernel))
