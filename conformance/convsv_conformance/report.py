"""Report what a run found, as a table for people and as JSON, Markdown or HTML for files."""

from __future__ import annotations

import html
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["Cell", "Report", "check_path"]


@dataclass
class Cell:
    """The results of one feature on one library, device and dtype.

    Attributes
    ----------
    cases : int
        Number of convolutions, or of wrong calls, that were tried.
    largest : float
        Largest error, in units of eps times the scale of the result (`sigma_max` for singular values).
    seconds : float
        Wall-clock time of the checks, with that of the dense reference.
    known : int
        Number of cases that failed and that a file of known failures lists.
    failures : list of str
        One line for each case that failed, with the error.
    """

    backend: str
    device: str
    dtype: str
    feature: str
    cases: int = 0
    largest: float = 0.0
    seconds: float = 0.0
    known: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """The cells of a run, and the skips as pairs of a name and a reason."""

    cells: Sequence[Cell]
    skipped: Sequence[tuple[str, str]]

    @property
    def failures(self) -> list[str]:
        """Return every failure."""
        return [failure for cell in self.cells for failure in cell.failures]

    def matrix(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of a table with a row for each feature and a column for each backend.

        An entry sums up all devices and dtypes.
        """
        backends = list(dict.fromkeys(cell.backend for cell in self.cells))
        rows = []
        for feature in dict.fromkeys(cell.feature for cell in self.cells):
            row = [feature]
            for backend in backends:
                row.append(_summary([c for c in self.cells if c.feature == feature and c.backend == backend]))
            rows.append(row)
        rows.append(["all", *(_summary([c for c in self.cells if c.backend == backend]) for backend in backends)])
        return ["feature", *backends], rows

    def write(self, path: Path) -> None:
        """Write the report to a file, in the format that its ending names; `check_path` checks the ending."""
        path.write_text(WRITERS[path.suffix](self), encoding="utf-8")


def check_path(path: Path) -> None:
    """Raise ValueError unless a report can be written in the format that the file's ending names."""
    if path.suffix not in WRITERS:
        raise ValueError(f"{path}: wanted a file that ends in {', '.join(WRITERS)}")


def _summary(cells: Sequence[Cell]) -> str:
    if not cells:
        return "-"
    failed, known = sum(len(cell.failures) for cell in cells), sum(cell.known for cell in cells)
    parts = [
        f"{failed} FAILED of {sum(cell.cases for cell in cells)}" if failed else f"{sum(c.cases for c in cells)} cases",
        f"{max(cell.largest for cell in cells):.1f} eps",
        f"{sum(cell.seconds for cell in cells):.1f} s",
    ]
    return ", ".join(parts + ([f"{known} known to fail"] if known else []))


def _json(report: Report) -> str:
    found: dict[str, Any] = {
        "convsv": version("convsv"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "error_unit": "eps * sigma_max",
        "passed": not report.failures,
        "cells": [asdict(cell) for cell in report.cells],
        "skipped": [{"name": name, "reason": reason} for name, reason in report.skipped],
    }
    return json.dumps(found, indent=2) + "\n"


def _markdown(report: Report) -> str:
    header, rows = report.matrix()
    lines = ["# Conformance of array backends", "", "Largest errors in units of eps times sigma_max.", ""]
    lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    for title, entries in _lists(report):
        lines += ["", f"## {title}", "", *(f"- {entry}" for entry in entries)]
    return "\n".join(lines) + "\n"


def _html(report: Report) -> str:
    header, rows = report.matrix()

    def row(cells: Sequence[str], tag: str) -> str:
        marked = (f"<{tag}{' class=failed' if 'FAILED' in cell else ''}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{''.join(marked)}</tr>"

    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Conformance of array backends</title>",
        "<style>body{font-family:sans-serif}td,th{padding:.3em .8em;text-align:left}"
        "tr:nth-child(even){background:#f3f3f3}.failed{color:#b00020;font-weight:bold}</style>",
        "<h1>Conformance of array backends</h1><p>Largest errors in units of eps times sigma_max.</p>",
        f"<table>{row(header, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>",
    ]
    for title, entries in _lists(report):
        items = "".join(f"<li>{html.escape(entry)}</li>" for entry in entries)
        parts.append(f"<h2>{title}</h2><ul>{items}</ul>")
    return "\n".join(parts) + "</html>\n"


def _lists(report: Report) -> list[tuple[str, list[str]]]:
    skipped = [f"{name}: {reason}" for name, reason in report.skipped]
    return [pair for pair in (("Failed", report.failures), ("Skipped", skipped)) if pair[1]]


WRITERS = {".json": _json, ".md": _markdown, ".html": _html}
"""The formats of a report, by the ending of the file's name."""
