"""Compare this project with other flow matching and diffusion projects: same data, machine, training time and evaluator.

    pip install -e '.[rivals]' && git clone --depth 1 https://github.com/cloneofsimo/minRF
    python benchmarks/rivals.py

The script trains `configs/quick.yaml` and measures its time. Then it trains each rival for the same time, as the rival's own
example or documentation says. It draws with each one's own sampler, and scores all as `train.py test` does. It writes
`docs/rivals.json` and `docs/rivals.png`, which has a row of digits for each. The docstring of each class describes its row,
and names all differences from the original.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from rich.progress import track
from scoring import UNWATCHED, Judge, scores, words
from torch import Tensor, nn

from flowmatch_mnist.images import mnist
from flowmatch_mnist.images.pictures import grid, save_png
from flowmatch_mnist.images.pixels import PIXELS
from flowmatch_mnist.sampling.generate import Flow, Sampler, Samples, generate
from flowmatch_mnist.sampling.weights import load_digits, newest_checkpoint, read_checkpoint
from flowmatch_mnist.support.errors import UserError, exit_on_error
from flowmatch_mnist.support.files import save_json

ROOT = Path(__file__).resolve().parent.parent


class Rival:
    """A model that is trained step by step, and then draws digits.

    Attributes:
        batch_size: images in a step.
        evaluations: the most network evaluations for one of the digits drawn so far.
    """

    batch_size = 128
    net: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self) -> None:
        self.evaluations = 0

    def loss(self, x1: Tensor, y: Tensor) -> Tensor:
        """Return the loss of images x1 (B, 1, 28, 28) in [-1, 1] and their labels y (B,)."""
        raise NotImplementedError

    def step(self, x1: Tensor, y: Tensor) -> None:
        """Take one optimizer step."""
        self.optimizer.zero_grad()
        self.loss(x1, y).backward()
        self.optimizer.step()

    def draw(self, y: Tensor) -> Tensor:
        """Draw digits (B, 1, 28, 28) in [-1, 1] for the labels y (B,)."""
        raise NotImplementedError


def torchcfm_unet() -> nn.Module:
    """Return the network of torchcfm's conditional MNIST example."""
    from torchcfm.models.unet import UNetModel

    return UNetModel(dim=(1, 28, 28), num_channels=32, num_res_blocks=1, num_classes=10, class_cond=True)


class TorchCFM(Rival):
    """torchcfm's conditional MNIST notebook: its network, matcher, Adam with defaults, batches of 128; dopri5 at 1e-4."""

    def __init__(self) -> None:
        super().__init__()
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

        self.net = torchcfm_unet()
        self.matcher = ConditionalFlowMatcher(sigma=0.0)
        self.optimizer = torch.optim.Adam(self.net.parameters())

    def loss(self, x1: Tensor, y: Tensor) -> Tensor:
        t, x_t, u_t = self.matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        return F.mse_loss(self.net(t, x_t, y), u_t)

    def draw(self, y: Tensor) -> Tensor:
        from torchdiffeq import odeint

        calls = 0

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return self.net(t, x, y)

        x0 = torch.randn(len(y), 1, 28, 28)
        x1 = odeint(velocity, x0, torch.linspace(0, 1, 2), atol=1e-4, rtol=1e-4, method="dopri5")[-1]
        self.evaluations = max(self.evaluations, calls)
        return x1


class FlowMatching(Rival):
    """flow_matching's path, loss and solver (midpoint, step 0.05), as in its example in the plane.

    It has no network for images, so this class uses torchcfm's, with Adam at 1e-3 and batches of 128.
    """

    def __init__(self) -> None:
        super().__init__()
        from flow_matching.path import AffineProbPath
        from flow_matching.path.scheduler import CondOTScheduler

        self.net = torchcfm_unet()
        self.path = AffineProbPath(scheduler=CondOTScheduler())
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)

    def loss(self, x1: Tensor, y: Tensor) -> Tensor:
        sample = self.path.sample(t=torch.rand(len(x1)), x_0=torch.randn_like(x1), x_1=x1)
        return (self.net(sample.t, sample.x_t, y) - sample.dx_t).pow(2).mean()

    def draw(self, y: Tensor) -> Tensor:
        from flow_matching.solver import ODESolver
        from flow_matching.utils import ModelWrapper

        net = self.net
        calls = 0

        class Labelled(ModelWrapper):
            def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
                nonlocal calls
                calls += 1
                return net(t.expand(len(x)), x, y)

        x0 = torch.randn(len(y), 1, 28, 28)
        x1 = ODESolver(velocity_model=Labelled(net)).sample(x_init=x0, method="midpoint", step_size=0.05)
        self.evaluations = calls
        assert isinstance(x1, Tensor)
        return x1


