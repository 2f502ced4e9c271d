"""Operator norms in Lightning's Trainer: callbacks that project, or measure, after optimizer steps.

>>> projection = OperatorNormProjection(bound=1.0)    # Trainer(callbacks=[projection])
>>> monitor = SpectrumMonitor(every=100, log="norms.csv")    # Trainer(callbacks=[monitor]); it changes nothing
"""

from __future__ import annotations

from typing import Any

from convsv_adapters.torch._callback import CallbackMonitor, CallbackProjection

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    from pytorch_lightning import Callback, LightningModule, Trainer

__all__ = ["OperatorNormProjection", "SpectrumMonitor"]


class _StepCallback(Callback):  # type: ignore[misc]
    """Count the optimizer steps of a training, and finish what runs at its end."""

    _step = 0
    """`Trainer.global_step` after the last step that was counted."""

    def _is_new_step(self, trainer: Trainer) -> bool:
        """Tell whether there was an optimizer step since the last call, and count it."""
        if trainer.global_step == self._step:
            return False
        self._step = trainer.global_step
        return True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Treat the final weights, unless the last step did so."""
        self.running.finish()


class OperatorNormProjection(CallbackProjection, _StepCallback):
    """Project a model's convolutions onto the kernels of norm at most a bound, after optimizer steps of Lightning.

    Parameters
    ----------
    bound, every, **options
        As for `convsv_adapters.torch.project_after_step`. There is one more projection at the end of training.
    log : bool, default True
        Log each projected layer's certified norm as ``operator_norm/NAME``.

    Attributes
    ----------
    projection : StepProjection or None
        The projection of the running or last training.

    Notes
    -----
    Optimizer steps are counted by `Trainer.global_step`. So batches whose gradients are accumulated do not count, nor
    do steps that a gradient scaler skips where Lightning does not count them. Under `DDPStrategy` the ranks share the
    work. `FSDPStrategy` gets a TypeError, as it makes flat parameters.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers."""
        self.begin(trainer.strategy.model or pl_module)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Project if the batch ended in an optimizer step and a projection is due."""
        if self._is_new_step(trainer) and self.running.step() and self.logged:
            pl_module.log_dict(self.logged_norms())


class SpectrumMonitor(CallbackMonitor, _StepCallback):
    """Measure a model's convolutions after every so many optimizer steps of Lightning, and change nothing.

    Parameters
    ----------
    example_input, every, log, **options
        As for `convsv_adapters.torch.SpectrumMonitor`. By default the example is the module's `example_input_array`.
        There is one more measurement at the end of training. The numbers also go to the Trainer's logger, as
        ``certified_norm/NAME`` and so on.

    Attributes
    ----------
    monitor : convsv_adapters.torch.SpectrumMonitor or None
        The monitor of the running or last training, with its `measurements` and its method `plot`.

    Notes
    -----
    Optimizer steps are counted by `Trainer.global_step`, as `OperatorNormProjection` does. In a distributed training
    rank 0 measures. `FSDPStrategy` gets a TypeError, as it makes flat parameters.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers."""
        self.begin(trainer.strategy.model or pl_module, pl_module.example_input_array)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if the batch ended in an optimizer step and a measurement is due."""
        if self._is_new_step(trainer) and self.running.step() and trainer.is_global_zero:
            pl_module.log_dict(self.running.numbers, rank_zero_only=True)
