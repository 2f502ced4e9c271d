"""The parts of a trainer's callbacks that do not depend on the trainer."""

from __future__ import annotations

from typing import Any

from torch import nn

from convsv_adapters._monitor import Log
from convsv_adapters.torch._monitor import SpectrumMonitor
from convsv_adapters.torch._project import StepProjection

__all__ = ["CallbackMonitor", "CallbackProjection"]


class CallbackProjection:
    """The projection of a callback, its options and the entries of its log: see `convsv_adapters.lightning`.

    No attribute is named `log`, which Lightning replaces by a method in every callback.
    """

    def __init__(self, bound: float | None = None, every: int = 1, *, log: bool = True, **options: Any) -> None:
        super().__init__()
        self.bound, self.every, self.logged, self.options = bound, every, log, options
        self.projection: StepProjection | None = None

    def begin(self, model: nn.Module, **defaults: Any) -> None:
        """Find the layers of a model; `defaults` are options for which the user has given no value."""
        self.projection = StepProjection(model, self.bound, self.every, **{**defaults, **self.options})

    @property
    def running(self) -> StepProjection:
        """The projection of the training, which has begun."""
        assert self.projection is not None
        return self.projection

    def logged_norms(self) -> dict[str, float]:
        """Return the entries of the log; none if `logged` is false or before the first projection."""
        if not self.logged or self.projection is None:
            return {}
        return {f"operator_norm/{name}": norm for name, norm in self.projection.norms.items()}


class CallbackMonitor:
    """The monitor of a callback, its options and the entries of its log: see `convsv_adapters.lightning`."""

    def __init__(self, example_input: object = None, every: int = 100, log: Log = None, **options: Any) -> None:
        super().__init__()
        self.example_input, self.every, self.places, self.options = example_input, every, log, options
        self.monitor: SpectrumMonitor | None = None

    def begin(self, model: nn.Module, example_input: object = None) -> None:
        """Find the layers of a model; `example_input` is for users who have given none."""
        example = example_input if self.example_input is None else self.example_input
        self.monitor = SpectrumMonitor(model, example, self.every, self.places, **self.options)

    @property
    def running(self) -> SpectrumMonitor:
        """The monitor of the training, which has begun."""
        assert self.monitor is not None
        return self.monitor
