"""Checking that the gradients of all steps are finite, without waiting for a GPU in each step."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor


class GradientWatch:
    """Checks the gradients of each step. If they are not finite, it stops the run, or skips the step.

    On a GPU, this class notes the first such step on the GPU. The host reads the note when a step is logged or weights are
    saved, because the host would have to wait for the GPU if it read each step. To skip a step, the host must read each step.

    Args:
        on_non_finite: what to do: "stop" the run, or "skip" the step.
    """

    def __init__(self, on_non_finite: Literal["stop", "skip"]) -> None:
        self.on_non_finite = on_non_finite
        self._first: Tensor | None = None  # step, norm and loss of the first step that was not finite; step 0 means none

    def check(self, step: int, norm: Tensor, loss: Tensor, parameters: Iterable[Tensor], logged: bool, scaled: bool) -> None:
        """Check a step before the optimizer changes the parameters.

        Args:
            step: number of the step, counted from 1.
            norm: norm of the gradients, ().
            loss: loss of the step, ().
            parameters: the parameters with these gradients.
            logged: whether the step is logged; then the host waits for it anyway.
            scaled: whether a scaler scales the gradients, as in fp16. Then an overflow is no error: the scaler itself skips the
                step and lowers the scale. Only a loss that is not finite is an error.

        Raises:
            FloatingPointError: if the run must stop, and this step (on a GPU, any step since the last reading) is not finite.
        """
        norm, loss = norm.detach().float(), loss.detach().float()
        watched = loss if scaled else norm  # if the loss is not finite, the norm is not finite either
        if self.on_non_finite == "skip":
            if not math.isfinite(watched.item()):
                print(f"{describe(step, norm.item(), loss.item())}; skipped", flush=True)
                for p in parameters:
                    p.grad = None  # an optimizer does not change a parameter without a gradient
            return
        if self._first is None or self._first.device != norm.device:
            self._first = torch.zeros(3, device=norm.device)
        this = torch.stack([torch.full_like(norm, step), norm, loss])
        self._first = torch.where(watched.isfinite() | (self._first[0] > 0), self._first, this)
        if logged or norm.device.type == "cpu":
            self.require_finite()

    def require_finite(self) -> None:
        """Raise FloatingPointError if a step so far was not finite. Call this before saving weights."""
        if self._first is None:
            return
        step, norm, loss = self._first.tolist()
        if step:
            raise FloatingPointError(
                f"{describe(int(step), norm, loss)}; no checkpoint includes it: resume with --ckpt_path last and a lower "
                "--model.optimizer.lr, or skip such steps with --model.on_non_finite skip"
            )


def describe(step: int, norm: float, loss: float) -> str:
    """Return the message about a step that is not finite."""
    return f"step {step} is not finite: loss {loss:g}, norm of the gradients {norm:g}"
