"""The LightningModule: it owns time. The data module brings pairs of noise and data; this draws t, and takes the loss.

The loss itself is in `flow/loss.py`, and needs no Lightning.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from flowmatch_mnist.data.pairs import Pairs, PairsDataModule, place_of
from flowmatch_mnist.flow.exact import ExactField
from flowmatch_mnist.flow.loss import FlowLoss, reduce
from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.flow.times import fixed_times
from flowmatch_mnist.networks.base import Network
from flowmatch_mnist.sampling.generate import Flow, Sampler, churn_noise
from flowmatch_mnist.sampling.units import UNITS
from flowmatch_mnist.sampling.weights import KEY, load_teacher, warm_start, weights_path
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.devices import compile_in_place
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.training.gradients import GradientWatch
from flowmatch_mnist.training.internals import unscale_before_clipping
from flowmatch_mnist.training.steps import Decay, is_logged, learning_rate_factor
from flowmatch_mnist.training.tensorboard import log_scalars

INTERVALS = 5
"""Into how many equal intervals of t the validation loss is split."""

EXACT = 0.2
"""Until which t on the linear path, and at equal log-SNR on another, validation also takes the loss against the exact field.

Later, the exact field of the training digits is no measure of a network: at t = 0.2 it predicts held-out digits as well as a
good network does, and at t = 0.3 a third worse."""


def losses_by_time(
    losses: Tensor, t: Tensor, first: float, last: float, intervals: int = INTERVALS
) -> Iterator[tuple[str, Tensor, int]]:
    """Intervals of t from first to last, with the mean, (), of the losses (B,) at the t (B,) inside, and their number.

    The t are on the CPU, so that no GPU is waited for.
    """
    for i in range(int(first * intervals), math.ceil(last * intervals)):
        inside = ((t * intervals).long() == i).nonzero().flatten()
        mean = losses[inside.to(losses.device, non_blocking=True)].sum() / max(1, len(inside))
        yield f"{i / intervals:.1f} to {(i + 1) / intervals:.1f}", mean, len(inside)


class FlowMatching(LightningModule):
    """Trains a network f(x, t, y) from which follows the velocity dx/dt that carries noise to the data of class y.

    Args:
        net: the network.
        optimizer: what makes the optimizer from the parameters.
        warmup_steps: optimizer steps over which the learning rate rises.
        decay: how the learning rate falls from there to the run's end.
        sampler: how digits are drawn: by the callbacks, and by `predict`.
        start: trained weights to begin with, a file or a name of weights in the package; by default they are drawn at random.
        compile: whether training steps run through `torch.compile`. It takes a minute or so, and pays in longer runs. On a GPU
            "reduce-overhead" also records the launches, as CUDA graphs.
        channels_last: whether images and weights are laid out channels last, which makes convolutions on a processor faster.
        on_non_finite: what to do in a step whose gradients are not all finite: "stop" the run, or "skip" the step.
        seed: of times, label dropout and the network's own dropout; the command line sets it from `seed_everything`.
        objective: what is learned, the arguments of `flow.loss.FlowLoss`: path, prediction, times, weighting, loss, ...

    Raises:
        ValueError: if a number is out of its range, or the network cannot do what is asked of it.
    """

    last_loss: Tensor  # of the last training batch, (), on the device

    def __init__(
        self,
        net: Network,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 100,
        decay: Decay = "cosine",
        sampler: Sampler | None = None,
        start: str | None = None,
        compile: bool | Literal["reduce-overhead"] = False,
        channels_last: bool = False,
        on_non_finite: Literal["stop", "skip"] = "stop",
        seed: int = 0,
        **objective: Any,
    ) -> None:
        super().__init__()
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        self.net = net.to(memory_format=torch.channels_last) if channels_last else net
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.decay: Decay = decay
        self.sampler = sampler or Sampler()
        self.start = start
        self.compiles = compile
        self.gradients = GradientWatch(on_non_finite)
        self.seed = seed
        self.objective = FlowLoss(**objective)
        self.objective.check(net)
        self.units = UNITS["linear"]
        self.flow.check(self.sampler)

    @property
    def flow(self) -> Flow:
        """The network, and how to read what it puts out."""
        return Flow(self.net, self.objective.path, self.objective.prediction, self.units)

    def adopt(self, data: PairsDataModule) -> None:
        """Take the units of the data.

        Raises:
            UserError: if the network is for other samples, or the path is not one that the pairs can be used with.
        """
        net, problem = self.net, data.problem
        if net.shape != problem.shape or net.no_label != problem.classes:
            raise UserError(
                f"{type(net).__name__} is for {net.no_label} classes of shape {tuple(net.shape)}, but {type(data).__name__} "
                f"has {problem.classes} of shape {tuple(problem.shape)}; mend the config"
            )
        if data.path not in (None, self.objective.path):
            raise UserError(
                f"the pairs of {type(data).__name__} are the ends of straight lines; they need the path {data.path}, "
                f"not {self.objective.path}"
            )
        self.units = problem.units

    def setup(self, stage: str) -> None:
        """Learn what the data are, and load the weights to begin with. Those of a checkpoint come later, and overrule them."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, PairsDataModule):
            self.adopt(data)
        endless = self.trainer.max_steps == -1 and self.trainer.max_epochs == -1
        if stage == "fit" and endless and self.decay != "constant":
            raise UserError(
                f"a learning rate with {self.decay} decay needs an end; set --trainer.max_epochs or --trainer.max_steps, or "
                "--model.decay constant"
            )
        if stage == "fit" and self.start is not None:
            warm_start(self.net, weights_path(self.start))

    def on_fit_start(self) -> None:
        """Load the teacher, if there is one, learn the exact field if it is needed, and compile."""
        self.objective.prepare(lambda teacher: load_teacher(teacher, self.net, self.device))
        if self.objective.exact_until and not self.know_exact_field():
            raise UserError(
                "exact_until needs data without dequantization, and noise that knows nothing of them; set --model.exact_until "
                "0, or --data.dequantize false and --data.coupling independent"
            )
        if self.compiles:
            compile_in_place(self.net, self.device, None if self.compiles is True else self.compiles)

    def know_exact_field(self) -> bool:
        """Hand the field of the training data to the objective, once; whether there is one."""
        data = getattr(self.trainer, "datamodule", None)
        if self.objective.exact_field is None and isinstance(data, PairsDataModule):
            training_set = data.training_set()
            if training_set is not None:
                self.objective.exact_field = ExactField(*(tensor.to(self.device) for tensor in training_set))
        return self.objective.exact_field is not None

    def training_step(self, batch: Pairs, batch_idx: int) -> Tensor:
        """Draw the times, and return the mean loss of the batch."""
        x0, x1, y = batch
        place = place_of(self.trainer)
        # On the CPU, so that they are the same for every device, and need no kernel there.
        t = place.share(self.objective.density.sample, len(y), torch.device("cpu"), self.seed, "times")
        t = t.to(self.device, non_blocking=True)
        # For the network's own dropout. To seed the generators of GPUs that are not there costs a millisecond.
        seed = torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed
        seed(streams.seed(self.seed, "network", place.step, place.rank))

        def uniform(what: str, *shape: int) -> Tensor:
            return place.uniform(shape, self.device, self.seed, what)

        loss = self.objective(self.net, x0, x1, y, t, uniform).mean()
        self.last_loss = loss.detach()
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the norm of the gradients, before clipping; in a step that is logged, log it, the loss and the learning rate."""
        self._norm = norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        step = self.trainer.global_step + 1
        logged = is_logged(self.trainer, step)
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        self.gradients.look(step, norm, self.last_loss, self.parameters(), logged, scaled)
        if logged:
            loss, size = torch.stack([self.last_loss.float(), norm.float()]).tolist()
            rate = optimizer.param_groups[0]["lr"]
            figures = {"loss/train": loss, "optimizer/gradient_norm": size, "optimizer/learning_rate": rate}
            # Lightning would hand them to the loggers only after SaveLast: a run killed in between would lose the points.
            self.log_dict(figures, logger=False)
            log_scalars(self.trainer, {**figures, "epoch": self.current_epoch}, step - 1)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients as the trainer asks for; by the norm that was just taken."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, self._norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

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
        # The places of this process's share in the global batch, see data.batches.
        positions = torch.arange(len(y)) * self.trainer.world_size + self.global_rank
        first, last = self.objective.density.support
        t = first + (last - first) * fixed_times(batch_idx, positions)  # on the CPU, as in training
        # Only training goes through compiled code: another batch size, without gradients, would be compiled anew.
        there = t.to(self.device, non_blocking=True)
        error = self.objective.error(self.net.forward, x0, x1, y, there)
        losses = reduce(error, "squared")
        self.log(f"loss/{split}", losses.mean(), prog_bar=split == "val", batch_size=len(y), sync_dist=True)
        for interval, mean, count in losses_by_time(losses, t, first, last):
            self.log(f"loss_by_time/{split} {interval}", mean, batch_size=count, sync_dist=True)
        if self.know_exact_field():
            until = round(float(PATHS[self.objective.path].time(PATHS["linear"].log_snr(torch.tensor(EXACT)))), 4)
            exact = self.objective.exact_pairs(x0, x1, y, there, until)
            scatter = self.objective.point_and_target(x0, x1, there)[1] - self.objective.point_and_target(*exact, there)[1]
            early = (t < until).nonzero().flatten()
            losses = reduce((error + scatter)[early.to(self.device)], "squared")
            for interval, mean, count in losses_by_time(losses, t[early], first, min(until, last), intervals=10):
                self.log(f"loss_exact/{split} {interval}", mean, batch_size=count, sync_dist=True)

    def predict_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        """Draw samples: noise (B, *shape), labels (B,), and their numbers (B,) -> data in their units (B, ...), labels (B,)."""
        x0, y, numbers = batch
        flow, sampler = self.flow, self.sampler
        fresh_noise = churn_noise(self.seed, numbers.tolist(), self.net.shape, self.device) if sampler.churn else None
        *_, x1 = flow.states(flow.guided(y, sampler), x0, sampler, fresh_noise=fresh_noise)
        return flow.units.decode(x1), y

    def configure_optimizers(self) -> Any:
        """The optimizer, with warm-up and decay of its learning rate counted in steps."""
        optimizer = self.optimizer(self.parameters())
        unscale_before_clipping(optimizer)

        def factor(step: int) -> float:
            # Asked for at the first step, not here: that would load the data before a resumed run has its place in them.
            total_steps = self.trainer.estimated_stepping_batches if step else 1
            return learning_rate_factor(step, self.warmup_steps, total_steps, self.decay)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint what its weights are of, so that `sample.py` needs no config."""
        checkpoint[KEY] = self.flow.describe(self.sampler)
