"""``python -m benchmarks accelerator``: check and measure everything on one accelerator, in a stated time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.accelerator_processes import Found, SectionRow, measure_library
from benchmarks.accelerator_setup import AMOUNTS, CONFORMANCE, TRAINING, WEIGHTS, Request
from benchmarks.command import Size, json_option, progress, size_options, write_json
from benchmarks.machine import describe, load_average, show_machine
from benchmarks.tables import duration, figures, or_dash, percent, ratio, say, show_table, words

__all__ = ["accelerator"]

PRINTED = 20
"""Largest number of failures that are printed: a guess at what a terminal shows. The JSON has all of them."""

COLUMNS = (
    words("library"),
    words("section"),
    words("what"),
    words("method"),
    figures("time", lambda row: duration(row.seconds)),
    figures("paper", lambda row: or_dash(duration, row.baseline_seconds)),
    figures("ratio", lambda row: or_dash(ratio, row.ratio)),
    figures("added", lambda row: or_dash("{:+.1%}".format, row.overhead)),
    figures("peak", lambda row: or_dash(percent, row.peak_share)),
    figures("first", lambda row: or_dash(duration, row.first_seconds)),
    figures("error", lambda row: or_dash("{:.2f}".format, row.error_eps)),
    words("note"),
)
EXPLANATION = (
    "paper: FFT of the zero-padded kernel and SVDs at all frequencies, for clip and project the paper's clip, for "
    "derivatives with the gradient; same library, dtype and run, ~ in the note where it is extrapolated from a sample "
    "of the frequencies. ratio: paper / time. added: to a plain step of the same turn, median. peak: share of the "
    "speed of a matrix product, counting the decompositions of singular_values and the Gram matrices of "
    "operator_norm alone, whether the method makes all of them or not. first: the first call or step, with "
    "compilation. error: in eps(float32) * sigma_max, for conformance in eps of each dtype. norm: after the last step "
    "over the bound, certified for every input size."
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """Hold a line of the table."""

    library: str
    section: str
    what: str
    method: str
    seconds: float
    baseline_seconds: float | None = None
    ratio: float | None = None
    overhead: float | None = None
    peak_share: float | None = None
    first_seconds: float | None = None
    error_eps: float | None = None
    note: str = ""


@click.command()
@size_options("Small layers and small batches, in two minutes.")
@click.option(
    "--backend",
    "backends",
    type=click.Choice(list(WEIGHTS)),
    multiple=True,
    default=tuple(WEIGHTS),
    show_default=True,
    help="Array library; may be given several times.",
)
@click.option("--device", help="Where to compute, as cuda:1 or cpu. [default: the first accelerator of each library]")
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), help="Time of the whole. [default: 8; quick: 2]"
)
@json_option()
def accelerator(
    size: Size, backends: tuple[str, ...], device: str | None, minutes: float | None, json_path: Path | None
) -> None:
    """Check and measure PyTorch, CuPy and JAX on one accelerator, within --minutes.

    Each library that finds the device runs in a process of its own: the conformance suite, thinned by its time; the
    singular values, norms, clip and project of representative layers beside the paper's lines; norms with their
    gradients; and with PyTorch training steps of ResNet-32 and ResNet-50. A section that has no time for something
    says what. A process that does not keep its time is ended, and says so. JAX_ENABLE_X64=1 adds JAX's double
    precision to the checks. The exit status is 1 where a check or a measurement failed.

    The machine needs this checkout, installed, NumPy, array-api-compat, pluggy and threadpoolctl, those of the three
    libraries that are measured, and click and rich without their own dependencies. Where there is no network, carry
    the wheels and install them by pip install --no-index --no-deps. Without matplotlib, run it as python -m
    benchmarks.accelerator.
    """
    amount = AMOUNTS[size]
    minutes = amount.minutes if minutes is None else minutes
    end, load_before = time.time() + 60 * minutes, load_average()
    names = list(dict.fromkeys(backends))
    found = []
    with progress() as tell:
        for place, name in enumerate(names):
            weights = [sum(WEIGHTS[later].values()) for later in names[place:]]
            now = time.time()
            until = now + max(0.0, end - now) * weights[0] / sum(weights)
            found.append(measure_library(Request(name, device, size.value, WEIGHTS[name], until), tell))
    if not any(one.facts for one in found):
        raise click.ClickException("; ".join(f"{one.library}: {one.skipped or 'did not start'}" for one in found))
    machine = describe([], load_before)
    machine["versions"] |= {one.library: one.facts["version"] for one in found if one.facts}
    machine["library_threads"] = {one.library: one.facts["threads"] for one in found if one.facts}
    models = dict.fromkeys(one.facts["model"] or machine["processor"] for one in found if one.facts)
    cells = _merge([cell for one in found for cell in one.rows.get(CONFORMANCE, [])])
    _show(", ".join(models), machine, found, cells)
    write_json(
        json_path,
        "accelerator",
        {"size": size.value, "quick": size is Size.QUICK, "device": device, "minutes": minutes, "backends": names},
        machine=machine,
        device=", ".join(models),
        libraries=[{"library": one.library, "skipped": one.skipped, "peak": one.peak} | one.facts for one in found],
        sections=[section for one in found for section in one.sections],
        conformance=cells,
        conformance_skips=[row for one in found for row in one.rows.get("conformance_skips", [])],
        methods=[row for one in found for row in one.rows.get("methods", [])],
        steps=[row for one in found for row in one.rows.get("steps", [])],
    )
    failures = _failures(found, cells)
    if failures:
        raise click.ClickException(f"{len(failures)} failures, the first: {failures[0]}")


def _merge(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one cell for each library, device, dtype and feature, from the cells of single checks."""
    merged: dict[tuple[str, ...], dict[str, Any]] = {}
    for cell in cells:
        key = (cell["backend"], cell["device"], cell["dtype"], cell["feature"])
        if key not in merged:
            merged[key] = cell | {"checks": 1, "failures": list(cell["failures"])}
            continue
        one = merged[key]
        for name in ("cases", "seconds", "known", "failures"):
            one[name] += cell[name]
        one["checks"] += 1
        one["largest"] = max(one["largest"], cell["largest"])
    return list(merged.values())