class Diffusers(Rival):
    """diffusers' UNet2DModel with labels, in the sizes of its course's class-conditioned MNIST (32, 64, 64 channels).

    It has that course's schedule, Adam at 1e-3 and batches of 128. It draws by DDIM in 50 steps instead of DDPM in 1,000, which
    would take twenty times as long.
    """

    def __init__(self) -> None:
        super().__init__()
        from diffusers import DDPMScheduler, UNet2DModel

        self.net = UNet2DModel(
            sample_size=28,
            in_channels=1,
            out_channels=1,
            layers_per_block=2,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=10,
        )
        self.schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)

    def loss(self, x1: Tensor, y: Tensor) -> Tensor:
        noise, t = torch.randn_like(x1), torch.randint(0, 999, (len(x1),))
        return F.mse_loss(self.net(self.schedule.add_noise(x1, noise, t), t, class_labels=y).sample, noise)

    def draw(self, y: Tensor) -> Tensor:
        from diffusers import DDIMScheduler

        schedule = DDIMScheduler.from_config(self.schedule.config)
        schedule.set_timesteps(50)
        x = torch.randn(len(y), 1, 28, 28)
        for t in schedule.timesteps:
            x = schedule.step(self.net(x, t, class_labels=y).sample, t, x).prev_sample
        self.evaluations = len(schedule.timesteps)
        return x


class RectifiedFlow(Rival):
    """rectified-flow-pytorch's Unet(dim=64) and RectifiedFlow, drawn by its `sample`.

    They are trained as its Trainer does: Adam at 3e-4, batches of 16, gradients clipped at 0.5, averaged weights. It takes no
    labels. The network has three scales instead of its four, because 28 cannot be halved three times.
    """

    batch_size = 16

    def __init__(self) -> None:
        super().__init__()
        from ema_pytorch import EMA
        from rectified_flow_pytorch import RectifiedFlow as Model
        from rectified_flow_pytorch import Unet

        self.net = Model(Unet(dim=64, dim_mults=(1, 2, 4), channels=1), data_shape=(1, 28, 28))
        self.averaged = EMA(self.net, forward_method_names=("sample",))
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=3e-4)

    def loss(self, x1: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.net((x1 + 1) / 2)  # the model itself scales to [-1, 1]
        return loss

    def step(self, x1: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(x1, y).backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 0.5)
        self.optimizer.step()
        self.averaged.update()

    def draw(self, y: Tensor) -> Tensor:
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        hook = self.averaged.ema_model.model.register_forward_hook(count)
        drawn: Tensor = self.averaged.sample(batch_size=len(y))
        hook.remove()
        self.evaluations = calls
        return drawn * 2 - 1


class MinRF(Rival):
    """minRF's MNIST in `rf.py`: its small DiT on images padded to 32 by 32, its loss, Adam at 2e-4, batches of 256.

    It draws by its `sample`, in 50 steps with guidance scale 2, which are 100 evaluations. minRF is no package, only the folder
    of a clone. This class drops one label in ten, because its own code for label dropout needs a GPU.
    """

    batch_size = 256
    no_label = 10

    def __init__(self) -> None:
        super().__init__()
        from dit import DiT_Llama
        from rf import RF

        self.net = DiT_Llama(1, 32, dim=64, n_layers=6, n_heads=4, num_classes=10)
        self.net.y_embedder.dropout_prob = 0.0
        self.flow = RF(self.net)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=2e-4)

    def loss(self, x1: Tensor, y: Tensor) -> Tensor:
        y = torch.where(torch.rand(len(y)) < 0.1, self.no_label, y)
        loss: Tensor = self.flow.forward(F.pad(x1, (2, 2, 2, 2), value=-1.0), y)[0]
        return loss

    def draw(self, y: Tensor) -> Tensor:
        steps = 50
        padded = self.flow.sample(torch.randn(len(y), 1, 32, 32), y, torch.full_like(y, self.no_label), sample_steps=steps)[-1]
        self.evaluations = 2 * steps
        return padded[..., 2:-2, 2:-2]


class SmallDiffusion(Rival):
    """smalldiffusion's class-conditioned Fashion-MNIST example, on digits, which are not mirrored.

    It has the example's DiT, schedule and loss, AdamW at 1e-3, batches of 1,024 and averaged weights. It draws by `samples` in
    20 steps with gam = 1.6, unguided. A training step needs about 20 GB of memory.
    """

    batch_size = 1024

    def __init__(self) -> None:
        super().__init__()
        from smalldiffusion import CondEmbedderLabel, DiT, ScheduleDDPM
        from torch_ema import ExponentialMovingAverage

        width, heads = 32, 6
        self.net = DiT(28, 1, 2, depth=6, head_dim=width, num_heads=heads, cond_embed=CondEmbedderLabel(width * heads, 10, 0.1))
        self.averaged = ExponentialMovingAverage(self.net.parameters(), decay=0.99)
        self.schedule = ScheduleDDPM(beta_start=0.0001, beta_end=0.02, N=1000)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3)

    def loss(self, x1: Tensor, y: Tensor) -> Tensor:
        from smalldiffusion import generate_train_sample

        x0, sigma, eps, cond = generate_train_sample((x1, y), self.schedule, conditional=True)
        loss: Tensor = self.net.get_loss(x0, sigma, eps, cond=cond)
        return loss

    def step(self, x1: Tensor, y: Tensor) -> None:
        super().step(x1, y)
        self.averaged.update()

    def draw(self, y: Tensor) -> Tensor:
        from smalldiffusion import samples

        steps = 20
        with self.averaged.average_parameters():
            *_, x = samples(self.net, self.schedule.sample_sigmas(steps), gam=1.6, batchsize=len(y), cond=y)
        self.evaluations = steps
        return x


