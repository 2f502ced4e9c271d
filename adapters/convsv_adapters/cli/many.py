"""`convsv spectrum` for many models at once, on a cluster of `dask.distributed`."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import click
from distributed import Client, LocalCluster

from convsv_adapters.cli.checkpoints import Checkpoint, find
from convsv_adapters.cli.many_options import LOCAL, ManyOptions
from convsv_adapters.cli.options import ModelOptions, Scale
from convsv_adapters.cli.output import import_for_option, one_line_errors, write_results
from convsv_adapters.cli.parquet import SpectraTable, TableError
from convsv_adapters.cli.progress import tracked
from convsv_adapters.cli.table import show_runs
from convsv_core import ModelReport, analyze_many
from convsv_core.plugins import one_line
from convsv_core.reports import Bounds

__all__ = ["ManyRequest"]

QUIET_WORKER = """
import logging, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
logging.getLogger("distributed.worker.state_machine").setLevel(logging.ERROR)
"""
"""The code that each worker of a local cluster runs first.

A terminal's interrupt reaches the workers too, but they are ended by this process, and should not end by themselves.
"""


class Failure(NamedTuple):
    """A model without figures."""

    model: str
    note: str


@dataclass(frozen=True)
class ManyRequest:
    """A call of `convsv spectrum` for many models.

    Attributes
    ----------
    models : sequence of str
        Names of files, and patterns that stand for files.
    many : ManyOptions
    options : ModelOptions
    bounds : "upper", "both" or "none"
    """

    models: Sequence[str]
    many: ManyOptions
    options: ModelOptions
    bounds: Bounds

    def run(self, json_path: Path | None, plot: Path | None, scale: Scale | None = None) -> None:
        """Compute the models that the table lacks, and print each layer's norms or the JSON.

        Exits with status 1 if a model has no figures.
        """
        out = self.many.out
        try:
            checkpoints = find(self.models, out.absolute().parent)
        except FileNotFoundError as error:
            raise click.BadParameter(str(error), param_hint="'[MODEL]...'") from None
        try:
            with one_line_errors(out), SpectraTable(out, self._recorded()) as table, _terminated_like_interrupted():
                missing = [checkpoint for checkpoint in checkpoints if not table.has(checkpoint)]
                if len(missing) < len(checkpoints):
                    known = len(checkpoints) - len(missing)
                    click.echo(f"{known} of {len(checkpoints)} models are in {out} already.", err=True)
                failures = self._compute(missing, len(checkpoints), table) if missing else []
                table.flush()
                self._publish(table, len(checkpoints), len(missing), failures, json_path, plot, scale)
        except TableError as error:
            raise click.BadParameter(str(error), param_hint="--out") from None
        if failures:
            raise click.exceptions.Exit(1)

    def _recorded(self) -> dict[str, Any]:
        """Return the options on which the figures depend. The table keeps them."""
        reading = self.options.read_options
        shapes = {name: list(shape) for name, shape in sorted(reading.input_shapes.items())}
        layers = {pattern: repr(geometry) for pattern, geometry in reading.layers.items()}
        return {
            "--backend": self.options.backend_name,
            "--bounds": self.bounds,
            "--dtype": self.options.dtype,
            "--input-shape": shapes,
            "--layout": reading.layout,
            **({"--network": reading.network} if reading.network is not None else {}),
            **({"--layer": layers} if layers else {}),
        }

    def _compute(self, missing: Sequence[Checkpoint], total: int, table: SpectraTable) -> list[Failure]:
        """Add the missing models to the table, and return the models that have no figures."""
        failures = []
        table.forget(missing)
        with _connected(self.many) as client:
            click.echo(f"dashboard: {client.dashboard_link}", err=True)
            if not client.nthreads():
                click.echo(f"the scheduler at {self.many.scheduler} has no workers yet: waiting for some", err=True)
            reports = analyze_many(
                [checkpoint.path for checkpoint in missing],
                client,
                options=self.options.read_options,
                backend=self.options.backend_name,
                bounds=self.bounds,
                dtype=self.options.dtype,
                device=self.options.device,
            )
            with contextlib.closing(_in_words(reports)) as arriving:
                bar = tracked(arriving, total, done=total - len(missing))
                for checkpoint, report in zip(missing, bar, strict=True):
                    table.add(checkpoint, report)
                    if all(layer.norm is None for layer in report.layers):
                        reason = report.note or "no layer has figures; their notes in the table say why"
                        failures.append(Failure(checkpoint.model, reason))
        return failures

    def _publish(
        self,
        table: SpectraTable,
        models: int,
        missing: int,
        failures: Sequence[Failure],
        json_path: Path | None,
        plot: Path | None,
        scale: Scale | None,
    ) -> None:
        """Write the JSON and the figure, print the table or the JSON, and name the models without figures."""
        out, backend = self.many.out, self.options.backend_name
        document = {
            "table": str(out),
            "backend": backend,
            "models": models,
            "computed": missing - len(failures),
            "failed": [failure._asdict() for failure in failures],
        }
        files = {}
        if plot is not None:
            plots = import_for_option("plot", "--plot", "cli")
            files[plot] = lambda: plots.draw_norms(table.norms(), out.name, plot.suffix[1:].lower(), scale)
        write_results(document, json_path, lambda: show_runs(table.norms(), f"{out}, with {backend}"), files)
        for failure in failures:
            click.echo(f"{failure.model} has no figures: {failure.note}", err=True)


def _in_words(reports: Iterator[ModelReport]) -> Generator[ModelReport]:
    """Yield the reports, and report on one line an error that keeps the cluster from computing more of them."""
    try:
        yield from reports
    except ConnectionError as error:
        raise click.ClickException(f"{error}; call again for what is missing") from None
    except Exception as error:  # the error was raised on a worker, and may be of any kind
        raise click.ClickException(f"a worker cannot compute: {type(error).__name__}: {one_line(error)}") from error


@contextlib.contextmanager
def _connected(options: ManyOptions) -> Iterator[Client]:
    """Yield a client of the scheduler's cluster, or of a local cluster that ends with the block."""
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # `_in_words` reports a lost scheduler
    if options.scheduler == LOCAL:
        cluster = LocalCluster(
            n_workers=options.workers, threads_per_worker=1, dashboard_address="127.0.0.1:0", preload=[QUIET_WORKER]
        )
        with cluster, Client(cluster) as client:
            yield client
        return
    try:
        client = Client(options.scheduler, timeout=options.connect_timeout)
    except OSError as error:
        raise click.ClickException(f"no scheduler answers at {options.scheduler}: {one_line(error)}") from None
    except ValueError as error:
        raise click.BadParameter(f"{options.scheduler}: {one_line(error)}", param_hint="--scheduler") from None
    with client:
        yield client


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Return a context manager in which SIGTERM raises an exception, so that the block cleans up.

    Batch systems send SIGTERM to a job whose time is up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
