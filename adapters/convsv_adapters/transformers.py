"""Operator norms in the Hugging Face Trainer: a callback that projects after optimizer steps.

>>> projection = OperatorNormProjection(bound=1.0)    # Trainer(..., callbacks=[projection])
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from convsv_adapters.torch import StepProjection

__all__ = ["OperatorNormProjection"]


class OperatorNormProjection(TrainerCallback):  # type: ignore[misc]
    """Project a model's convolutions onto those of norm at most a bound, after each optimizer step.

    Parameters
    ----------
    bound : float
        Largest operator norm, not negative.
    every : int, default 1
        Project after every so many optimizer steps, and once more at the end of training.
    log : bool, default True
        Add each projected layer's certified norm to what the Trainer logs, as ``operator_norm/NAME``.
    **options
        As for `convsv_adapters.torch.project_after_step`.

    Attributes
    ----------
    projection : StepProjection or None
        Of the training that runs, or ran last.

    Notes
    -----
    Under `DistributedDataParallel` the ranks share the work. FSDP1 and DeepSpeed's ZeRO-3 are refused by a
    TypeError.
    """

    def __init__(self, bound: float, every: int = 1, *, log: bool = True, **options: Any) -> None:
        self.bound, self.every, self.log, self.options = bound, every, log, options
        self.projection: StepProjection | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        **kwargs: Any,
    ) -> None:
        """Find the layers."""
        options = {"process_group": torch.distributed.group.WORLD} if args.world_size > 1 else {}
        self.projection = StepProjection(model, self.bound, self.every, **{**options, **self.options})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Project, where it is due."""
        assert self.projection is not None
        self.projection.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the norms to the log's entry."""
        if not self.log or self.projection is None or logs is None:
            return
        norms = {f"operator_norm/{name}": norm for name, norm in self.projection.norms.items()}
        logs.update(norms)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(norms)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Project the final weights, where the last step was not one to project after."""
        assert self.projection is not None
        if self.projection.steps % self.every:
            self.projection.project()
