"""Many models, layer by layer and block by block of frequencies, on the workers of a `dask.distributed` cluster."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from convsv_core import tasks
from convsv_core.analysis import BOUNDS, COMPUTING_FAILS, Bounds, LayerReport, joined
from convsv_core.layers import ReadOptions
from convsv_core.plugins import get_backend

if TYPE_CHECKING:
    from distributed import Client

Future: TypeAlias = Any

TASKS_PER_THREAD = 8
"""Tasks under way for each thread of the cluster: enough that none waits for the client, and all that it holds."""

SECONDS_PER_TASK = 1.0
"""That small models are packed to, where there are enough of them."""

ROUNDS = 4
"""Tasks that each thread is to have left at the least where models are packed, so that all end at about one time."""

SECONDS_BETWEEN_COUNTS = 2.0
"""After which the threads of the cluster are counted anew: workers come and go."""


@dataclass(frozen=True)
class ModelReport:
    """The figures of one model.

    Attributes
    ----------
    path : Path
        As it was given.
    layers : list of LayerReport
        One a convolution, in the order of the network, as `convsv_core.analyze` has them, but without curves.
        Empty where `note` is not.
    note : str
        Why there are none: the file cannot be read or holds no convolution, or workers died of it. "" otherwise.
    """

    path: Path
    layers: list[LayerReport]
    note: str = ""


def analyze_many(
    paths: Iterable[str | os.PathLike[str]],
    client: Client,
    *,
    options: ReadOptions | None = None,
    backend: str = "numpy",
    bounds: Bounds = "upper",
    dtype: str | None = None,
    device: str | None = None,
) -> Generator[ModelReport]:
    """Yield the figures of every convolution of many model files, computed on a `dask.distributed` cluster.

    Parameters
    ----------
    paths : iterable of path
        Model files of any format that an installed reader knows. Each worker opens them by their absolute paths, so
        they must lie in a file system that all workers share.
    client : distributed.Client
        Of the cluster, whose workers have `convsv` installed; not an asynchronous one.
    options : ReadOptions, optional
        What the files may leave open, such as the input's shape; the same for all.
    backend : str, default "numpy"
        Name of the library that workers compute with.
    bounds : {"none", "upper", "both"}, default "upper"
        Which bounds of the norm with the layer's own padding to certify.
    dtype, device : str, optional
        As for `convsv_core.analysis.analyse`.

    Yields
    ------
    ModelReport
        In the order of `paths`. A file that cannot be read has a report that says why, and the rest goes on.

    Raises
    ------
    TypeError
        `client` is no client, or an asynchronous one.
    ValueError
        There is no such backend, or no such `bounds`.
    ConnectionError
        The scheduler has gone.
    Exception
        Whatever kept a worker from running a task at all, such as a worker that lacks `convsv`.

    Notes
    -----
    Small layers and models are packed into tasks of about a second, and a large layer is split into blocks of
    frequencies, whose values are put together on a worker. The client holds only as much as is under way, whatever
    the number of models. The engine runs the tasks of a lost worker again. All figures are computed in
    one thread and cut in the same places, so that their bits do not depend on the number of workers or on what
    happens to them; they may on the make of the processors, for which BLAS has kernels of its own. Quantiles
    are those of all singular values, whether a layer was split or not.

    If the iterator is closed before its end, what is under way is cancelled. Neither traceable nor
    differentiable. Source: Sedghi, Gupta and Long, *The Singular Values of Convolutional Layers*, ICLR 2019.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from distributed import Client
    >>> path = Path(tempfile.mkdtemp()) / "step_100.npz"
    >>> np.savez(path, kernel=np.ones((1, 1, 3, 3)))
    >>> with Client(processes=False, dashboard_address="127.0.0.1:0") as client:
    ...     (report,) = analyze_many([path], client)
    >>> report.layers[0].operator_norm
    9.0
    """
    _check_client(client)
    get_backend(backend)
    if bounds not in BOUNDS:
        raise ValueError(f"bounds={bounds!r}: wanted one of {', '.join(BOUNDS)}")
    settings = tasks.Settings(options or ReadOptions(), backend, bounds, dtype, device)
    return _Run(client, [Path(path) for path in paths], settings).reports()


@dataclass(eq=False)
class _Model:
    """A model under way: the reports that are there, and how many tasks are still to bring some."""

    order: int
    path: Path
    reports: list[LayerReport | None] = field(default_factory=list)
    waiting: int = 1
    note: str = ""

    @property
    def absolute(self) -> Path:
        return Path(os.path.abspath(self.path))

    def report(self) -> ModelReport:
        if self.note:
            return ModelReport(self.path, [], self.note)
        return ModelReport(self.path, [report for report in self.reports if report is not None])


class _Run:
    """The client's side of one call: what is under way, in the order of the models."""

    def __init__(self, client: Client, paths: list[Path], settings: tasks.Settings) -> None:
        from distributed import as_completed

        self._client = client
        self._settings = settings
        self._left = deque(_Model(order, path) for order, path in enumerate(paths))
        self._window: deque[_Model] = deque()
        self._splits: deque[tuple[_Model, tasks.Split]] = deque()
        self._completed = as_completed(loop=client.loop)
        self._handlers: dict[Any, tuple[Future, Callable[[Future], None], int]] = {}
        self._under_way = 0
        self._threads, self._counted = 1, -float("inf")
        self._seconds = self._surveyed_models = 0.0

    def reports(self) -> Generator[ModelReport]:
        """Submit, wait, and yield what is done, until nothing is left."""
        try:
            self._submit()
            while self._window:
                future = next(self._completed)
                _, handle, weight = self._handlers.pop(future.key)
                self._under_way -= weight
                handle(future)
                while self._window and not self._window[0].waiting:
                    yield self._window.popleft().report()
                self._submit()
        finally:
            if self._handlers:
                with contextlib.suppress(Exception):  # what matters is the error, if any, that led here
                    self._client.cancel([future for future, *_ in self._handlers.values()])

    # ---- submitting ------------------------------------------------------------------------------------

    def _submit(self) -> None:
        """Fill up what is under way, earlier models first."""
        while self._under_way < (most := TASKS_PER_THREAD * self._count_threads()):
            if self._splits:
                self._submit_blocks(*self._splits.popleft())
            elif self._left and len(self._window) < 2 * most * self._models_per_task():  # the first may take long
                models = [self._left.popleft() for _ in range(self._pack_size())]
                self._window.extend(models)
                self._submit_survey(models)
            else:
                return

    def _submit_survey(self, models: list[_Model]) -> None:
        paths = [model.absolute for model in models]
        self._start(models[0], self._take_survey, models, tasks.survey, paths, self._settings)

    def _submit_blocks(self, model: _Model, split: tasks.Split) -> None:
        """One layer, whose values stay on the workers until they have been put together."""
        layer = self._task(model, tasks.load, model.absolute, split.index, self._settings)
        prepared = self._task(model, tasks.prepare, layer, self._settings)
        bounded = self._task(model, tasks.bound, layer, self._settings)
        values = self._client.map(
            tasks.block_values, list(split.blocks), prepared=prepared, pure=False, priority=-model.order
        )
        take = functools.partial(self._take_layer, split=split)
        self._start(model, take, model, tasks.combine, bounded, prepared, values, weight=len(values) + 4)

    def _start(self, first: _Model, handle: Callable[..., None], subject: object, *task: Any, weight: int = 1) -> None:
        """Submit a task whose result `handle` is to take."""
        future = self._task(first, *task)
        self._handlers[future.key] = (future, functools.partial(handle, subject), weight)
        self._under_way += weight
        self._completed.add(future)

    def _task(self, model: _Model, function: Callable[..., Any], *arguments: Any) -> Future:
        return self._client.submit(function, *arguments, pure=False, priority=-model.order)

    def _models_per_task(self) -> int:
        """How many models make a task of `SECONDS_PER_TASK`, by the times of those that are done."""
        return max(1, int(SECONDS_PER_TASK * self._surveyed_models / max(self._seconds, 1e-9)))

    def _pack_size(self) -> int:
        """How many models to put into the next task."""
        return max(1, min(self._models_per_task(), len(self._left) // (ROUNDS * self._threads)))

    def _count_threads(self) -> int:
        now = time.monotonic()
        if now - self._counted > SECONDS_BETWEEN_COUNTS:
            self._threads = max(1, sum(self._client.nthreads().values()))
            self._counted = now
        return self._threads

    # ---- taking results --------------------------------------------------------------------------------

    def _take_survey(self, models: list[_Model], future: Future) -> None:
        surveys, error = _outcome(future)
        if error is not None:
            if not _is_fatal(error):
                raise error  # no task of any model would fare better
            if len(models) > 1:  # find out which one
                for model in models:
                    self._submit_survey([model])
                return
            self._finish(models[0], _reason(error))
            return
        for model, survey in zip(models, surveys, strict=True):
            self._seconds += survey.seconds
            self._surveyed_models += 1
            model.reports = survey.reports
            model.waiting += len(survey.packs) + len(survey.splits)
            for pack in survey.packs:
                take = functools.partial(self._take_pack, pack=pack)
                self._start(model, take, model, tasks.measure, model.absolute, pack, self._settings)
            self._splits.extend((model, split) for split in survey.splits)
            self._finish(model, survey.note)

    def _take_pack(self, model: _Model, future: Future, *, pack: list[int]) -> None:
        reports, error = _outcome(future)
        if error is None:
            for index, report in zip(pack, reports, strict=True):
                model.reports[index] = report
        self._finish(model, "" if error is None else _reason(error))

    def _take_layer(self, model: _Model, future: Future, *, split: tasks.Split) -> None:
        report, error = _outcome(future)
        if error is None:
            model.reports[split.index] = report
        elif isinstance(error, COMPUTING_FAILS):
            note = joined(split.report.note, _reason(error))
            model.reports[split.index] = replace(split.report, note=note)
        else:
            self._finish(model, f"{split.report.name}: {_reason(error)}")
            return
        self._finish(model)

    def _finish(self, model: _Model, note: str = "") -> None:
        model.waiting -= 1
        model.note = model.note or note


def _outcome(future: Future) -> tuple[Any, BaseException | None]:
    """What a task returned, or what it raised; ConnectionError if the scheduler no longer knows of it.

    A result that has been lost with its worker since it was announced is waited for until it is computed again.
    """
    from concurrent.futures import CancelledError

    try:
        return future.result(), None
    except (CancelledError, OSError) as error:
        if future.status != "error":
            raise ConnectionError("the scheduler has gone, or has dropped the tasks under way") from error
        return None, error
    except Exception as error:  # of any kind: it was raised on a worker
        return None, error


def _reason(error: BaseException) -> str:
    """Why a model or layer has no figures, on one line."""
    if _is_fatal(error):
        return "worker after worker died while it was computed: for want of memory, most likely"
    return " ".join(str(error).split()) or type(error).__name__


def _is_fatal(error: BaseException) -> bool:
    """Whether a task was given up because worker after worker died of it."""
    from distributed import KilledWorker

    return isinstance(error, KilledWorker)


def _check_client(client: object) -> None:
    try:
        from distributed import Client
    except ModuleNotFoundError as error:
        raise TypeError(f"client: a distributed.Client needs {error.name}: pip install 'convsv[many]'") from None
    if not isinstance(client, Client):
        raise TypeError(f"client is a {type(client).__module__}.{type(client).__qualname__}: wanted distributed.Client")
    if client.asynchronous:
        raise TypeError("client is asynchronous: wanted one made without asynchronous=True")