def _failures(found: Sequence[Found], cells: Sequence[dict[str, Any]]) -> list[str]:
    """Return every failed check and measurement, and every process that ended by itself."""
    failed = [failure for cell in cells for failure in cell["failures"]]
    for one in found:
        for section in one.sections:
            failed += [f"{section.library} {failure}" for failure in section.failures]
            if section.crashed:
                failed.append(f"{section.library} {section.section}: {section.reason}")
    return failed


def _show(device: str, machine: dict[str, Any], found: Sequence[Found], cells: Sequence[dict[str, Any]]) -> None:
    """Print the table, and what was skipped, left out or failed."""
    show_machine(machine, {one.library: one.peak for one in found if one.peak})
    where = ", ".join(f"{one.library} on {one.facts['device']}" for one in found if one.facts)
    say(f"\n{device}: {where}", "bold")
    lines = [line for one in found for line in _lines(one, [c for c in cells if c["backend"] == one.library])]
    show_table(lines, COLUMNS, EXPLANATION)
    for one in found:
        if one.skipped:
            say(f"{one.library}: skipped: {one.skipped}", "yellow")
        for skip in one.rows.get("conformance_skips", []):
            say(f"{one.library}, {CONFORMANCE}: skipped {skip['name']}: {skip['reason']}")
        for section in one.sections:
            if section.status != "complete":
                say(_sentence(section), "yellow")
    failures = _failures(found, cells)
    for failure in failures[:PRINTED]:
        say(f"FAILED {failure}", "red")
    if len(failures) > PRINTED:
        say(f"and {len(failures) - PRINTED} more failures, which --json writes to a file", "red")


def _sentence(section: SectionRow) -> str:
    """Say how a section that is not complete went."""
    text = f"{section.library}, {section.section}: {section.status} after {duration(section.seconds)}"
    if section.reason:
        text += f", because {section.reason}"
    return text + (f"; left out: {'; '.join(section.left_out)}" if section.left_out else "")


def _lines(found: Found, cells: Sequence[dict[str, Any]]) -> list[Line]:
    """Return the lines of one library."""
    lines = []
    if cells:
        failed, known = sum(len(cell["failures"]) for cell in cells), sum(cell["known"] for cell in cells)
        notes = [f"{failed} FAILED" if failed else "passed"]
        notes += [f"{known} known to fail"] if known else []
        skips = found.rows.get("conformance_skips", [])
        notes += [f"{len(skips)} skips"] if skips else []
        lines.append(
            Line(
                library=found.library,
                section=CONFORMANCE,
                what=f"{sum(cell['checks'] for cell in cells)} of {cells[0]['of']} checks",
                method=f"{len({cell['feature'] for cell in cells})} features",
                seconds=sum(cell["seconds"] for cell in cells),
                error_eps=max(cell["largest"] for cell in cells),
                note=", ".join(notes),
            )
        )
    for row in found.rows.get("methods", []):
        shared = {name: row[name] for name in ("baseline_seconds", "ratio", "peak_share", "first_seconds", "error_eps")}
        lines.append(
            Line(
                library=row["library"],
                section=row["section"],
                what=row["label"],
                method=row["method"],
                seconds=row["ours_seconds"],
                note=f"{row['baseline']}{' ~' if row['extrapolated'] else ''}",
                **shared,
            )
        )
    for row in found.rows.get("steps", []):
        lines.append(
            Line(
                library=row["library"],
                section=TRAINING,
                what=row["network"],
                method=row["method"],
                seconds=row["seconds"],
                overhead=row["overhead"],
                first_seconds=row["first_seconds"],
                note=f"{len(row['times'])} steps" + ("" if row["norm"] is None else f", norm {row['norm']:.3f}"),
            )
        )
    return lines


if __name__ == "__main__":
    accelerator(prog_name="python -m benchmarks.accelerator")
