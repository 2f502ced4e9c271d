"""`convsv spectrum` for many models at once, on a cluster of `dask.distributed`."""

from __future__ import annotations

import contextlib
import json
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

from convsv_adapters import _table
from convsv_adapters._checkpoints import Checkpoint, find
from convsv_adapters._files import write_whole
from convsv_adapters._many_options import LOCAL, ManyOptions
from convsv_adapters._progress import tracked
from convsv_adapters._spectra import SpectraTable, TableError
from convsv_adapters.formats.errors import one_line
from convsv_core import ModelReport, analyze_many
from convsv_core.reports.tasks import TaskOptions

QUIET_WORKER = """
import logging, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
logging.getLogger("distributed.worker.state_machine").setLevel(logging.ERROR)
"""
"""Run by each worker of a local cluster: a terminal interrupts it too, but it is this process that ends it."""


class Failure(NamedTuple):
    """A model without figures."""

    model: str
    note: str


@dataclass(frozen=True)
class ManyRequest:
    """A call of `convsv spectrum` for many models, which are names of files and patterns."""

    models: Sequence[str]
    options: ManyOptions
    settings: TaskOptions

    def run(self, json_path: Path | None, plot: Path | None) -> None:
        """Compute what the table lacks, and print the course of each layer's norm, or the JSON.

        Leaves with status 1 if a model has no figures.
        """
        out = self.options.out
        try:
            checkpoints = find(self.models, out.absolute().parent)
        except FileNotFoundError as error:
            raise click.BadParameter(str(error), param_hint="'[MODEL]...'") from None
        try:
            with SpectraTable(out, self._recorded()) as table, _terminated_like_interrupted():
                missing = [checkpoint for checkpoint in checkpoints if not table.has(checkpoint)]
                if len(missing) < len(checkpoints):
                    known = len(checkpoints) - len(missing)
                    click.echo(f"{known} of {len(checkpoints)} models are in {out} already.", err=True)
                failures = self._compute(missing, len(checkpoints), table) if missing else []
                table.flush()
                self._publish(table, len(checkpoints), len(missing), failures, json_path, plot)
        except TableError as error:
            raise click.BadParameter(str(error), param_hint="--out") from None
        except OSError as error:
            raise click.ClickException(f"{error.filename or out}: {error.strerror or error}") from None
        if failures:
            raise click.exceptions.Exit(1)

    def _recorded(self) -> dict[str, Any]:
        """What the figures depend on besides the models, by the options that say it."""
        settings = self.settings
        shapes = {name: list(shape) for name, shape in sorted(settings.read.input_shapes.items())}
        return {
            "--backend": settings.backend,
            "--bounds": settings.bounds,
            "--dtype": settings.dtype,
            "--input-shape": shapes,
            "--layout": settings.read.layout,
        }

    def _compute(self, missing: Sequence[Checkpoint], total: int, table: SpectraTable) -> list[Failure]:
        """Add what is missing to the table, and return what could not be computed."""
        failures = []
        table.forget(missing)
        settings = self.settings
        with _connected(self.options) as client:
            click.echo(f"dashboard: {client.dashboard_link}", err=True)
            if not client.nthreads():
                click.echo(f"the scheduler at {self.options.scheduler} has no workers yet: waiting for some", err=True)
            reports = analyze_many(
                [checkpoint.path for checkpoint in missing],
                client,
                options=settings.read,
                backend=settings.backend,
                bounds=settings.bounds,
                dtype=settings.dtype,
                device=settings.device,
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
    ) -> None:
        out, backend = self.options.out, self.settings.backend
        document = json.dumps(
            {
                "table": str(out),
                "backend": backend,
                "models": models,
                "computed": missing - len(failures),
                "failed": [failure._asdict() for failure in failures],
            },
            indent=2,
        )
        to_stdout = json_path is not None and str(json_path) == "-"
        if json_path is not None and not to_stdout:
            write_whole(json_path, f"{document}\n".encode())
        if plot is not None:
            from convsv_adapters import _plot

            write_whole(plot, _plot.draw_norms(table.norms(), out.name, plot.suffix[1:].lower()))
        if to_stdout:
            click.echo(document)
        else:
            _table.show_runs(table.norms(), f"{out}, with {backend}")
        for failure in failures:
            click.echo(f"{failure.model} has no figures: {failure.note}", err=True)


def _in_words(reports: Iterator[ModelReport]) -> Generator[ModelReport]:
    """The reports; what keeps a cluster from computing any more of them is one line and status 1."""
    try:
        yield from reports
    except ConnectionError as error:
        raise click.ClickException(f"{error}; call again for what is missing") from None
    except Exception as error:  # of any kind: it was raised on a worker
        raise click.ClickException(f"a worker cannot compute: {type(error).__name__}: {one_line(error)}") from error


@contextlib.contextmanager
def _connected(options: ManyOptions) -> Iterator[Client]:
    """A client of a cluster that is there, or of one that is started here and ends with the block."""
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # a scheduler that goes is one line of ours
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
    """Have SIGTERM, which ends jobs whose time is up, leave the block by an exception, so that it cleans up."""
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
