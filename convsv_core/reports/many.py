"""The figures of many models, computed on the workers of a `dask.distributed` cluster."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from convsv_core.layers import ReadOptions
from convsv_core.plugins import get_backend, one_line
from convsv_core.reports import tasks
from convsv_core.reports.live_models import COMPUTING_FAILS
from convsv_core.reports.report import BOUNDS, Bounds, LayerReport, ModelReport

if TYPE_CHECKING:
    from distributed import Client

Future: TypeAlias = Any
"""A `distributed.Future`."""

__all__ = ["ROUNDS", "SECONDS_PER_TASK", "analyze_many"]

TASKS_PER_THREAD = 8
"""Number of tasks under way for each thread of the cluster. A guess: enough that no thread waits for the client.

The client holds no more than these tasks.
"""

SECONDS_PER_TASK = 1.0
"""Duration, in seconds, of a task that small models are packed into, where there are enough models. A guess."""

ROUNDS = 4
"""Least number of tasks that each thread has left when models are packed, so that all threads end together. A guess."""

SECONDS_BETWEEN_COUNTS = 2.0
"""Time, in seconds, after which the threads of the cluster are counted anew, as workers come and go. A guess."""


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
        A client of the cluster, whose workers have `convsv` installed; not an asynchronous client.
    options : ReadOptions, optional
        Facts that the files may leave open, such as the input's shape; the same for all files.
    backend : str, default "numpy"
        Name of the library that workers compute with.
    bounds : {"none", "upper", "both"}, default "upper"
        Which bounds of the norm with the layer's own padding to certify.
    dtype, device : str, optional
        As for `convsv_core.reports.layer_reports`.

    Yields
    ------
    ModelReport
        One report a path, in the order of `paths`. A file that cannot be read has a report that says why.

    Raises
    ------
    TypeError
        `client` is no client, or an asynchronous client.
    ValueError
        There is no such backend, or no such `bounds`.
    ConnectionError
        The scheduler has gone.
    Exception
        An error that kept a worker from running a task at all, such as a worker that lacks `convsv`.

    Notes
    -----
    Small layers and models are packed into tasks of about a second. A large layer is split into blocks of
    frequencies, whose values are put together on a worker. The client holds only what is under way, whatever the
    number of models. The engine runs the tasks of a lost worker again. All figures are computed in one thread, and
    layers are cut in the same places. The bits of the figures therefore do not depend on the number of workers or on
    lost workers. They may depend on the make of the processors, for which BLAS has different kernels. Quantiles are
    those of all singular values, whether a layer was split or not.

    If the iterator is closed before its end, the tasks under way are cancelled. Neither traceable nor
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
    task_options = tasks.TaskOptions(options or ReadOptions(), backend, bounds, dtype, device)
    return _Run(client, [Path(path) for path in paths], task_options).reports()


@dataclass(eq=False)
class _Model:
    """A model under way: its reports so far, and the number of tasks that are still to bring some."""

    order: int
    path: Path
    reports: list[LayerReport | None] = field(default_factory=list)
    waiting: int = 1
    failure: str = ""

    @property
    def absolute(self) -> Path:
        return Path(os.path.abspath(self.path))

    def report(self) -> ModelReport:
        if self.failure:
            return ModelReport(self.path, [], self.failure)
        return ModelReport(self.path, [report for report in self.reports if report is not None])


class _Run:
    """The client's side of one call: the tasks under way, in the order of the models."""

    def __init__(self, client: Client, paths: list[Path], options: tasks.TaskOptions) -> None:
        from distributed import as_completed

        self._client = client
        self._options = options
        self._left = deque(_Model(order, path) for order, path in enumerate(paths))
        self._window: deque[_Model] = deque()
        self._splits: deque[tuple[_Model, tasks.Split]] = deque()
        self._completed = as_completed(loop=client.loop)
        self._handlers: dict[Any, tuple[Future, Callable[[Future], None], int]] = {}
        self._under_way = 0
        self._threads, self._counted = 1, -float("inf")
        self._seconds = self._surveyed_models = 0.0

    def reports(self) -> Generator[ModelReport]:
        """Submit tasks and yield the models that are done, until no model is left."""
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
                with contextlib.suppress(Exception):  # The error that led here is more useful.
                    self._client.cancel([future for future, *_ in self._handlers.values()])

    # ---- submitting ------------------------------------------------------------------------------------

    def _submit(self) -> None:
        """Submit tasks until enough are under way, earlier models first."""
        while self._under_way < (most := TASKS_PER_THREAD * self._count_threads()):
            if self._splits:
                self._submit_blocks(*self._splits.popleft())
            elif self._left and len(self._window) < 2 * most * self._models_per_task():  # The first may take long.
                models = [self._left.popleft() for _ in range(self._pack_size())]
                self._window.extend(models)
                self._submit_survey(models)
            else:
                return

    def _submit_survey(self, models: list[_Model]) -> None:
        paths = [model.absolute for model in models]
        self._start(models[0], self._take_survey, models, tasks.survey, paths, self._options)

    def _submit_blocks(self, model: _Model, split: tasks.Split) -> None:
        """Submit the blocks of one layer, whose values stay on the workers until they have been put together."""
        layer = self._task(model, tasks.load, model.absolute, split.index, self._options)
        prepared = self._task(model, tasks.prepare, layer, self._options)
        bounded = self._task(model, tasks.bound, layer, self._options)
        values = self._client.map(
            tasks.block_values, list(split.blocks), prepared=prepared, pure=False, priority=-model.order
        )
        take = functools.partial(self._take_layer, split=split)
        self._start(model, take, model, tasks.combine, bounded, prepared, values, weight=len(values) + 4)

    def _start(self, first: _Model, handle: Callable[..., None], subject: object, *task: Any, weight: int = 1) -> None:
        """Submit a task, and note that `handle` takes its result."""
        future = self._task(first, *task)
        self._handlers[future.key] = (future, functools.partial(handle, subject), weight)
        self._under_way += weight
        self._completed.add(future)

    def _task(self, model: _Model, function: Callable[..., Any], *arguments: Any) -> Future:
        return self._client.submit(function, *arguments, pure=False, priority=-model.order)

    def _models_per_task(self) -> int:
        """Return how many models make a task of `SECONDS_PER_TASK`, by the times of the models that are done."""
        return max(1, int(SECONDS_PER_TASK * self._surveyed_models / max(self._seconds, 1e-9)))

    def _pack_size(self) -> int:
        """Return how many models to put into the next task."""
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
                raise error  # No task of any model would fare better.
            if len(models) > 1:  # Survey each model alone, to find the one that failed.
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
                self._start(model, take, model, tasks.measure, model.absolute, pack, self._options)
            self._splits.extend((model, split) for split in survey.splits)
            self._finish(model, survey.failure)

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
            model.reports[split.index] = split.report.with_note(_reason(error))
        else:
            self._finish(model, f"{split.report.name}: {_reason(error)}")
            return
        self._finish(model)

    def _finish(self, model: _Model, failure: str = "") -> None:
        model.waiting -= 1
        model.failure = model.failure or failure


def _outcome(future: Future) -> tuple[Any, BaseException | None]:
    """Return the result of a task, or its error. Raises ConnectionError if the scheduler no longer knows the task.

    A result can be lost with its worker after it was announced. The call then waits until it is computed again.
    """
    from concurrent.futures import CancelledError

    try:
        return future.result(), None
    except (CancelledError, OSError) as error:
        if future.status != "error":
            raise ConnectionError("the scheduler has gone, or has dropped the tasks under way") from error
        return None, error
    except Exception as error:  # A worker can raise any kind of error.
        return None, error


def _reason(error: BaseException) -> str:
    """Return on one line why a model or layer has no figures."""
    if _is_fatal(error):
        return "worker after worker died while it was computed: for want of memory, most likely"
    return one_line(error)


def _is_fatal(error: BaseException) -> bool:
    """Return whether a task was given up because worker after worker died of it."""
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
