"""Whether the gradients of all steps were finite, found out without making a GPU wait."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor


class GradientWatch:
    """Looks at each step's gradients, and stops the run, or leaves the step out, where they are not finite.

    On a GPU the first such step is noted there, and read when the step is logged, or its weights are kept: to read each step
    would make the host wait for it. To skip a step, the host must know, so it waits.

    Args:
        on_non_finite: what to do: "stop" the run, or "skip" the step.
    """

    def __init__(self, on_non_finite: Literal["stop", "skip"]) -> None:
        self.on_non_finite = on_non_finite
        self._first: Tensor | None = None  # step, norm and loss of the first step that was not finite; step 0 is none

    def look(self, step: int, norm: Tensor, loss: Tensor, parameters: Iterable[Tensor], logged: bool, scaled: bool) -> None:
        """Look at a step before the optimizer moves the parameters.

        Args:
            step: its number, from 1.
            norm: of the gradients, ().
            loss: ().
            parameters: whose gradients they are.
            logged: whether the step is logged, so that the host waits for it anyway.
            scaled: whether the gradients of fp16 are scaled. Then an overflow is no fault: the scaler leaves the step out by
                itself, and lowers the scale; only a loss that is not finite is one.

        Raises:
            FloatingPointError: if this step (on a GPU, one since the last that was read) is not finite, and the run is to stop.
        """
        norm, loss = norm.detach().float(), loss.detach().float()
        watched = loss if scaled else norm  # the norm is not finite if the loss is not
        if self.on_non_finite == "skip":
            if not math.isfinite(watched.item()):
                print(f"{describe(step, norm.item(), loss.item())}; skipped", flush=True)
                for p in parameters:
                    p.grad = None  # an optimizer leaves alone what has no gradient
            return
        if self._first is None or self._first.device != norm.device:
            self._first = torch.zeros(3, device=norm.device)
        this = torch.stack([torch.full_like(norm, step), norm, loss])
        self._first = torch.where(watched.isfinite() | (self._first[0] > 0), self._first, this)
        if logged or norm.device.type == "cpu":
            self.require_finite()

    def require_finite(self) -> None:
        """Raise FloatingPointError if a step so far was not finite: to be called before its weights are kept."""
        if self._first is None:
            return
        step, norm, loss = self._first.tolist()
        if step:
            raise FloatingPointError(
                f"{describe(int(step), norm, loss)}; no checkpoint holds it: go on from the newest with --ckpt_path last and a "
                "lower --model.optimizer.lr, or leave out such steps with --model.on_non_finite skip"
            )


def describe(step: int, norm: float, loss: float) -> str:
    """What is said of a step that is not finite."""
    return f"step {step} is not finite: loss {loss:g}, norm of the gradients {norm:g}"
