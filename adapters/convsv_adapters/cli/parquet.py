"""The table of `convsv spectrum --out`: a folder of Parquet files, which readers take for one table.

A Parquet file ends with its table of contents, so that a file that is cut off cannot be read at all. The table is
therefore a folder, to which whole files are added. Whenever the run ends, the table is readable and holds
every model that was done by then. A model has all its rows in the table, or none.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from convsv_adapters.cli.checkpoints import Checkpoint
from convsv_adapters.cli.files import write_whole
from convsv_core.plugins import one_line
from convsv_core.reports import QUANTILES, LayerReport, ModelReport

__all__ = ["Norm", "SpectraTable", "TableError"]

ROWS_PER_PART = 10_000
"""The number of rows that are gathered at most before they are written as a file (a guess)."""

SECONDS_PER_PART = 30.0
"""The time after which the next row makes all gathered rows be written: what a killed run may lose (a guess)."""

METADATA = b"convsv"
"""The key of the settings in the metadata of each Parquet file."""

_INTS = pa.list_(pa.int32())
_QUANTILE_COLUMNS = [f"q{round(100 * share):02d}" for share in QUANTILES]

SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("step", pa.int64()),
        ("model", pa.string()),
        ("depth", pa.int32()),
        ("layer", pa.string()),
        ("kernel_shape", _INTS),
        ("layout", pa.string()),
        ("stride", _INTS),
        ("dilation", _INTS),
        ("groups", pa.int32()),
        ("transposed", pa.bool_()),
        ("input_shape", _INTS),
        ("operator_norm", pa.float64()),
        ("norm_lower", pa.float64()),
        ("norm_upper", pa.float64()),
        ("smallest_singular_value", pa.float64()),
        *((name, pa.float64()) for name in _QUANTILE_COLUMNS),
        ("condition_number", pa.float64()),
        ("stable_rank", pa.float64()),
        ("reshaped_norm", pa.float64()),
        ("note", pa.string()),
        ("bytes", pa.int64()),
        ("modified", pa.timestamp("us", tz="UTC")),
    ]
)
"""The columns. A row is a layer; a model without any figures has one row with a note and without a layer."""

_REPORT_COLUMNS = [name for name in SCHEMA.names if name in LayerReport.__dataclass_fields__]
_FILE_COLUMNS = ("model", "bytes", "modified")


class TableError(Exception):
    """The table cannot be used. The message is one line."""


class Norm(NamedTuple):
    """The norm of one layer at one step of a run, as a row of the table has it."""

    run: str
    step: int | None
    depth: int
    layer: str
    norm: float
    model: str = ""


class SpectraTable:
    """A table to which one process adds, while any number of processes may read it.

    Parameters
    ----------
    folder : Path
        The table's folder, which is made if it is not there.
    settings : dict
        The options on which the figures depend. A table of other settings is refused.

    Raises
    ------
    TableError
        `folder` is no table, or has other settings, or another process adds to it. Raised on entering the block.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self._schema = SCHEMA.with_metadata({METADATA: json.dumps(settings, sort_keys=True)})
        self._settings = settings
        self._rows: list[dict[str, Any]] = []
        self._written = time.monotonic()
        self._lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        self._known: dict[str, tuple[int | None, int | None]] = {}
        self._without: set[str] = set()
        self._next = 0

    def __enter__(self) -> SpectraTable:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise TableError(f"{self.folder}: another process is adding to this table") from None
        try:
            self.folder.mkdir(exist_ok=True)
            for left_over in self.folder.parent.glob(f".{self.folder.name}.*.part.parquet"):
                left_over.unlink()
            self._read()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
            with contextlib.suppress(OSError):  # a folder that is not empty
                self.folder.rmdir()
        finally:
            self._lock.release()

    # ---- what is there ---------------------------------------------------------------------------------

    def has(self, checkpoint: Checkpoint) -> bool:
        """Return whether the table has figures of a checkpoint, and the file has not changed since."""
        return self._known.get(checkpoint.model, ()) == (checkpoint.size, checkpoint.modified)

    def forget(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Remove the rows of checkpoints that are to be computed again."""
        held = {one.model for one in checkpoints if one.model in self._known or one.model in self._without}
        models = pa.array(sorted(held), pa.string())
        for path in self._parts() if held else ():
            table = pq.read_table(path)
            kept = table.filter(pa.compute.invert(pa.compute.is_in(table["model"], models)))
            if kept.num_rows == table.num_rows:
                continue
            if kept.num_rows:
                self._write(kept, path)
            else:
                path.unlink()

    def norms(self) -> Iterator[Norm]:
        """Yield the norms of all layers that have one, without holding the table in memory."""
        rows = pyarrow.dataset.dataset(self._parts(), schema=SCHEMA)
        columns = ["run", "step", "depth", "layer", "operator_norm", "model"]
        for batch in rows.to_batches(columns=columns, filter=pyarrow.dataset.field("operator_norm").is_valid()):
            yield from map(Norm._make, zip(*(batch[name].to_pylist() for name in columns), strict=True))

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def _read(self) -> None:
        """Check the settings of every part, and note the models that have figures in it."""
        parts = self._parts()
        if not parts and any(self.folder.iterdir()):
            raise TableError(f"{self.folder}: a folder of other files: give another name, or an empty one")
        for path in parts:
            try:
                file = pq.ParquetFile(path)
            except (OSError, pa.ArrowException) as error:
                raise TableError(f"{path}: cannot be read: {one_line(error)}") from None
            with file:
                self._check(path, file.schema_arrow)
                for batch in file.iter_batches(columns=[*_FILE_COLUMNS, "layer"]):
                    self._take(batch)
            self._next = max(self._next, int(path.stem.partition("-")[2]) + 1)

    def _check(self, path: Path, schema: pa.Schema) -> None:
        found = json.loads((schema.metadata or {}).get(METADATA, b"{}"))
        if schema.names != SCHEMA.names or set(found) != set(self._settings):
            raise TableError(f"{path}: not a table of this version of convsv: give another name")
        for name, value in json.loads(json.dumps(self._settings)).items():
            if found[name] != value:
                raise TableError(
                    f"{self.folder}: the table is of {name} {found[name]}, not {value}: call for the same, or give "
                    f"another name"
                )

    def _take(self, batch: pa.RecordBatch) -> None:
        models, sizes, layers = (batch[name].to_pylist() for name in ("model", "bytes", "layer"))
        modified = batch["modified"].cast(pa.int64()).to_pylist()
        for model, size, when, layer in zip(models, sizes, modified, layers, strict=True):
            if layer is not None:
                self._known[model] = (size, when)
            else:  # a model without figures is tried again
                self._without.add(model)

    # ---- adding ----------------------------------------------------------------------------------------

    def add(self, checkpoint: Checkpoint, report: ModelReport) -> None:
        """Add the rows of one model."""
        about = {
            "run": checkpoint.run,
            "step": checkpoint.step,
            "model": checkpoint.model,
            "bytes": checkpoint.size,
            "modified": checkpoint.modified,
        }
        if report.note:
            self._rows.append(about | {"note": report.note})
        self._rows.extend(about | _row(depth, layer) for depth, layer in enumerate(report.layers, start=1))
        if len(self._rows) >= ROWS_PER_PART or time.monotonic() - self._written >= SECONDS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Write the rows that were added since the last time."""
        if self._rows:
            path = self.folder / f"part-{self._next:06d}.parquet"
            self._write(pa.Table.from_pylist(self._rows, self._schema), path)
            self._next += 1
        self._rows, self._written = [], time.monotonic()

    def _write(self, table: pa.Table, path: Path) -> None:
        """Write one part. It is begun beside the folder, because some readers take every file in it for a part."""
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        write_whole(path, buffer.getvalue().to_pybytes(), beside=self.folder)


def _row(depth: int, report: LayerReport) -> dict[str, Any]:
    quantiles = dict(zip(_QUANTILE_COLUMNS, report.quantiles or (), strict=False))
    figures = {name: getattr(report, name) for name in _REPORT_COLUMNS}
    return {"depth": depth, "layer": report.name} | figures | quantiles
