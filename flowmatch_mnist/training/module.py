"""The LightningModule: it draws the times t and computes the loss. The data module draws the pairs of noise and data.

The loss itself is in `flow/loss.py` and does not need Lightning.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from flowmatch_mnist.data.pairs import Pairs, PairsDataModule, position_of
from flowmatch_mnist.flow.exact import ExactField
from flowmatch_mnist.flow.loss import FlowLoss, losses_by_time, reduce
from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.flow.times import fixed_times
from flowmatch_mnist.networks.base import Network
from flowmatch_mnist.sampling.generate import Flow, Sampler, churn_noise
from flowmatch_mnist.sampling.units import UNITS
from flowmatch_mnist.sampling.weights import DESCRIPTION_KEY, load_drawer, load_teacher, warm_start, weights_path
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.devices import compile_in_place, send
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.training.gradients import GradientWatch
from flowmatch_mnist.training.optimizer import (
    OPTIMIZER_KEY,
    Decay,
    build_optimizer,
    learning_rate_factor,
    settings_of,
    use_settings,
)
from flowmatch_mnist.training.steps import is_logged
from flowmatch_mnist.training.tensorboard import log_scalars

EXACT_LOSS_UNTIL = 0.2
"""Before this t on the linear path, validation also logs the loss with the exact target, as `loss_exact`.

