"""Muon for convolutions, AdamW for all else: more learned from each step, which counts where steps are few.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the scale of the update from Liu et al.
2025, "Muon is Scalable for LLM Training", section 2.2.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Push all singular values of each matrix towards 1, by a Newton-Schulz iteration: (N, rows, columns) -> same shape.

    The quintic's coefficients are Jordan's: after five rounds every singular value that was not tiny lies in about 0.7 to 1.2.
    Each round multiplies x by a polynomial of x x^T. So the rounds are done on that small square matrix, and x itself is
    multiplied once, by their product: a third of the operations for a kernel of 96 by 1,728.
    """
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    identity = torch.eye(wide.shape[-2], dtype=x.dtype, device=x.device)
    gram, product = wide @ wide.mT, identity
    for _ in range(iterations):
        polynomial = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        gram = polynomial @ gram @ polynomial
        product = polynomial @ product
    wide = product @ wide
    return wide if x.shape[-2] <= x.shape[-1] else wide.mT


class Muon(AdamW):
    """AdamW, but for the weights of convolutions: those move along their orthogonalised momentum.

    A convolution's weight (out, in, height, width) counts as the matrix (out, in height width). Its update is scaled to the
    size that AdamW's typically has, so that one learning rate and one weight decay serve both.

    Args:
        params: what to optimise.
        lr: learning rate.
        betas: of AdamW.
        weight_decay: decoupled, of both.
        momentum: of Muon (Nesterov's).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 8e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            kernels = [p for p in group["params"] if p.dim() == 4 and p.grad is not None]
            for same_shape in by_shape(kernels):
                self._move(same_shape, group["lr"], group["weight_decay"])
            for p in kernels:
                p.grad = None  # AdamW leaves alone what has no gradient
        super().step()
        return loss

    def _move(self, kernels: list[Tensor], lr: float, weight_decay: float) -> None:
        gradients = [p.grad for p in kernels if p.grad is not None]
        for p in kernels:
            if p not in self.state:
                # AdamW expects a count of steps in every state that it loads.
                self.state[p] = {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
            self.state[p]["step"] += 1
        momenta = [self.state[p]["momentum"] for p in kernels]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        nesterov = torch._foreach_lerp(gradients, momenta, self.momentum)
        updates = orthogonalize(torch.stack([update.flatten(1) for update in nesterov]))
        scale = 0.2 * max(updates.shape[1:]) ** 0.5
        torch._foreach_mul_(kernels, 1 - lr * weight_decay)
        torch._foreach_add_(kernels, [u.view(p.shape) for u, p in zip(updates, kernels, strict=True)], alpha=-lr * scale)


def by_shape(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """The tensors in groups of equal shape, so that each group is one stack."""
    groups: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.shape].append(tensor)
    return groups.values()
