"""Muon for convolutions, AdamW for all other parameters: each step learns more, which helps when a run has few steps.

Sources: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; for the scale of the update, Liu et al.
2025, "Muon is Scalable for LLM Training", section 2.2.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW


def orthogonalize(matrices: Sequence[Tensor], iterations: int = 5) -> list[Tensor]:
    """Push all singular values of each matrix towards 1 by a Newton-Schulz iteration: (rows, columns) each -> same shapes.

    The coefficients of the quintic polynomial are Jordan's. After five iterations, every singular value that was not tiny lies
    between about 0.7 and 1.2. Each iteration multiplies x by a polynomial of x x^T. So the iterations work on x x^T, a small
    square matrix, for many x at once. At the end, x is multiplied once, by the product of the polynomials.
    """
    wide = [x if x.shape[0] <= x.shape[1] else x.mT for x in matrices]
    results = by_size(wide, iterations) if wide[0].device.type == "cpu" else in_one_batch(wide, iterations)
    return [x if x.shape == m.shape else x.mT for x, m in zip(results, matrices, strict=True)]


def by_size(wide: Sequence[Tensor], iterations: int) -> list[Tensor]:
    """Orthogonalize wide matrices, grouped by their number of rows. This needs the fewest operations, so it suits a CPU."""
    sizes: dict[int, list[int]] = defaultdict(list)
    for n, x in enumerate(wide):
        sizes[len(x)].append(n)
    results = list(wide)
    for members in sizes.values():
        factors = newton_schulz(torch.stack([wide[n] @ wide[n].mT for n in members]), iterations)
        for n, factor in zip(members, factors, strict=True):
            results[n] = factor @ wide[n]
    return results


def in_one_batch(wide: Sequence[Tensor], iterations: int) -> list[Tensor]:
    """Orthogonalize wide matrices in one batch, padded with zeros, which stay zero.

    This needs the fewest kernel launches, so it suits a GPU.
    """
    batch = wide[0].new_zeros(len(wide), max(x.shape[0] for x in wide), max(x.shape[1] for x in wide))
    places = [whole[: x.shape[0], : x.shape[1]] for whole, x in zip(batch, wide, strict=True)]
    for place, x in zip(places, wide, strict=True):
        place.copy_(x)
    batch.copy_(newton_schulz(batch @ batch.mT, iterations) @ batch)
    return places


def newton_schulz(gram: Tensor, iterations: int) -> Tensor:
    """Return the factor that orthogonalizes each x, computed from its x x^T: (n, size, size) -> same shape."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # The squared Frobenius norm of x is the trace of x x^T.
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].sqrt() + 1e-7
    gram, product = gram / norm**2, identity / norm
    for _ in range(iterations):
        polynomial = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        gram = polynomial @ gram @ polynomial
        product = polynomial @ product
    return product


class Muon(AdamW):
    """Muon for the weights of convolutions, which move along their orthogonalised momentum; AdamW for all other parameters.

    Muon treats a convolution's weight (out, in, height, width) as a matrix (out, in * height * width). It scales the update to
    the typical size of AdamW's update, so one learning rate and one weight decay work for both.

    Args:
        params: the parameters to optimise.
        lr: learning rate of both.
        betas: AdamW's two decay rates.
        weight_decay: decoupled weight decay of both.
        momentum: Muon's momentum (Nesterov's), at least 0 and less than 1.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 8e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        momentum: float = 0.95,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and less than 1, got {momentum}")
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of Muon and one of AdamW."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            kernels = [p for p in group["params"] if p.dim() == 4 and p.grad is not None]
            if kernels:
                self._move(kernels, group["lr"], group["weight_decay"])
            for p in kernels:
                p.grad = None  # AdamW skips parameters without a gradient
        super().step()
        return loss

    def _move(self, kernels: list[Tensor], lr: float, weight_decay: float) -> None:
        gradients = [p.grad for p in kernels if p.grad is not None]
        for p in kernels:
            if p not in self.state:
                # AdamW expects a step count in every state that it loads.
                self.state[p] = {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
            self.state[p]["step"] += 1
        momenta = [self.state[p]["momentum"] for p in kernels]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        nesterov = torch._foreach_lerp(gradients, momenta, self.momentum)
        updates = orthogonalize([update.flatten(1) for update in nesterov])
        torch._foreach_mul_(updates, [0.2 * max(update.shape) ** 0.5 for update in updates])
        torch._foreach_mul_(kernels, 1 - lr * weight_decay)
        torch._foreach_add_(kernels, [u.view(p.shape) for u, p in zip(updates, kernels, strict=True)], alpha=-lr)
