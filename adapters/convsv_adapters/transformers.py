"""Operator norms in the Hugging Face Trainer: a callback that projects after optimizer steps.

>>> projection = OperatorNormProjection(bound=1.0)    # Trainer(..., callbacks=[projection])
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from convsv_adapters.torch._callback import CallbackProjection

__all__ = ["OperatorNormProjection"]


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
        if logs is None:
            return
        norms = self.logged_norms()
        logs.update(norms)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(norms)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Project the final weights, unless the last step did so."""
        self.running.finish()