RIVALS: dict[str, Callable[[], Rival]] = {
    "torchcfm": TorchCFM,
    "flow_matching": FlowMatching,
    "diffusers": Diffusers,
    "rectified-flow-pytorch": RectifiedFlow,
    "minRF": MinRF,
    "smalldiffusion": SmallDiffusion,
}


def train(rival: Rival, images: Tensor, labels: Tensor, seconds: float) -> int:
    """Train for `seconds`, after one uncounted step. Return the number of images seen."""
    generator = torch.Generator().manual_seed(0)
    seen = -rival.batch_size
    start = time.perf_counter()
    while True:
        for batch in torch.randperm(len(images), generator=generator).split(rival.batch_size):
            if len(batch) < rival.batch_size:
                continue
            rival.step(PIXELS["linear"].encode(images[batch]), labels[batch])
            seen += rival.batch_size
            if seen == 0:
                start = time.perf_counter()
            if time.perf_counter() - start > seconds:
                return seen


@torch.no_grad()
def draw(rival: Rival, labels: Tensor) -> Tensor:
    """Draw digits for the labels, uint8 (N, 28, 28), a hundred at a time."""
    rival.net.eval()
    drawn = [rival.draw(y) for y in track(labels.split(100), "drawing", transient=True)]
    return PIXELS["linear"].decode(torch.cat(drawn))


def train_ours(options: argparse.Namespace) -> tuple[float, int, Flow, Sampler]:
    """Train with `train.py`. Return the seconds from start to end, the images seen, the model, and its config's sampler."""
    quiet = [*UNWATCHED, "--name", "rivals"]
    start = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "train.py", "fit", "--config", options.config, *quiet], check=True)
    return (time.perf_counter() - start, *trained(newest_checkpoint(name="rivals")))


def trained(checkpoint: Path) -> tuple[int, Flow, Sampler]:
    """Return the images seen by a run, its model, and its config's sampler."""
    path, flow, sampler = load_digits(checkpoint, "cpu")
    batch_size = yaml.safe_load((path.parent.parent / "config.yaml").read_text())["data"]["init_args"]["batch_size"]
    return read_checkpoint(path)["global_step"] * batch_size, flow, sampler


def main() -> None:
    """Train, draw and score one project after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--samples", type=int, default=500, help="digits drawn with each (default: 500)")
    parser.add_argument("--config", default="configs/quick.yaml", help="config of this project (default: configs/quick.yaml)")
    parser.add_argument("--checkpoint", type=Path, help="a finished run of that config, instead of a new one")
    parser.add_argument("--seconds", type=float, help="seconds of that run, from command to prompt")
    parser.add_argument("--minrf", type=Path, default=Path("minRF"), help="folder of minRF's clone (default: minRF)")
    parser.add_argument("--out", type=Path, default=Path("docs/rivals"), help="output path, without extension")
    options = parser.parse_args()
    score = Judge()
    labels = score.labels(options.samples)
    images, digits = mnist.load(Path("data"), "train")
    rows: dict[str, dict[str, Any]] = {}
    shown = []

    def report(name: str, seen: int, drawn: Tensor, evaluations: int, drawing: float) -> None:
        rows[name] = {
            "images seen": seen,
            "images/s": seen / seconds,
            "evaluations": evaluations,
            "digits/s": len(labels) / drawing,
            **scores(score(Samples(drawn, labels, evaluations))),
        }
        shown.append(torch.stack([drawn[labels == digit][0] for digit in range(10)]))
        print(f"{name}: {words(rows[name])}", flush=True)
        contents = {"seconds of training": seconds, "samples": len(labels), "rows": rows}
        save_json(options.out.with_suffix(".json"), contents)
        save_png(grid(torch.cat(shown), 10), options.out.with_suffix(".png"))

    if (options.checkpoint is None) != (options.seconds is None):
        raise UserError("--checkpoint and --seconds need each other: give both or neither")
    sys.path.append(str(options.minrf))
    for name in options.rivals:
        try:
            RIVALS[name]()
        except ModuleNotFoundError as error:
            raise UserError(f"cannot import {name} ({error}); install it as the head of benchmarks/rivals.py says") from None
    seconds, seen, flow, sampler = (
        (options.seconds, *trained(options.checkpoint)) if options.checkpoint else train_ours(options)
    )
    start = time.perf_counter()
    samples = generate(flow, labels, sampler, seed=0)
    report("flowmatch-mnist", seen, samples.values, samples.evaluations, time.perf_counter() - start)
    for name in options.rivals:
        torch.manual_seed(0)
        rival = RIVALS[name]()
        seen = train(rival, images, digits, seconds)
        start = time.perf_counter()
        drawn = draw(rival, labels)
        report(name, seen, drawn, rival.evaluations, time.perf_counter() - start)


if __name__ == "__main__":
    with exit_on_error():
        main()
