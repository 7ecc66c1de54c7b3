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
from flowmatch_mnist.generate import Flow, Sampler, churn_noise
from flowmatch_mnist.guidance import drop_labels
from flowmatch_mnist.meanflow import MeanFlow
from flowmatch_mnist.models import KEY, find, take_up
from flowmatch_mnist.network import Network
from flowmatch_mnist.paths import PATHS, PathName
from flowmatch_mnist.times import LogitNormal, TimeDensity, fixed_times
from flowmatch_mnist.weighting import WeightingName, loss_weight

INTERVALS = 5
"""Into how many equal intervals of t the validation loss is split."""

Decay = Literal["cosine", "linear", "constant"]
LossName = Literal["squared", "huber", "charbonnier"]

HUBER = 0.01
"""Below this root mean square of a sample's errors, the loss called huber is nearly quadratic; charbonnier, of an error."""


def reduce(error: Tensor, loss: LossName) -> Tensor:
    """The loss of each sample: error (B, ...) -> (B,).

    `squared` is the mean square, whose minimum is the mean: right for velocities, where the mean is what is asked for. `huber`
    is the pseudo-Huber distance, sqrt(mean square + c^2) - c, by which a sample that is far off does not outweigh the many that
    are nearly right: for errors that should vanish. Source: Song and Dhariwal 2023, "Improved Techniques for Training
    Consistency Models", section 3.3. `charbonnier` is the same of each pixel by itself, mean(sqrt(error^2 + c^2) - c), whose
    minimum is near the median: where it is open whether there is ink, it takes the likelier in place of a grey. Source: Lai et
    al. 2017, "Deep Laplacian Pyramid Networks for Fast and Accurate Super-Resolution", section 3.2.
    """
    squares = error.square().flatten(1)
    if loss == "huber":
        squares = squares.mean(1, keepdim=True)
    losses = squares if loss == "squared" else torch.sqrt(squares + HUBER**2) - HUBER
    return losses.mean(1)


def learning_rate_factor(step: int, warmup_steps: int, total_steps: int, decay: Decay) -> float:
    """What the learning rate is multiplied by at `step`: a linear rise to 1, then a fall to 0 (or none) by `total_steps`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[decay]


def is_logged(trainer: Trainer, step: int) -> bool:
    """Whether the logger takes in what optimizer step number `step`, counted from 1, logs."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step % every == 0


class Reading:
    """What a step saw, on its way from the device to the host."""

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

    def check(self) -> None:
        """Raise FloatingPointError, with what was seen, if the gradients were not finite."""
        if not self.finite:
            raise FloatingPointError(
                f"{self}; no checkpoint holds it: go on from the newest with --ckpt_path last and a lower "
                "--model.optimizer.lr, or leave out such steps with --model.on_non_finite skip"
            )

    def __str__(self) -> str:
        norm, loss = self.values
        return f"step {self.step} is not finite: loss {loss:g}, norm of the gradients {norm:g}"


