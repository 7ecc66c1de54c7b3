"""Whether the gradients of a step are finite, told without a GPU being waited for."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor


class GradientCheck:
    """The gradients' norm and the loss of a step, on their way from the device to the host.

    Args:
        step: its number, from 1.
        norm: of the gradients, ().
        loss: ().
    """

    def __init__(self, step: int, norm: Tensor, loss: Tensor) -> None:
        self.step = step
        both = torch.stack([norm.detach().float(), loss.float()])
        on_gpu = both.device.type == "cuda"
        self._values = torch.empty(2, pin_memory=on_gpu).copy_(both, non_blocking=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        if self._copied is not None:
            self._copied.record()

    @property
    def values(self) -> tuple[float, float]:
        """Norm of the gradients, and loss."""
        if self._copied is not None:
            self._copied.synchronize()
        norm, loss = self._values.tolist()
        return norm, loss

    @property
    def finite(self) -> bool:
        """Whether the gradients were: they are not if the loss is not."""
        return math.isfinite(self.values[0])

    def require_finite(self) -> None:
        """Raise FloatingPointError, with norm and loss, if the gradients were not finite."""
        if not self.finite:
            raise FloatingPointError(
                f"{self}; no checkpoint holds it: go on from the newest with --ckpt_path last and a lower "
                "--model.optimizer.lr, or leave out such steps with --model.on_non_finite skip"
            )

    def __str__(self) -> str:
        norm, loss = self.values
        return f"step {self.step} is not finite: loss {loss:g}, norm of the gradients {norm:g}"


class GradientWatch:
    """Looks at each step's gradients, and stops the run, or leaves the step out, where they are not finite.

    Args:
        on_non_finite: what to do: "stop" the run, or "skip" the step.
    """

    def __init__(self, on_non_finite: Literal["stop", "skip"]) -> None:
        self.on_non_finite = on_non_finite
        self._unread: GradientCheck | None = None

    def look(self, step: int, norm: Tensor, loss: Tensor, parameters: Iterable[Tensor]) -> None:
        """Look at the norm of the gradients of a step, before the optimizer moves the parameters.

        Raises:
            FloatingPointError: if it is not finite in this step (on a GPU: in the one before), and the run is to stop.
        """
        check = GradientCheck(step, norm, loss)
        if self.on_non_finite == "skip":
            if not check.finite:
                print(f"{check}; skipped", flush=True)
                for p in parameters:
                    p.grad = None  # an optimizer leaves alone what has no gradient
        elif norm.device.type == "cpu":
            check.require_finite()
        else:
            # To read it now, the GPU would have to be waited for. The one before is there by now.
            self.require_finite()
            self._unread = check

    def require_finite(self) -> None:
        """Raise FloatingPointError if a step so far was not finite: to be called before its weights are kept."""
        check, self._unread = self._unread, None
        if check is not None:
            check.require_finite()
