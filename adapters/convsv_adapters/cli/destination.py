"""Where a network is written: one file, or an index and the files beside it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import click

from convsv_adapters.cli.files import replacing, replacing_together
from convsv_core.reports import files_of_model

__all__ = ["Destination"]

OPTION = "--output"
"""The option that errors name."""


@dataclass(frozen=True)
class Destination:
    """The files that a network is written to, and the files that it is read from, in the same order.

    Attributes
    ----------
    targets, sources : tuple of Path
        One file, or an index and the files that it lists.
    """

    targets: tuple[Path, ...]
    sources: tuple[Path, ...]

    @classmethod
    def of(cls, model: Path, output: Path, *, force: bool) -> Destination:
        """Return where a network is written to; report a place that is taken, so that no work is done in vain.

        Parameters
        ----------
        model : Path
            The network's file, or the index of its files.
        output : Path
            A file. For an index also a folder, in which the files have the names that they have beside `model`.
        force : bool
            Whether files that exist are replaced. Those of a network in several files never are by itself.

        Raises
        ------
        click.BadParameter
            The output is no place for the network.
        ModelError
            The model does not tell its files.
        """
        sources = files_of_model(model)
        targets = (output,) if len(sources) == 1 else _beside_each_other(sources, output)
        if folders := [target for target in targets if target.is_dir()]:
            raise click.BadParameter(f"{folders[0]} is a directory", param_hint=OPTION)
        taken = [target for target in targets if os.path.lexists(target)]
        if taken and not force:
            raise click.BadParameter(f"{taken[0]} exists: give another, or --force to replace it", param_hint=OPTION)
        if strange := [target for target in taken if target.exists() and not target.is_file()]:
            raise click.BadParameter(f"{strange[0]} is no file", param_hint=OPTION)
        return cls(targets, sources)

    def replacing(self) -> contextlib.AbstractContextManager[Path]:
        """Return a context manager that gives the path to write to; its files take their places at the end."""
        if len(self.targets) == 1:
            return replacing(self.targets[0], like=self.sources[0])
        return replacing_together(self.targets, self.sources)


def _beside_each_other(sources: tuple[Path, ...], output: Path) -> tuple[Path, ...]:
    """Return the files of a network in several files, of which the first is an index, in the folder of the output."""
    index = sources[0]
    is_index = output.suffix.lower() == index.suffix.lower() and not output.is_dir()
    folder = output.parent if is_index else output
    if folder.exists() and not folder.is_dir():
        raise click.BadParameter(
            f"{output} is a file, and {index.name} lists several files: give a folder, or the name of an index",
            param_hint=OPTION,
        )
    if folder.exists() and folder.samefile(index.parent):
        raise click.BadParameter(
            f"{folder} holds the files of {index.name}, which are not replaced: give another folder", param_hint=OPTION
        )
    return (folder / (output.name if is_index else index.name), *(folder / source.name for source in sources[1:]))