class FlowMatching(LightningModule):
    """Trains a network f(x, t, y) from which follows the velocity dx/dt that carries noise to the data of class y.

    Args:
        net: the network.
        path: from noise to data: linear, cosine or vp.
        prediction: what the network puts out: velocity, data or noise.
        times: where in (0, 1) the training looks.
        weighting: the name of a training whose weight at each signal-to-noise ratio the loss should have, see `weighting`;
            by default the squared error of the prediction is taken as it is.
        loss: squared, huber or charbonnier, see `reduce`; validation's is always squared.
        mean_flow: how to learn mean velocities too, for sampling in one step; by default they are not learned.
        start: trained weights to begin with, a file or a name of weights in the package; by default they are drawn at random.
        label_dropout: probability that a sample is trained without its label, in [0, 1]; guidance needs some.
        optimizer: what makes the optimizer from the parameters.
        warmup_steps: optimizer steps over which the learning rate rises.
        decay: how the learning rate falls from there to the run's end.
        sampler: how digits are drawn: by the callbacks, and by `predict`.
        compile: whether training steps run through `torch.compile`. It takes a minute or so, and pays in longer runs.
        channels_last: whether images and weights are laid out channels last, which suits GPUs and compiled code.
        on_non_finite: what to do in a step whose gradients are not all finite: "stop" the run, or "skip" the step.
        seed: of times, label dropout and the network's own dropout; the command line sets it from `seed_everything`.

    Attributes:
        last_loss: of the last training batch, (), on the device.

    Raises:
        ValueError: if a number is out of its range.
    """

    last_loss: Tensor

    def __init__(
        self,
        net: Network,
        path: PathName = "linear",
        prediction: Prediction = "velocity",
        times: TimeDensity | None = None,
        weighting: WeightingName | None = None,
        loss: LossName = "squared",
        mean_flow: MeanFlow | None = None,
        start: str | None = None,
        label_dropout: float = 0.1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 100,
        decay: Decay = "cosine",
        sampler: Sampler | None = None,
        compile: bool = False,
        channels_last: bool = False,
        on_non_finite: Literal["stop", "skip"] = "stop",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout must lie in [0, 1], got {label_dropout}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        if mean_flow is not None and (not net.spans or (path, prediction) != ("linear", "velocity")):
            raise ValueError("mean velocities need a network with spans, the linear path, and prediction velocity")
        self.net = net.to(memory_format=torch.channels_last) if channels_last else net
        self.path: PathName = path
        self.prediction: Prediction = prediction
        self.times = times or LogitNormal()
        self.weighting: WeightingName | None = weighting
        self.loss_name: LossName = loss
        self.mean_flow = mean_flow
        self.start = start
        self.label_dropout = label_dropout
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.decay: Decay = decay
        self.sampler = sampler or Sampler()
        self.compiles = compile
        self.on_non_finite = on_non_finite
        self.seed = seed
        self._unread: Reading | None = None
        self.flow.check(self.sampler)

    @property
    def flow(self) -> Flow:
        """The network, and how to read what it puts out."""
        return Flow(self.net, self.path, self.prediction)

    def setup(self, stage: str) -> None:
        """Take up the weights to begin with. Those of a checkpoint come later, and overrule them."""
        if stage == "fit" and self.start is not None:
            take_up(self.net, find(self.start))

    def on_fit_start(self) -> None:
        """Load the teacher, and compile in place, which leaves the names of the weights as they are."""
        if self.mean_flow is not None:
            self.mean_flow.prepare(self.net.shape, self.net.no_label, self.device)
        if self.compiles:
            self.net.compile()

    def error(self, x0: Tensor, x1: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """What the network's prediction at x_t lacks: x0, x1 (B, ...), y and t (B,) -> (B, ...)."""
        path = PATHS[self.path]
        x_t, aim = path.point(x0, x1, t), target(self.prediction, path, x0, x1, t)
        if not self.training:
            # Only training goes through compiled code: another batch size, without gradients, would be compiled anew.
            return self.net.forward(x_t, t, y) - aim
        if self.mean_flow is None:
            return self.net(x_t, t, y) - aim
        u = streams.place(self.trainer).uniform((len(y), 2), self.device, self.seed, "spans")
        return self.mean_flow.error(self.net, x_t, aim, t, y, self.mean_flow.ends(t, u))

    def training_step(self, batch: Pairs, batch_idx: int) -> Tensor:
        """Draw the times, drop some labels, and return the mean loss of the batch."""
        x0, x1, y = batch
        place = streams.place(self.trainer)
        t = place.draw(self.times.sample, len(y), self.device, self.seed, "times")
        u = place.uniform(y.shape, self.device, self.seed, "labels")
        labels = drop_labels(y, self.label_dropout, self.net.no_label, u)
        # What the network draws itself, for dropout, comes from PyTorch's own generators. To seed those of GPUs that are not
        # there costs a millisecond.
        seed = torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed
        seed(streams.seed(self.seed, "network", place.step, place.rank))
        losses = reduce(self.error(x0, x1, labels, t), self.loss_name)
        if self.weighting is not None:
            losses = losses * loss_weight(self.weighting, self.prediction, PATHS[self.path], self.times, t)
        loss = losses.mean()
        self.last_loss = loss.detach()
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at the norm of the gradients, before clipping; in a step that is logged, log it, the loss and the learning rate.

        Raises:
            FloatingPointError: if it is not finite in this step (on a GPU: in the one before), and the run is to stop.
        """
        self._norm = norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        step = self.trainer.global_step + 1
        if is_logged(self.trainer, step):  # to hand Lightning what it would not log costs a millisecond
            self.log("loss/train", self.last_loss, prog_bar=True)
            self.log("optimizer/gradient_norm", norm)
            self.log("optimizer/learning_rate", optimizer.param_groups[0]["lr"])
        reading = Reading(step, norm, self.last_loss)
        if self.on_non_finite == "skip":
            if not reading.finite:
                print(f"{reading}; skipped", flush=True)
                for p in self.parameters():
                    p.grad = None  # an optimizer leaves alone what has no gradient
        elif norm.device.type == "cpu":
            reading.check()
        else:
            # To read it now, the GPU would have to be waited for. The one before is there by now.
            self.check_finite()
            self._unread = reading

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients as the trainer asks for; by their norm, which was just taken, and costs a millisecond on a CPU."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, self._norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def check_finite(self) -> None:
        """See to it that all steps so far were finite: to be called before their weights are kept.

        Raises:
            FloatingPointError: if one was not.
        """
        reading, self._unread = self._unread, None
        if reading is not None:
            reading.check()

    def validation_step(self, batch: Pairs, batch_idx: int) -> None:
        """Log the loss on fixed noise and times, over all t and by intervals of t."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Pairs, batch_idx: int) -> None:
        """Log the loss on the test set, as in validation."""
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: Pairs, batch_idx: int, split: str) -> None:
        x0, x1, y = batch
        if not len(y):
            return  # the last of the global batches may be too small to give every process a sample
        # The places of this process's share in the global batch, see data.Batches.
        positions = torch.arange(len(y), device=self.device) * self.trainer.world_size + self.global_rank
        first, last = self.times.support
        t = first + (last - first) * fixed_times(batch_idx, positions)
        losses = reduce(self.error(x0, x1, y, t), "squared")
        self.log(f"loss/{split}", losses.mean(), prog_bar=split == "val", batch_size=len(y), sync_dist=True)
        for i in range(int(first * INTERVALS), math.ceil(last * INTERVALS)):
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
        # A fused optimizer offers to unscale the gradients of fp16 in its step, whereupon Lightning refuses to clip them,
        # though bf16 scales none. Without the offer they are unscaled before they are clipped.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]

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
