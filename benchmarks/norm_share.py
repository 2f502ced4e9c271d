"""``python -m benchmarks norm-share``: time the largest singular value as a share of all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.command import Options, comparison_options, progress, select_groups, write_json
from benchmarks.comparison import group_by
from benchmarks.machine import describe, load_average, show_machine
from benchmarks.norm_first_call import measure_first_calls
from benchmarks.norm_share_layers import (
    AMOUNTS,
    BOUNDS,
    COMPILED,
    NORM,
    SPECTRUM,
    ShareRow,
    find,
    measure,
)
from benchmarks.tables import duration, figures, integers, or_dash, ratio, show_table, words

__all__ = ["ShareSummary", "norm_share", "summarise"]

SCHEMA = 1
"""Version of the JSON."""


@dataclass(frozen=True)
class ShareSummary:
    """Sum up the layers of a group in one library: an entry of ``summary`` in the JSON.

    Attributes
    ----------
    count : int
        Layers.
    seconds : float
        Time of `singular_values`, summed over the layers.
    shares, median_shares, largest_shares : dict of str to float
        For each method its summed time over that of `singular_values`, the median share of a layer, and the largest.
    over_numpy, compiled_over_numpy : float or None
        Summed time of `singular_values`, and of the compiled form, over that of `singular_values` with NumPy. None
        without NumPy, or where nothing is compiled.
    """

    library: str
    group: str
    count: int
    seconds: float
    shares: dict[str, float]
    median_shares: dict[str, float]
    largest_shares: dict[str, float]
    over_numpy: float | None
    compiled_over_numpy: float | None


def _share(value: float) -> str:
    return f"{value:.3f}"


ROW_COLUMNS = (
    words("library"),
    words("group"),
    words("convolution", lambda row: f"{row.network} {row.label}"),
    words("method"),
    figures("time", lambda row: duration(row.seconds)),
    figures("share", lambda row: _share(row.share)),
    figures("over NumPy", lambda row: or_dash(ratio, row.over_numpy)),
)
SUM_COLUMNS = (
    words("library"),
    words("layers", lambda one: one.group),
    integers("x", "count"),
    figures(SPECTRUM, lambda one: duration(one.seconds)),
    figures("over NumPy", lambda one: or_dash(ratio, one.over_numpy)),
    figures("compiled", lambda one: or_dash(ratio, one.compiled_over_numpy)),
    figures(NORM, lambda one: _share(one.shares[NORM])),
    figures("largest", lambda one: _share(one.largest_shares[NORM])),
    figures(BOUNDS, lambda one: _share(one.shares[BOUNDS])),
    figures("largest", lambda one: _share(one.largest_shares[BOUNDS])),
)
EXPLANATION = (
    "The norms are on the layer's own grid, as shares of the time of singular_values in the same library and run, "
    "summed over the layers, with the largest share of one layer. over NumPy: singular_values over those of NumPy, and "
    "where they are compiled."
)
FIRST_COLUMNS = (
    words("library"),
    words("method"),
    figures("first call", lambda row: duration(row.first_seconds)),
    figures("later", lambda row: duration(row.later_seconds)),
    figures("spent by NumPy", lambda row: or_dash(duration, row.numpy_seconds)),
)
FIRST_EXPLANATION = "eager calls, each in a process of its own; spent by NumPy: the first call with NumPy."


@click.command("norm-share")
@comparison_options(plot=None)
@click.option(
    "--networks",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    help="Model file, or folder of some; may be given several times. [default: the wheels of tests/networks.txt that "
    "are installed, else the network of the package]",
)
@click.option("--processor-time", is_flag=True, help="Take the processor's time, for one thread on a busy machine.")
def norm_share(options: Options, networks: Sequence[Path], processor_time: bool) -> None:
    """Time operator_norm and norm_bounds as a share of singular_values, on Gaussian and on trained layers.

    All methods and libraries run alternately in one process. Then the first call of norm_bounds is timed in new
    processes.
    """
    amount = AMOUNTS[options.size]
    effort = options.effort(amount.effort)
    clock = time.process_time if processor_time else time.perf_counter
    load_before = load_average()
    libraries = options.open_libraries()
    groups = select_groups(find(networks, options.size), options.only)
    if not any(groups.values()):
        raise click.BadParameter(f"{options.only!r} is in the name of no layer", param_hint="--only")
    rows: list[ShareRow] = []
    with progress() as tell:
        for group, shapes in groups.items():
            for number, shape in enumerate(shapes, start=1):
                tell(f"{group} {number}/{len(shapes)} {shape.name}")
                rows.extend(measure(libraries, group, shape, effort.repeats, clock))
        first = measure_first_calls(libraries, amount.first_call, processor_time=processor_time, tell=tell)
    machine = describe(libraries, load_before)
    summaries = summarise(rows)
    show_machine(machine)
    show_table(rows, ROW_COLUMNS)
    show_table(summaries, SUM_COLUMNS, EXPLANATION)
    show_table(first, FIRST_COLUMNS, FIRST_EXPLANATION)
    arguments = options.arguments() | {"repeats": effort.repeats, "clock": clock.__name__}
    content = {"rows": rows, "summary": summaries, "first_calls": first}
    write_json(options.json_path, "norm-share", arguments, schema=SCHEMA, machine=machine, **content)


def summarise(rows: Sequence[ShareRow]) -> list[ShareSummary]:
    """Return one summary for each library and group."""
    numpy = {
        group: members for (library, group), members in group_by(rows, "library", "group").items() if library == "numpy"
    }
    return [
        _summarise(members, numpy.get(group, ())) for (_, group), members in group_by(rows, "library", "group").items()
    ]


def _summarise(rows: Sequence[ShareRow], numpy: Sequence[ShareRow]) -> ShareSummary:
    methods = {method: members for (method,), members in group_by(rows, "method").items()}
    seconds = {method: sum(row.seconds for row in members) for method, members in methods.items()}
    base = sum(row.seconds for row in numpy if row.method == SPECTRUM)
    shares = {method: [row.share for row in members] for method, members in methods.items()}
    return ShareSummary(
        library=rows[0].library,
        group=rows[0].group,
        count=len(methods[SPECTRUM]),
        seconds=seconds[SPECTRUM],
        shares={method: spent / seconds[SPECTRUM] for method, spent in seconds.items()},
        median_shares={method: statistics.median(listed) for method, listed in shares.items()},
        largest_shares={method: max(listed) for method, listed in shares.items()},
        over_numpy=seconds[SPECTRUM] / base if base else None,
        compiled_over_numpy=seconds[COMPILED] / base if base and COMPILED in seconds else None,
    )
