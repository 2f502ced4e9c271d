"""Operator norms in Lightning's Trainer: a callback that projects after optimizer steps.

>>> projection = OperatorNormProjection(bound=1.0)    # Trainer(callbacks=[projection])
"""

from __future__ import annotations

from typing import Any

from convsv_adapters.torch import StepProjection

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    from pytorch_lightning import Callback, LightningModule, Trainer

__all__ = ["OperatorNormProjection"]


class OperatorNormProjection(Callback):  # type: ignore[misc]
    """Project a module's convolutions onto those of norm at most a bound, after each optimizer step.

    Parameters
    ----------
    bound : float
        Largest operator norm, not negative.
    every : int, default 1
        Project after every so many optimizer steps, and once more at the end of training.
    log : bool, default True
        Log each projected layer's certified norm as ``operator_norm/NAME``.
    **options
        As for `convsv_adapters.torch.project_after_step`.

    Attributes
    ----------
    projection : StepProjection or None
        Of the training that runs, or ran last.

    Notes
    -----
    Optimizer steps are counted by `Trainer.global_step`, so that batches whose gradients are accumulated, and steps
    that a gradient scaler skips where Lightning does not count them, are none. Under `DDPStrategy` the ranks share the
    work. `FSDPStrategy` is refused by a TypeError, as it makes flat parameters.
    """

    def __init__(self, bound: float, every: int = 1, *, log: bool = True, **options: Any) -> None:
        super().__init__()
        self.bound, self.every, self.log, self.options = bound, every, log, options
        self.projection: StepProjection | None = None
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers."""
        model = trainer.strategy.model or pl_module
        self.projection = StepProjection(model, self.bound, self.every, **self.options)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Project, where the batch ended in an optimizer step and it is due."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        assert self.projection is not None
        if self.projection.step() and self.log:
            pl_module.log_dict({f"operator_norm/{name}": norm for name, norm in self.projection.norms.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Project the final weights, where the last step was not one to project after."""
        assert self.projection is not None
        if self.projection.steps % self.every:
            self.projection.project()
