"""A call for one network: read it, compute reports of its layers, and publish them."""

from __future__ import annotations

import contextlib
import importlib.resources
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np

from convsv_adapters.cli.destination import Destination
from convsv_adapters.cli.options import ModelOptions
from convsv_adapters.cli.output import one_line_errors, write_results
from convsv_adapters.cli.progress import tracked
from convsv_adapters.cli.table import show
from convsv_core.backend import Backend
from convsv_core.layers import Layer, ModelError
from convsv_core.reports import ProjectionReport, Report, Row, View, read_model, write_model

__all__ = ["BUNDLED", "Request", "file_of", "label_of"]

BUNDLED = "digits.onnx"
"""The network that comes with convsv, in the package's folder `data`."""

R = TypeVar("R", bound=Row)


def label_of(model: Path | None) -> str:
    """Return a network's name in titles."""
    return model.name if model is not None else f"{BUNDLED} (comes with convsv)"


@contextlib.contextmanager
def file_of(model: Path | None) -> Iterator[Path]:
    """Return a context manager that gives the file of a network, which is `BUNDLED` if the model is None."""
    if model is not None:
        yield model
    else:
        bundled = importlib.resources.files("convsv_adapters") / "data" / BUNDLED
        with importlib.resources.as_file(bundled) as path:
            yield path


@dataclass(frozen=True)
class Request:
    """A network, and the backend to compute with.

    Attributes
    ----------
    model : Path or None
        The network's file, or None for `BUNDLED`.
    options : ModelOptions
    backend : Backend
    """

    model: Path | None
    options: ModelOptions
    backend: Backend

    @classmethod
    def of(cls, model: Path | None, options: ModelOptions) -> Request:
        """Make the request, with the backend checked before the model is read."""
        return cls(model, options, options.backend())

    @property
    def label(self) -> str:
        """The network's name in titles."""
        return label_of(self.model)

    @cached_property
    def layers(self) -> list[Layer]:
        """Every convolution of the network, read from its file. There is at least one.

        Parts of the file that are left out are named on stderr.
        """
        with one_line_errors(self.model), self._file() as path:
            layers = read_model(path, self.options.read_options)
        for part in layers.left_out:
            click.echo(f"{self.label}: left out {part.path or 'tensors at the top'}: {part.reason}", err=True)
        if not layers:
            raise click.ClickException(f"{self.label}: no convolution found")
        return layers

    def reports(self, compute: Callable[..., Iterator[R]], *arguments: Any, **options: Any) -> list[R]:
        """Compute a report of each layer, with a progress bar.

        `compute` takes the layers, the backend, these arguments and options, and `dtype` and `device`.
        """
        rows = compute(
            self.layers,
            self.backend,
            *arguments,
            dtype=self.options.dtype,
            device=self.options.device,
            **options,
        )
        return list(tracked(rows, len(self.layers)))

    def destination(self, output: Path, *, force: bool) -> Destination:
        """Return where the network is written to: see `Destination.of`."""
        with one_line_errors(self.model), self._file() as path:
            return Destination.of(path, output, force=force)

    def write(self, reports: Sequence[ProjectionReport], destination: Destination) -> None:
        """Write the network with the projected kernels, and read it again before it takes its place."""
        layers = self.layers
        kernels = {
            layer.stored.key: report.kernel
            for layer, report in zip(layers, reports, strict=True)
            if layer.stored is not None and report.kernel is not None
        }
        wanted = [kernels.get(layer.stored.key, layer.kernel) if layer.stored else layer.kernel for layer in layers]
        with one_line_errors(destination.targets[0]), self._file() as path, destination.replacing() as partial:
            write_model(path, kernels, partial)
            written = [layer.kernel for layer in read_model(partial, self.options.read_options)]
            for layer, kernel, found in zip(layers, wanted, written, strict=True):
                if not np.array_equal(np.asarray(kernel), np.asarray(found), equal_nan=kernel is not None):
                    raise ModelError(
                        f"{path}: {layer.name} would change with the weights of others: project these by --only"
                    )

    def report(self, rows: Iterable[R], view: View, about: Mapping[str, Any] | None = None) -> Report[R]:
        """Return the report of the network.

        `about` holds what the JSON says of the whole network besides the model and the backend.
        """
        model = str(self.model) if self.model is not None else BUNDLED
        facts = {"model": model, "backend": self.backend.name, **(about or {})}
        return Report(rows, view=view, title=f"{self.label}, with {self.backend.name}", about=facts)

    def publish(
        self,
        report: Report[Any],
        sort: str,
        json_path: Path | None,
        files: Mapping[Path, Callable[[], bytes]] | None = None,
    ) -> None:
        """Write the JSON or print the table, and write other files."""
        write_results(report.document(), json_path, lambda: show(report, sort), files)

    def _file(self) -> contextlib.AbstractContextManager[Path]:
        return file_of(self.model)
