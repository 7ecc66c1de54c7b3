"""What is shown, measured and validated is what was trained: by networks that draw their label as a grey level."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_here
from lightning.pytorch import Callback, Trainer
from PIL import Image, ImageSequence
from test_runs import TOY, losses
from torch import nn

from flowmatch_mnist.data.digits import MNISTDataModule
from flowmatch_mnist.evaluation.estimates import Estimate, Measurement
from flowmatch_mnist.evaluation.problems import Digits, OtherImages, labels_like
from flowmatch_mnist.flow.matching import DistributionMatching
from flowmatch_mnist.flow.paths import match_dims
from flowmatch_mnist.images import mnist
from flowmatch_mnist.images.pictures import MARK
from flowmatch_mnist.networks.base import Network
from flowmatch_mnist.sampling.generate import Flow, Sampler, Samples, draw_noise, generate
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.files import load_checkpoint
from flowmatch_mnist.training import drawing, evaluation
from flowmatch_mnist.training.best import KeepBest
from flowmatch_mnist.training.drawing import DrawSamples
from flowmatch_mnist.training.ema import EMA
from flowmatch_mnist.training.evaluation import Evaluate
from flowmatch_mnist.training.internals import average_of
from flowmatch_mnist.training.module import FlowMatching
from flowmatch_mnist.training.muon import Muon, orthogonalize
from flowmatch_mnist.training.optimizer import learning_rate_factor
from flowmatch_mnist.training.saving import CheckpointFiles

LEVELS = [20 * label for label in range(10)]


class Shades(Network):
    """Carries all noise to the grey level of its label, 20 times as bright, and a little more by what it learns."""

    shape = (1, 28, 28)

    def __init__(self):
        super().__init__(10, 4, False)
        self.more, self.arguments, self.seen = nn.Parameter(torch.zeros(())), {}, []

    def forward(self, x, t, y, until=None):
        self.seen.append((self.training, len(x), round(t[0].item(), 6)))
        level = 20 * y / 127.5 - 1 + self.more
        return (match_dims(level, x) - x) / (1 - match_dims(t, x)).clamp(min=1e-3)


@pytest.fixture
def digits(grey_digits):
    return MNISTDataModule(batch_size=20, val_size=100)


class Steady(torch.optim.SGD):
    """By gradients of one size: what is learned grows by a tenth in each step."""

    def step(self, closure=None):
        closure()
        for p in self.param_groups[0]["params"]:
            p.grad = None if p.grad is None else torch.full_like(p, -0.1)
        super().step()


def fit(folder, data, *callbacks, rate=1.0, warmup_steps=0, decay="constant", **settings):
    module = FlowMatching(Shades(), lambda p: Steady(p, lr=rate), warmup_steps, decay, Sampler(3, "euler"))
    usual = {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 1, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = Trainer(accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **(usual | quiet | settings))
    trainer.fit(module, data)
    return trainer, module


def test_the_columns_of_the_grid_are_the_digits_and_its_rows_samples(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(Trainer, "log_dir", tmp_path)
    fit(tmp_path, digits, DrawSamples(rows=3), rate=0.0)
    with Image.open(tmp_path / "samples/grid-000004.png") as grid:
        cells = torch.tensor(list(grid.convert("L").tobytes())).view(3, 120, 10, 120)[:, 60, :, 60]
    assert cells.tolist() == [LEVELS] * 3
    with Image.open(tmp_path / "samples/trajectory-000004.png") as strip:
        ends = torch.tensor(list(strip.tobytes())).view(10, 120, 4, 120)[:, 60, -1, 60]
    assert ends.tolist() == LEVELS, "a row for each digit, which ends in it"


def test_the_pictures_of_a_run_make_a_film_in_their_order(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(Trainer, "log_dir", tmp_path)
    fit(tmp_path, digits, DrawSamples(0, at_steps=[1, 2, 4], rows=1))
    with Image.open(tmp_path / "samples/learning.gif") as film:
        assert film.size == (1200, 120)
        shown = [(frame.info["duration"], frame.convert("L").getpixel((540, 60))) for frame in ImageSequence.Iterator(film)]
    durations, levels = zip(*shown, strict=True)
    assert durations == (500, 500, 1200)
    assert list(levels) == pytest.approx([20 * 4 + 127.5 * n / 10 for n in (1, 2, 4)], abs=2), "a four, as it grew brighter"
    fit(tmp_path, digits, DrawSamples(0, at_steps=[3], rows=2))
    with Image.open(tmp_path / "samples/learning.gif") as film:
        assert film.n_frames == 3 and film.size == (1200, 120), "of one size alone, that of the last"

    class Tidy(Callback):
        def on_train_batch_end(self, *_):
            for picture in (tmp_path / "samples").glob("*"):
                picture.unlink()

    fit(tmp_path, digits, DrawSamples(0, at_steps=[3], rows=2), Tidy())
    assert not list((tmp_path / "samples").iterdir()), "without pictures there is no film, and no error"
    fit(tmp_path / "other", digits, DrawSamples(0, at_steps=[]))
    assert not (tmp_path / "other").exists()


def test_a_run_that_resumes_after_its_last_pictures_makes_the_film_too(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(Trainer, "log_dir", tmp_path)
    draws = DrawSamples(0, at_steps=[1, 2], rows=1)
    fit(tmp_path, digits, draws)
    (tmp_path / "samples/learning.gif").unlink()
    resumed = DrawSamples(0, at_steps=[1, 2], rows=1)
    resumed.load_state_dict(draws.state_dict())
    trainer = SimpleNamespace(callbacks=[], log_dir=tmp_path, is_global_zero=True)
    resumed.setup(trainer, None, "fit")
    resumed.on_train_end(trainer, None)
    assert (tmp_path / "samples/learning.gif").is_file()


def test_pictures_mark_what_is_read_as_another_digit(data_dir):
    images, labels = mnist.load(data_dir, "test")
    images, labels = images[:20], labels[:20].clone()  # all of which are read right
    labels[[3, 11]] = (labels[[3, 11]] + 1) % 10
    labels[5] = 10  # any digit
    sheet = Digits().pictures(Samples(images, labels, 1))["grid"]
    corners = sheet[::120, ::120].flatten(0, 1)
    orange = (corners == torch.tensor(MARK)).all(1).nonzero().flatten().tolist()
    assert sheet.shape == (240, 1200, 3) and orange == [3, 11]
    assert torch.equal(sheet[4:116:4, 4:116:4, 1], images[0]), "the digits themselves stay as they are"
    assert OtherImages().pictures(Samples(images, labels, 1))["grid"].shape == (240, 1200), "which nobody can read"


class Look(Callback):
    """Notes what the network had learned in each validation and after each step."""

    def __init__(self):
        self.validated, self.trained = [], []

    def on_validation_batch_end(self, trainer, module, *_):
        self.validated.append(module.net.more.item())

    def on_train_batch_end(self, trainer, module, *_):
        self.trained.append(module.net.more.item())


def test_the_averaged_weights_are_validated_and_measured_and_the_raw_ones_trained(tmp_path, digits, monkeypatch):
    measured = []
    scorer = lambda held_out, training, device: lambda samples: measured.append(samples) or []  # noqa: E731
    monkeypatch.setattr(digits.problem, "scorer", scorer)
    look, ema = Look(), EMA(decay=0.5)
    fit(tmp_path, digits, ema, look, Evaluate(every_n_epochs=1, samples=20))
    torch.testing.assert_close(torch.tensor(look.trained), 0.1 * torch.arange(1, 5.0))
    average = 0.1
    for n, now in enumerate(look.trained[1:], 1):
        decay = min(0.5, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * now
    assert average_of(ema).net.more.item() == pytest.approx(average)
    assert look.validated == [pytest.approx(average)]
    (samples,) = measured
    assert torch.equal(samples.labels, labels_like(digits.real("val")[1], 20))
    more = samples.values[:, 14, 14].float() - torch.tensor(LEVELS)[samples.labels]
    assert (more - 127.5 * average).abs().max() < 1


def test_sampling_is_in_evaluation_mode_and_leaves_the_mode_as_it_was():
    net = Shades()
    for mode in (True, False):
        net.train(mode)
        generate(Flow(net), torch.arange(3), Sampler(2, "euler"))
        assert net.training == mode
    assert not any(training for training, _, _ in net.seen)


def test_guidance_acts_in_the_samplers_interval():
    net = Shades()
    generate(Flow(net), torch.arange(3), Sampler(10, "euler", 2.0, (0.35, 0.65)))
    assert [count for _, count, _ in net.seen] == [3] * 4 + [6] * 3 + [3] * 3
    assert [t for *_, t in net.seen] == pytest.approx([n / 10 for n in range(10)])


def test_guidance_acts_by_the_samplers_power():
    flow, y = Flow(Shades()), torch.arange(3)
    x, t = torch.randn(3, 1, 28, 28), torch.tensor(0.5)
    plain = flow.guided(y, Sampler(2, "euler"))(x, t)
    levels = 20 * (y - 10) / 127.5  # from "no label" to the labels: a doubt of 28 of them, over 28 x 28 pixels
    for power in (1.0, 2.0):
        guided = flow.guided(y, Sampler(2, "euler", 1.01, guidance_power=power))(x, t)
        more = 0.01 * (28 * levels.abs()) ** power * 2 * levels
        torch.testing.assert_close(guided - plain, match_dims(more, x).expand_as(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_learning_rate_moves_with_each_optimizer_step_to_its_end(tmp_path, digits, decay):
    class Rates(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.seen = [*getattr(self, "seen", []), optimizer.param_groups[0]["lr"]]

    rates = Rates()
    steps = {"limit_train_batches": 8, "max_epochs": 2, "accumulate_grad_batches": 2}
    fit(tmp_path, digits, rates, rate=0.5, warmup_steps=2, decay=decay, **steps)
    assert rates.seen == pytest.approx([0.5 * learning_rate_factor(step, 2, 8, decay) for step in range(8)])


def test_muon_follows_its_recurrence():
    kernel, gradients = nn.Parameter(torch.randn(4, 3, 2, 2)), torch.randn(3, 4, 3, 2, 2)
    expected, momentum = kernel.detach().clone(), torch.zeros(4, 3, 2, 2)
    optimizer = Muon([kernel], lr=0.1, weight_decay=0.2, momentum=0.7)
    for gradient in gradients:
        kernel.grad = gradient.clone()
        optimizer.step()
        momentum = 0.7 * momentum + 0.3 * gradient
        (update,) = orthogonalize([(0.3 * gradient + 0.7 * momentum).flatten(1)])
        expected = (1 - 0.1 * 0.2) * expected - 0.1 * 0.2 * 12**0.5 * update.view_as(expected)
        torch.testing.assert_close(kernel.detach(), expected)


@pytest.mark.parametrize("momentum", [1.0, -0.1, float("nan")])
def test_muon_refuses_a_momentum_that_never_moves_or_has_no_sense(momentum):
    with pytest.raises(ValueError, match="momentum"):
        Muon([nn.Parameter(torch.ones(1))], momentum=momentum)


class Scores(Callback):
    """Logs a number in each validation, which falls and rises again."""

    def on_validation_epoch_end(self, trainer, module):
        module.log("score", [0.5, 0.3, 0.7, 0.4][trainer.global_step // 2 - 1])


@pytest.mark.parametrize(
    ("settings", "best", "kept"),
    [
        ({"mode": "min"}, 4, []),
        ({"mode": "max"}, 6, []),
        ({"mode": "min", "save_top_k": 2}, 4, ["step=4.ckpt", "step=8.ckpt"]),
        ({"mode": "max", "save_top_k": -1, "filename": "{step}-a"}, 6, [f"step={n}-a.ckpt" for n in (2, 4, 6, 8)]),
        ({"mode": "max", "filename": "top"}, 6, ["top.ckpt"]),
    ],
)
def test_the_best_is_by_the_score_that_is_named(tmp_path, digits, monkeypatch, settings, best, kept):
    monkeypatch.setattr(Trainer, "log_dir", tmp_path)
    keep = KeepBest(monitor="score", **settings)
    often = {"limit_train_batches": 8, "val_check_interval": 2}
    fit(tmp_path, digits, Scores(), keep, enable_checkpointing=True, plugins=[CheckpointFiles()], **often)
    assert load_checkpoint(tmp_path / "checkpoints/best.ckpt")["global_step"] == best
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(["best.ckpt", *kept])


def test_a_name_that_is_taken_is_counted_up_only_if_asked(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(Trainer, "log_dir", tmp_path)
    for counted, names in ((False, {"top.ckpt"}), (False, {"top.ckpt"}), (True, {"top.ckpt", "top-v1.ckpt"})):
        keep = KeepBest("top", "score", enable_version_counter=counted)
        often = {"limit_train_batches": 2, "val_check_interval": 2, "enable_checkpointing": True}
        fit(tmp_path, digits, Scores(), keep, plugins=[CheckpointFiles()], **often)
        assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"best.ckpt"} | names


@pytest.mark.parametrize("kind", [DrawSamples, Evaluate])
@pytest.mark.parametrize(
    ("when", "steps"),
    [
        ({"every_n_epochs": 2}, [8, 16]),
        ({"every_n_epochs": 0, "every_n_steps": 3}, [3, 6, 9, 12, 15]),
        ({"every_n_epochs": 1, "every_n_steps": 8}, [4, 8, 12, 16]),
        ({"every_n_epochs": 0}, []),
        ({"every_n_epochs": 0, "at_steps": [1, 6, 99]}, [1, 6]),
        ({"every_n_epochs": 2, "at_steps": (1, 8)}, [1, 8, 16]),
        ({}, [4, 8, 12, 16]),
    ],
)
def test_pictures_and_scores_come_when_they_are_asked_for(tmp_path, digits, kind, when, steps):
    done = []
    periodic = kind(**when)
    periodic.act = lambda trainer, module: done.append(trainer.global_step)
    fit(tmp_path, digits, periodic, max_epochs=4)
    assert done == (steps if when or kind is DrawSamples else [])


def test_a_step_of_several_batches_counts_once(tmp_path, digits):
    done = []
    periodic = DrawSamples(0, every_n_steps=1)
    periodic.act = lambda trainer, module: done.append(trainer.global_step)
    fit(tmp_path, digits, periodic, limit_train_batches=6, accumulate_grad_batches=2)
    assert done == [1, 2, 3]


@pytest.mark.parametrize(("kind", "room"), [(DrawSamples, drawing), (Evaluate, evaluation)])
def test_pictures_and_scores_are_of_the_noise_and_number_asked_for(tmp_path, digits, monkeypatch, kind, room):
    monkeypatch.setattr(Trainer, "log_dir", tmp_path)
    seen, really = [], room.generate
    monkeypatch.setattr(room, "generate", lambda *a, **s: seen.append(really(*a, **s, decode=torch.clone)) or really(*a, **s))
    monkeypatch.setattr(digits.problem, "scorer", lambda *_: lambda samples: [])
    monkeypatch.setattr(Shades, "forward", lambda net, x, t, y, until=None: 0 * x + 0 * net.more)
    for seed in (0, 0, 7):
        fit(tmp_path, digits, kind(1, seed=seed, **({"rows": 2} if kind is DrawSamples else {"samples": 20})), rate=0.0)
    first, again, other = (samples.values for samples in seen)
    assert len(first) == 20 and torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(other[3:4], draw_noise(4, (1, 28, 28), streams.generator("cpu", 7, "sampling"))[3:])


MEASURED = Measurement("score", Estimate(0.5, 0.01), Estimate(0.25, 0.0))


def test_quality_is_measured_by_each_number_of_steps(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(digits.problem, "headlines", ("quality/score",))
    monkeypatch.setattr(digits.problem, "scorer", lambda *_: lambda samples: [MEASURED])
    trainer, module = fit(tmp_path, digits)
    points = Evaluate(samples=20, steps=(3, 1, 3)).by_steps(trainer, module, "val")
    assert points == [
        {"steps": n, "evaluations": n, "samples": 20, "scores": {"score": {"value": 0.5, "error": 0.01}}} for n in (1, 3)
    ]
    module.objective.matching = DistributionMatching("some")  # the network of a single step is not measured with more
    assert Evaluate(samples=20, steps=(3, 1, 3)).by_steps(trainer, module, "val") == points[:1]


def test_validation_measures_as_many_samples_as_it_is_asked_for(tmp_path, digits, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digits.problem, "headlines", ())
    monkeypatch.setattr(digits.problem, "scorer", lambda *_: lambda samples: [MEASURED])
    trainer, module = fit(tmp_path, digits, Evaluate(samples=20, test_samples=30))
    trainer.validate(module, digits, verbose=False)
    assert "30 samples with the labels of the val split" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics-val.json").read_text())["samples"] == 30


class Seeds(Callback):
    """Writes down the seeds of a run."""

    def on_train_start(self, trainer, module):
        Path("seeds").write_text(f"{module.seed} {trainer.datamodule.seed}")


def test_the_seed_of_a_run_reaches_its_module_and_its_data(tmp_path):
    found = []
    for seed in (0, 0, 1):
        asked = ["--trainer.max_epochs", 1, "--seed_everything", seed, "--trainer.callbacks", "test_watched.Seeds"]
        folder = tmp_path / str(len(found))
        folder.mkdir()
        assert run_here("train.py", *TOY, *asked, cwd=folder).returncode == 0
        assert (folder / "seeds").read_text() == f"{seed} {seed}"
        found.append(losses(folder))
    assert found[0] == found[1] != found[2]
