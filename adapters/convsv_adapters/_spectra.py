"""The table of `convsv spectrum --out`: a folder of Parquet files, which readers take for one table.

A Parquet file ends with its table of contents, so that one that is broken off cannot be read at all. The table is
therefore a folder, to which whole files are added: whenever the run ends, the table is readable and holds
every model that was done by then. A model is in it with all its rows or with none.
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

from convsv_adapters._checkpoints import Checkpoint
from convsv_adapters._files import write_whole
from convsv_core.reports import QUANTILES, LayerReport, ModelReport

ROWS_PER_PART = 10_000
SECONDS_PER_PART = 30.0
"""Rows are written when there are so many, or when one comes in and the last were written so long ago."""

METADATA = b"convsv"
_INTS = pa.list_(pa.int32())

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
        *((f"q{round(100 * share):02d}", pa.float64()) for share in QUANTILES),
        ("condition_number", pa.float64()),
        ("stable_rank", pa.float64()),
        ("reshaped_norm", pa.float64()),
        ("note", pa.string()),
        ("bytes", pa.int64()),
        ("modified", pa.timestamp("us", tz="UTC")),
    ]
)
"""One row a layer; one without layer, and with a note, for a model that has no figures at all."""

_OF_A_REPORT = [name for name in SCHEMA.names if name in LayerReport.__dataclass_fields__]
_OF_THE_FILE = ("model", "bytes", "modified")


class TableError(Exception):
    """A table that cannot be used; the message is one line."""


class Norm(NamedTuple):
    """What a row says of a layer's norm."""

    run: str
    step: int | None
    depth: int
    layer: str
    norm: float


class SpectraTable:
    """A table that one process adds to, and that any number may read.

    Parameters
    ----------
    folder : Path
        Which is made if it is not there.
    settings : dict
        What the figures depend on besides the models. A table of other settings is refused.

    Raises
    ------
    TableError
        On entering: `folder` is something else, has other settings, or another process adds to it.
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
        """Whether the figures of a checkpoint are there, and the file is the one that they are of."""
        return self._known.get(checkpoint.model, ()) == (checkpoint.size, checkpoint.modified)

    def forget(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Take out what there is of checkpoints that are to be computed again."""
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
        """The norms of all layers that have one, without holding the table."""
        rows = pyarrow.dataset.dataset(self._parts(), schema=SCHEMA)
        columns = ["run", "step", "depth", "layer", "operator_norm"]
        for batch in rows.to_batches(columns=columns, filter=pyarrow.dataset.field("operator_norm").is_valid()):
            yield from map(Norm._make, zip(*(batch[name].to_pylist() for name in columns), strict=True))

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def _read(self) -> None:
        """Look at every part: its settings, and of which models it has figures."""
        parts = self._parts()
        if not parts and any(self.folder.iterdir()):
            raise TableError(f"{self.folder}: a folder of other files: give another name, or an empty one")
        for path in parts:
            try:
                file = pq.ParquetFile(path)
            except (OSError, pa.ArrowException) as error:
                raise TableError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
            with file:
                self._check(path, file.schema_arrow)
                for batch in file.iter_batches(columns=[*_OF_THE_FILE, "layer"]):
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
            else:  # a model without any is tried again
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
        """Write what was added."""
        if self._rows:
            path = self.folder / f"part-{self._next:06d}.parquet"
            self._write(pa.Table.from_pylist(self._rows, self._schema), path)
            self._next += 1
        self._rows, self._written = [], time.monotonic()

    def _write(self, table: pa.Table, path: Path) -> None:
        """Write one part, which is begun beside the folder: some readers take every file in it for a part."""
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        write_whole(path, buffer.getvalue().to_pybytes(), beside=self.folder)


def _row(depth: int, report: LayerReport) -> dict[str, Any]:
    quantiles = dict(zip(_QUANTILE_NAMES, report.quantiles or (), strict=False))
    figures = {name: getattr(report, name) for name in _OF_A_REPORT}
    return {"depth": depth, "layer": report.name} | figures | quantiles


_QUANTILE_NAMES = [f"q{round(100 * share):02d}" for share in QUANTILES]
