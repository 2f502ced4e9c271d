"""The options of `convsv spectrum` for many models, which need libraries that one model does not need."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from convsv_adapters.cli.options import add_options, number, output_file

__all__ = ["LOCAL", "ManyOptions", "many_options"]

LOCAL = "local"
"""The value of ``--scheduler`` that asks for a cluster on this machine."""


@dataclass(frozen=True)
class ManyOptions:
    """Where to compute many models, and where their table goes.

    Attributes
    ----------
    scheduler : str
        Address of a cluster's scheduler, or `LOCAL`.
    out : Path
        The folder of the table.
    workers : int or None
        Number of processes of a local cluster. One for each processor if None.
    connect_timeout : float
        Seconds to wait for the scheduler.
    """

    scheduler: str
    out: Path
    workers: int | None
    connect_timeout: float


def many_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an argument `many`, which is a `ManyOptions`, or None in a call for one model."""

    @functools.wraps(command)
    def gathered(
        *, scheduler: str | None, out: Path | None, workers: int | None, connect_timeout: float, **options: Any
    ) -> Any:
        if (scheduler is None) != (out is None):
            raise click.UsageError("--scheduler and --out go together: give both, or neither to look at one model")
        if scheduler is None or out is None:
            if workers is not None:
                raise click.UsageError("--workers is for many models, with --scheduler local and --out")
            return command(many=None, **options)
        if workers is not None and scheduler != LOCAL:
            raise click.UsageError(f"--workers is for --scheduler local: {scheduler} has workers of its own")
        return command(many=ManyOptions(scheduler, out, workers, connect_timeout), **options)

    return add_options(gathered, _OPTIONS)


_OPTIONS = (
    click.option(
        "--scheduler",
        metavar="ADDRESS",
        help="Many models: address of a dask.distributed cluster, as tcp://host:8786, or local for one here.",
    ),
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        callback=output_file(".parquet", folder=True),
        help="Many models: the table, as spectra.parquet. Models that are in it are not computed again.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        help="Many models: number of processes of --scheduler local.  [default: one for each processor]",
    ),
    click.option(
        "--connect-timeout",
        type=float,
        callback=number(zero=False),
        default=10.0,
        show_default=True,
        metavar="SECONDS",
        help="Many models: how long to wait for the scheduler.",
    ),
)
