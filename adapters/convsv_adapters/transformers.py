"""Operator norms in the Hugging Face Trainer: callbacks that project, or measure, after optimizer steps.

>>> projection = OperatorNormProjection(bound=1.0)    # Trainer(..., callbacks=[projection])
>>> monitor = SpectrumMonitor(every=100, log="norms.csv")    # Trainer(..., callbacks=[monitor]); it changes nothing
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from convsv_adapters.torch._callback import CallbackMonitor, CallbackProjection

__all__ = ["OperatorNormProjection", "SpectrumMonitor"]


class OperatorNormProjection(CallbackProjection, TrainerCallback):  # type: ignore[misc]
    """Project a model's convolutions onto the kernels of norm at most a bound, after optimizer steps of the Trainer.

    Parameters
    ----------
    bound, every, **options
        As for `convsv_adapters.torch.project_after_step`. There is one more projection at the end of training.
    log : bool, default True
        Add each projected layer's certified norm to the entries of the log, as ``operator_norm/NAME``.

    Attributes
    ----------
    projection : StepProjection or None
        The projection of the running or last training.

    Notes
    -----
    Under `DistributedDataParallel` the ranks share the work. FSDP1 and DeepSpeed's ZeRO-3 get a TypeError.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        **kwargs: Any,
    ) -> None:
        """Find the layers."""
        self.begin(model, **({"process_group": torch.distributed.group.WORLD} if args.world_size > 1 else {}))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Project if it is due."""
        self.running.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the norms to the log's entry."""
        _add_to_log(self.logged_norms(), state, logs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Project the final weights, unless the last step did so."""
        self.running.finish()


class SpectrumMonitor(CallbackMonitor, TrainerCallback):  # type: ignore[misc]
    """Measure a model's convolutions after every so many optimizer steps of the Trainer, and change nothing.

    Parameters
    ----------
    example_input, every, log, **options
        As for `convsv_adapters.torch.SpectrumMonitor`. There is one more measurement at the end of training. The
        numbers of the last measurement are also added to the entries of the Trainer's log, as ``certified_norm/NAME``
        and so on.

    Attributes
    ----------
    monitor : convsv_adapters.torch.SpectrumMonitor or None
        The monitor of the running or last training, with its `measurements` and its method `plot`.

    Notes
    -----
    In a distributed training rank 0 measures. FSDP1 and DeepSpeed's ZeRO-3 get a TypeError.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        **kwargs: Any,
    ) -> None:
        """Find the layers."""
        self.begin(model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if it is due."""
        self.running.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the numbers to the log's entry."""
        _add_to_log({} if self.monitor is None else self.monitor.numbers, state, logs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the final weights, unless the last step did so."""
        self.running.finish()


def _add_to_log(numbers: dict[str, float], state: TrainerState, logs: dict[str, float] | None) -> None:
    """Add numbers to an entry of the log, which the Trainer has already copied to its history."""
    if logs is None:
        return
    logs.update(numbers)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(numbers)