On other paths, the limit is the t with the same log-SNR. At later t, this loss does not measure the quality of a network. At
t = 0.2, the exact field of the training digits predicts held-out digits as well as a good network does, and at t = 0.3 a third
worse."""


class FlowMatching(LightningModule):
    """Trains a network f(x, t, y). The network's output determines the velocity dx/dt that carries noise to data of class y.

    Args:
        net: the network.
        optimizer: builds the optimizer from the parameters; by default AdamW.
        warmup_steps: number of optimizer steps in which the learning rate rises.
        decay: how the learning rate falls after the warm-up, until the end of the run.
        sampler: how the callbacks and `predict` draw samples.
        start: trained weights for a warm start: a file, or a name of weights in the package. The default is random weights.
        compile: whether training steps run through `torch.compile`. Compiling takes about a minute; longer runs gain from it.
            On a GPU, "reduce-overhead" also records the kernel launches as CUDA graphs.
        channels_last: whether images and weights use the memory format channels last. It makes convolutions on a CPU faster.
        on_non_finite: what to do if some gradients of a step are not finite: "stop" the run, or "skip" the step.
        seed: random seed of times, label dropout and the network's own dropout. The command line sets it from
            `seed_everything`.
        objective: the arguments of `flow.loss.FlowLoss`, which define the loss: path, prediction, times, weighting, loss, ...

    Raises:
        ValueError: if a number is out of its range, or the network does not support the objective or the sampler.
    """

    last_loss: Tensor  # the loss of the last training batch, (), on the device
    resumes = False  # whether a checkpoint replaces the weights of `start`, whose file may no longer exist
    _stored_optimizer: str | None = None  # the optimizer's class name in the checkpoint that the run resumes from

    def __init__(
        self,
        net: Network,
        optimizer: OptimizerCallable | None = None,
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
        self.optimizer = optimizer or AdamW
        self.warmup_steps = warmup_steps
        self.decay: Decay = decay
        self.sampler = sampler or Sampler()
        self.start = start
        self.compiles = compile
        self.gradients = GradientWatch(on_non_finite)
        self.seed = seed
        self.objective = FlowLoss(**objective)
        self.objective.check(net, guided=start is None and self.sampler.guidance != 1)
        self.fake: Network | None = None  # trained along with `net`, see `flow.matching`
        if self.objective.matching:
            if start is None:
                raise ValueError("distribution matching begins with trained weights; set start")
            self.objective.matching.fake = self.fake = copy.deepcopy(self.net)
        self.units = UNITS["linear"]
        self.flow.check(self.sampler)

    @property
    def flow(self) -> Flow:
        """The network, and the meaning of its output."""
        return Flow(self.net, self.objective.path, self.objective.prediction, self.units, self.objective.matching is not None)

    def check_data_and_set_units(self, data: PairsDataModule) -> None:
        """Check that the data fit the network and the path, and use their units.

        Raises:
            UserError: if the network expects other shapes or classes, or the pairs cannot be used with the path.
        """
        net, problem = self.net, data.problem
        if net.shape != problem.shape or net.no_label != problem.classes:
            raise UserError(
                f"{type(net).__name__} is for {net.no_label} classes and samples of shape {tuple(net.shape)}, but "
                f"{type(data).__name__} has {problem.classes} classes and samples of shape {tuple(problem.shape)}; "
                "correct the config"
            )
        if data.path not in (None, self.objective.path):
            raise UserError(
                f"the pairs of {type(data).__name__} are the ends of straight lines; set --model.path {data.path}, "
                f"not {self.objective.path}"
            )
        self.units = problem.units

    def setup(self, stage: str) -> None:
        """Use the units of the data, and load the weights of a warm start. A resumed run has the weights of its checkpoint.

        Raises:
            UserError: if model and data do not fit, the learning rate decays without an end, or the weights do not load.
        """
        if isinstance(data := getattr(self.trainer, "datamodule", None), PairsDataModule):
            self.check_data_and_set_units(data)
        endless = self.trainer.max_steps == -1 and self.trainer.max_epochs == -1
        if stage == "fit" and endless and self.decay != "constant":
            raise UserError(
                f"a learning rate with {self.decay} decay needs an end of training; set --trainer.max_epochs, "
                "--trainer.max_steps or --model.decay constant"
            )
        if stage == "fit" and self.start is not None and not self.resumes:
            warm_start(self.net, weights_path(self.start))
            if self.fake and self.objective.teacher:
                warm_start(self.fake, weights_path(str(self.objective.teacher.teacher)))

    def on_fit_start(self) -> None:
        """Load the teacher and the exact field if the objective needs them, and compile the network if `compile` is set.

        Raises:
            UserError: if the teacher does not load, or the data have no exact field.
        """
        self.objective.prepare(lambda teacher: load_teacher(teacher, self.flow, self.device))
        matching, drawer = self.objective.matching, None
        if matching and (matching.pairs or matching.pairs_first):
            drawer, matching.draw = load_drawer(str(self.start), self.device)
            matching.steps_taken = lambda: self.trainer.global_step
        if self.objective.exact_until and not self.prepare_exact_field():
            raise UserError(
                "exact_until needs data without dequantization, and noise that is independent of the data; set "
                "--model.exact_until 0, or --data.dequantize false and --data.coupling independent"
            )
        if self.compiles:
            for net in filter(None, (self.net, self.fake, getattr(self.objective.teacher, "net", None), drawer)):
                compile_in_place(net, self.device, None if self.compiles is True else self.compiles)

    def prepare_exact_field(self) -> bool:
        """Give the objective the exact field of the training data, once. Return whether there is such a field."""
        data = getattr(self.trainer, "datamodule", None)
        if self.objective.exact_field is None and isinstance(data, PairsDataModule) and (found := data.training_set()):
            self.objective.exact_field = ExactField(*(tensor.to(self.device) for tensor in found))
        return self.objective.exact_field is not None

    def training_step(self, batch: Pairs, batch_idx: int) -> Tensor:
        """Draw the times, and return the mean loss of the batch, ()."""
        x0, x1, y = batch
        position = position_of(self.trainer)
        # The CPU draws the times: they are then the same for every device, and a GPU needs no kernel for them.
        t = send(position.share(self.objective.density.sample, len(y), torch.device("cpu"), self.seed, "times"), self.device)
        # For the network's own dropout. torch.manual_seed takes a millisecond even without a GPU, so CPU runs avoid it.
        seed = torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed
        seed(streams.seed(self.seed, "network", position.step, position.rank))

        def numbers(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda what, *shape: draw(shape, self.device, self.seed, what)

        loss = self.objective(self.net, x0, x1, y, t, numbers(position.uniform), numbers(position.normal)).mean()
        self.last_loss = loss.detach()
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Compute the norm of the gradients before clipping. In a logged step, log the norm, the loss and the learning rate."""
        if self.fake and self.objective.matching and self.objective.matching.pairs_alone:
            self.fake.zero_grad()  # without gradients, it keeps its weights: there is no weight decay either
        self._norm = norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        step = self.trainer.global_step + 1
        logged = is_logged(self.trainer, step)
        has_scaler = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        self.gradients.check(step, norm, self.last_loss, self.parameters(), logged, has_scaler)
        if logged:
            loss, norm_value = torch.stack([self.last_loss.float(), norm.float()]).tolist()
            rate = optimizer.param_groups[0]["lr"]
            scalars = {"loss/train": loss, "optimizer/gradient_norm": norm_value, "optimizer/learning_rate": rate}
            # Lightning would pass them to the loggers only after SaveLast: a run killed in between would lose the points.
            self.log_dict(scalars, logger=False)
            log_scalars(self.trainer, {**scalars, "epoch": self.current_epoch}, step - 1)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients as the trainer asks. To clip by the norm, use the norm that was just computed.

        A limit of 0 or less means no clipping.
        """
        if gradient_clip_val and gradient_clip_val > 0 and gradient_clip_algorithm in (None, "norm"):
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, self._norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def validation_step(self, batch: Pairs, batch_idx: int) -> None:
        """Log the loss for fixed noise and fixed times: over all t, and for each interval of t."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Pairs, batch_idx: int) -> None:
        """Log the loss on the test set, as in validation."""
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: Pairs, batch_idx: int, split: str) -> None:
        x0, x1, y = batch
        if not len(y):
            return  # the last global batch may be too small to give every process a sample
        # The positions of this process's samples in the global batch, see data.batches.
        positions = torch.arange(len(y)) * self.trainer.world_size + self.global_rank
        t = fixed_times(batch_idx, positions)  # on the CPU, as in training
        # Only training uses compiled code: another batch size, without gradients, would be compiled again.
        t_on_device = send(t, self.device)
        # `fake` knows the velocity of a student's samples. Its loss tells how far these are from the data.
        error = self.objective.error((self.fake or self.net).forward, x0, x1, y, t_on_device)
        losses = reduce(error, "squared")
        self.log(f"loss/{split}", losses.mean(), prog_bar=split == "val", batch_size=len(y), sync_dist=True)
        for interval, mean, count in losses_by_time(losses, t):
            self.log(f"loss_by_time/{split} {interval}", mean, batch_size=count, sync_dist=True)
        if self.prepare_exact_field():
            until = round(float(PATHS[self.objective.path].time(PATHS["linear"].log_snr(torch.tensor(EXACT_LOSS_UNTIL)))), 4)
            exact = self.objective.exact_pairs(x0, x1, y, t_on_device, until)
            own, mean = (self.objective.point_and_target(*pair, t_on_device)[1] for pair in ((x0, x1), exact))
            early = (t < until).nonzero().flatten()
            # This is the prediction minus the mean target. Of 5 intervals, only one would lie before this time.
            losses = reduce((error + own - mean)[early.to(self.device)], "squared")
            for interval, mean, count in losses_by_time(losses, t[early], until, intervals=10):
                self.log(f"loss_exact/{split} {interval}", mean, batch_size=count, sync_dist=True)

    def predict_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        """Draw samples: noise (B, *shape), labels (B,), sample numbers (B,) -> data in their units (B, ...), labels (B,)."""
        x0, y, numbers = batch
        flow, sampler = self.flow, self.sampler
        fresh_noise = churn_noise(self.seed, numbers.tolist(), self.net.shape, self.device) if sampler.churn else None
        *_, x1 = flow.states(flow.guided(y, sampler), x0, sampler, fresh_noise=fresh_noise)
        return flow.units.decode(x1), y

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and the schedule that warms up and decays its learning rate by steps."""
        matching, fake = self.objective.matching, self.fake
        shares = {self.net: matching.student_rate, fake: 1.0} if matching and fake else {self.net: 1.0}
        optimizer = build_optimizer(self.optimizer, shares, self._stored_optimizer)
        self._settings = settings_of(optimizer)

        def factor(step: int) -> float:
            # Not read before the first step: reading it loads the data, and a resumed run must first restore its position.
            total_steps = self.trainer.estimated_stepping_batches if step else 1
            return learning_rate_factor(step, self.warmup_steps, total_steps, self.decay)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def on_train_start(self) -> None:
        """Use the optimizer's settings of this run, because a checkpoint restores those of the earlier run."""
        use_settings(cast(LambdaLR, self.lr_schedulers()), self._settings)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe the network and the sampler in the checkpoint, because `sample.py` reads no config.

        Raises:
            FloatingPointError: if a step so far was not finite.
        """
        self.gradients.require_finite()
        checkpoint[DESCRIPTION_KEY] = self.flow.describe(self.sampler)
        for optimizer in self.trainer.optimizers:
            checkpoint[OPTIMIZER_KEY] = type(optimizer).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the optimizer that wrote the checkpoint."""
        self._stored_optimizer = checkpoint.get(OPTIMIZER_KEY)
