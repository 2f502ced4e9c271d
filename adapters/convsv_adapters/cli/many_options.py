"""The options of `convsv spectrum` for many models; what they do needs libraries that one model does not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

LOCAL = "local"


@dataclass(frozen=True)
class ManyOptions:
    """Where to compute many models, and where their table goes.

    Attributes
    ----------
    scheduler : str
        Address of a cluster's scheduler, or `LOCAL`.
    out : Path
    workers : int or None
        Of a local cluster; one for each processor if not given.
    connect_timeout : float
        Seconds.
    """

    scheduler: str
    out: Path
    workers: int | None
    connect_timeout: float


def many_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an argument `many`: a `ManyOptions`, or None where one model is to be looked at."""

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

    for option in reversed(_OPTIONS):
        gathered = option(gathered)
    return gathered


def _check_table(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse at once what could not be written after minutes of work."""
    if value is None:
        return None
    if value.suffix.lower() != ".parquet":
        raise click.BadParameter(f"{value}: wanted a name that ends in .parquet")
    if value.exists() and not value.is_dir():
        raise click.BadParameter(f"{value} is a file; the table is a folder of Parquet files: give another name")
    if not value.absolute().parent.is_dir():
        raise click.BadParameter(f"{value}: there is no directory {value.parent}")
    return value


_OPTIONS = (
    click.option(
        "--scheduler",
        metavar="ADDRESS",
        help="Many models: the cluster of dask.distributed, as tcp://host:8786, or local for one on this machine.",
    ),
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        callback=_check_table,
        help="Many models: the table, as spectra.parquet. What is in it is not computed again.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        help="Many models: processes of --scheduler local.  [default: one for each processor]",
    ),
    click.option(
        "--connect-timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=10.0,
        show_default=True,
        metavar="SECONDS",
        help="Many models: how long to wait for the scheduler.",
    ),
)
