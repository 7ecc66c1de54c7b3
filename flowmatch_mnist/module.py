"""The LightningModule: it owns time. The data module brings pairs of noise and data; this asks the path for x_t and u_t.

Source: Lipman et al. 2022, "Flow Matching for Generative Modeling", equation 9 (the conditional flow-matching loss).
"""

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from flowmatch_mnist import streams
from flowmatch_mnist.convert import Prediction, target
from flowmatch_mnist.data import Pairs
from flowmatch_mnist.generate import KEY, Flow, Sampler, churn_noise
from flowmatch_mnist.guidance import drop_labels
from flowmatch_mnist.network import Network
from flowmatch_mnist.paths import PATHS, PathName
from flowmatch_mnist.times import LogitNormal, TimeDensity, fixed_times
from flowmatch_mnist.weighting import WeightingName, loss_weight

INTERVALS = 5
"""Into how many equal intervals of t the validation loss is split."""

Decay = Literal["cosine", "linear", "constant"]


def learning_rate_factor(step: int, warmup_steps: int, total_steps: int, decay: Decay) -> float:
    """What the learning rate is multiplied by at `step`: a linear rise to 1, then a fall to 0 (or none) by `total_steps`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[decay]


def is_logged(trainer: Trainer) -> bool:
    """Whether the logger takes in what this step logs."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return trainer.global_step % every == 0


class FlowMatching(LightningModule):
    """Trains a network f(x, t, y) from which follows the velocity dx/dt that carries noise to the data of class y.

    Args:
        net: the network.
        path: from noise to data: linear, cosine or vp.
        prediction: what the network puts out: velocity, data or noise.
        times: where in (0, 1) the training looks.
        weighting: the name of a training whose weight at each signal-to-noise ratio the loss should have, see `weighting`;
            by default the squared error of the prediction is taken as it is.
        label_dropout: probability that a sample is trained without its label, in [0, 1]; guidance needs some.
        optimizer: what makes the optimizer from the parameters.
        warmup_steps: optimizer steps over which the learning rate rises.
        decay: how the learning rate falls from there to the run's end.
        sampler: how digits are drawn: by the callbacks, and by `predict`.
        compile: whether training steps run through `torch.compile`. It takes a minute or so, and pays in longer runs.
        channels_last: whether images and weights are laid out channels last, which suits GPUs and compiled code.
        seed: of times and label dropout; the command line sets it from `seed_everything`.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        net: Network,
        path: PathName = "linear",
        prediction: Prediction = "velocity",
        times: TimeDensity | None = None,
        weighting: WeightingName | None = None,
        label_dropout: float = 0.1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 100,
        decay: Decay = "cosine",
        sampler: Sampler | None = None,
        compile: bool = False,
        channels_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout must lie in [0, 1], got {label_dropout}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        self.net = net.to(memory_format=torch.channels_last) if channels_last else net
        self.path: PathName = path
        self.prediction: Prediction = prediction
        self.times = times or LogitNormal()
        self.weighting: WeightingName | None = weighting
        self.label_dropout = label_dropout
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.decay: Decay = decay
        self.sampler = sampler or Sampler()
        self.compiles = compile
        self.seed = seed

    @property
    def flow(self) -> Flow:
        """The network, and how to read what it puts out."""
        return Flow(self.net, self.path, self.prediction)

    def on_fit_start(self) -> None:
        """Compile in place, which leaves the names of the weights as they are."""
        if self.compiles:
            self.net.compile()

    def loss(self, x0: Tensor, x1: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """The squared error of the prediction at x_t, averaged over pixels: x0, x1 (B, ...), y and t (B,) -> (B,)."""
        path = PATHS[self.path]
        # Only training goes through compiled code: another batch size, without gradients, would be compiled anew.
        net = self.net if self.training else self.net.forward
        error = net(path.point(x0, x1, t), t, y) - target(self.prediction, path, x0, x1, t)
        return error.square().flatten(1).mean(1)

    def training_step(self, batch: Pairs, batch_idx: int) -> Tensor:
        """Draw the times, drop some labels, and return the mean loss of the batch."""
        x0, x1, y = batch
        place = (streams.step(self.trainer), self.global_rank)
        t = self.times.sample(len(y), streams.generator(self.device, self.seed, "times", *place))
        labels = drop_labels(
            y, self.label_dropout, self.net.no_label, streams.generator(self.device, self.seed, "labels", *place)
        )
        losses = self.loss(x0, x1, labels, t)
        if self.weighting is not None:
            losses = losses * loss_weight(self.weighting, self.prediction, PATHS[self.path], self.times, t)
        loss = losses.mean()
        self.log("loss/train", loss, prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the learning rate and the norm of the gradients before clipping, in the steps that are logged at all."""
        if is_logged(self.trainer):
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            self.log("optimizer/gradient_norm", torch.nn.utils.get_total_norm(gradients))
            self.log("optimizer/learning_rate", optimizer.param_groups[0]["lr"])

    def validation_step(self, batch: Pairs, batch_idx: int) -> None:
        """Log the loss on fixed noise and times, over all t and by intervals of t."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Pairs, batch_idx: int) -> None:
        """Log the loss on the test set, as in validation."""
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: Pairs, batch_idx: int, split: str) -> None:
        x0, x1, y = batch
        # The places of this process's share in the global batch, see data.Batches.
        positions = torch.arange(len(y), device=self.device) * self.trainer.world_size + self.global_rank
        t = fixed_times(batch_idx, positions)
        losses = self.loss(x0, x1, y, t)
        self.log(f"loss/{split}", losses.mean(), prog_bar=split == "val", batch_size=len(y), sync_dist=True)
        for i in range(INTERVALS):
            inside = (t * INTERVALS).long() == i
            name = f"loss_by_time/{split} {i / INTERVALS:.1f} to {(i + 1) / INTERVALS:.1f}"
            mean = losses[inside].sum() / inside.sum().clamp(min=1)
            self.log(name, mean, batch_size=int(inside.sum()), sync_dist=True)

    def predict_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        """Draw samples: noise (B, *shape), labels (B,), and their numbers (B,) -> data (B, *shape), labels (B,)."""
        x0, y, numbers = batch
        draw = churn_noise(self.seed, numbers.tolist(), self.net.shape, self.device) if self.sampler.churn else None
        *_, x1 = self.flow.states(self.flow.guided(y, self.sampler), x0, self.sampler, draw=draw)
        return x1, y

    def configure_optimizers(self) -> Any:
        """The optimizer, with warm-up and decay of its learning rate counted in steps."""
        optimizer = self.optimizer(self.parameters())

        def factor(step: int) -> float:
            # Asked for at the first step, not here: that would load the data before a resumed run has its place in them.
            total_steps = int(self.trainer.estimated_stepping_batches) if step else 1
            return learning_rate_factor(step, self.warmup_steps, total_steps, self.decay)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint what its weights are of, so that `sample.py` needs no config."""
        data = getattr(self.trainer, "datamodule", None)
        pixels = {} if data is None else {"pixels": data.pixels}
        checkpoint[KEY] = self.flow.describe(self.sampler) | pixels
