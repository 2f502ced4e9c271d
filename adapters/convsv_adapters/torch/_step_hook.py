"""The hook by which a projection or a monitor counts the steps of an optimizer."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["OptimizerHook", "check_optimizer"]


def check_optimizer(optimizer: object) -> None:
    """Raise TypeError unless the argument is an optimizer of PyTorch."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__qualname__}: wanted a torch.optim.Optimizer")


class OptimizerHook:
    """Base of classes whose method `step` is called after each step of one optimizer."""

    _handle: Any = None
    """The handle of the hook in the optimizer; None without one."""

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle takes along: not the hook, which belongs to the optimizer."""
        return {**self.__dict__, "_handle": None}

    def step(self) -> bool:
        """Count an optimizer step, do the work if it is due, and return whether it was."""
        raise NotImplementedError

    def remove(self) -> None:
        """Stop counting the optimizer's steps."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _follow_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """Call `step` after the steps of this optimizer, and no longer after the steps of another one."""
        self.remove()
        self._handle = optimizer.register_step_post_hook(lambda *_: self.step())
