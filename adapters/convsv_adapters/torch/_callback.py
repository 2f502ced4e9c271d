"""The part of a trainer's callback that does not depend on the trainer."""

from __future__ import annotations

from typing import Any

from torch import nn

from convsv_adapters.torch._project import StepProjection

__all__ = ["CallbackProjection"]


class CallbackProjection:
    """The projection of a callback, its options and the entries of its log: see `convsv_adapters.lightning`."""

    def __init__(self, bound: float | None = None, every: int = 1, *, log: bool = True, **options: Any) -> None:
        super().__init__()
        self.bound, self.every, self.log, self.options = bound, every, log, options
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
        """Return the entries of the log; none if `log` is false or before the first projection."""
        if not self.log or self.projection is None:
            return {}
        return {f"operator_norm/{name}": norm for name, norm in self.projection.norms.items()}
