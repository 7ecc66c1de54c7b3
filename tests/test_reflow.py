"""Reflow: pairs that are drawn once and whole, marginals that stay, paths that grow straight, and files that are refused."""

import pytest
import torch
from conftest import assert_one_line_error, run_here
from oracle import MEAN, SPREAD, Gaussian

from flowmatch_mnist.data import reflow
from flowmatch_mnist.data.curve import CurveDataModule
from flowmatch_mnist.data.reflow import draw_pairs, load_pairs, shard_path, straightness
from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.flow.solvers import time_grid, trajectory
from flowmatch_mnist.networks.base import Network
from flowmatch_mnist.sampling.generate import Flow, Sampler
from flowmatch_mnist.sampling.units import UNITS
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import load_weights, save_weights

EXACT = Sampler(steps=16, solver="rk4")


class Known(Network):
    """A network that puts out the exact velocity of a Gaussian's flow."""

    shape = (2,)

    def __init__(self, mean=MEAN):
        super().__init__(classes=10, embedding_dim=4, spans=False)
        self.mean, self.arguments = mean, {"mean": mean}
        for parameter in self.parameters():
            torch.nn.init.zeros_(parameter)

    def forward(self, x, t, y, until=None):
        return Gaussian(PATHS["linear"], "velocity", self.mean)(x, t)


def flow(net=None):
    return Flow(net or Known(), units=UNITS["plane"])


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(reflow, "SHARD", 100)


@pytest.fixture
def drawn(tmp_path, small_shards):
    """A folder of 300 pairs in three files."""
    draw_pairs(tmp_path / "pairs", flow(), EXACT, 300)
    return tmp_path / "pairs"


def test_pairs_are_the_ends_of_trajectories(drawn):
    pairs = load_pairs(drawn, (2,), 10, "plane")
    assert pairs["x0"].shape == (300, 2) and pairs["x0"].dtype == torch.float16
    # The flow of a Gaussian takes x0 to MEAN + SPREAD x0.
    torch.testing.assert_close(pairs["x1"].float(), MEAN + SPREAD * pairs["x0"].float(), atol=2e-3, rtol=0)
    assert pairs["y"].tolist() == [n % 10 for n in range(300)]


def test_reflow_keeps_the_marginals_and_straightens(tmp_path, monkeypatch):
    """The best student, E[x1 - x0 | x_t] over the pairs, carries noise to the same Gaussian, now on straight lines."""
    monkeypatch.setattr(reflow, "SHARD", 2000)
    draw_pairs(tmp_path, flow(), EXACT, 4000)
    pairs = load_pairs(tmp_path, (2,), 10, "plane")
    x0, x1 = pairs["x0"].double(), pairs["x1"].double()

    def student(x, t):
        # Linear regression of x1 - x0 on x_t, in each coordinate: exact for jointly Gaussian pairs.
        x_t = t * x1 + (1 - t) * x0
        centred, aim = x_t - x_t.mean(0), x1 - x0
        slope = (centred * (aim - aim.mean(0))).mean(0) / centred.square().mean(0)
        return aim.mean(0) + slope * (x - x_t.mean(0))

    noise = torch.randn(2000, 2, dtype=torch.float64)
    teacher = Gaussian(PATHS["linear"], "velocity")
    for steps in (1, 2, 40):
        *_, reached = trajectory(student, noise, time_grid(steps), "euler")
        torch.testing.assert_close(reached, MEAN + SPREAD * noise, atol=5e-3, rtol=0)
    before, after = (
        straightness(torch.stack(list(trajectory(v, noise, time_grid(100), "euler")))).mean() for v in (teacher, student)
    )
    assert before > 0.05 and after < 1e-4


def test_straightness_of_a_known_curve():
    # x = sin(pi t) goes out and back: x1 - x0 = 0, and the mean of its velocity's square is pi^2 / 2.
    states = torch.sin(torch.pi * torch.linspace(0, 1, 1001, dtype=torch.float64)).view(-1, 1, 1)
    torch.testing.assert_close(straightness(states), torch.full((1,), torch.pi**2 / 2).double(), atol=1e-3, rtol=0)
    assert straightness(torch.linspace(0, 1, 11).view(-1, 1, 1)).item() < 1e-10


def test_a_drawing_goes_on_where_it_stopped(drawn, tmp_path):
    whole = load_pairs(drawn, (2,), 10, "plane")
    kept = shard_path(drawn, 0).stat().st_mtime_ns
    shard_path(drawn, 1).unlink()
    shard_path(drawn, 2).write_bytes(shard_path(drawn, 2).read_bytes()[:500])
    assert draw_pairs(drawn, flow(), EXACT, 300) == (3, 2)
    assert shard_path(drawn, 0).stat().st_mtime_ns == kept
    again = load_pairs(drawn, (2,), 10, "plane")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("other", [{"seed": 1}, {"count": 200}, {"sampler": Sampler(8, "rk4")}, {"flow": "weights"}])
def test_another_drawing_does_not_mix_in(drawn, other):
    net = Known()
    if other.pop("flow", None):
        torch.nn.init.ones_(net.label.weight)
    wanted = {"flow": flow(net), "sampler": EXACT, "count": 300} | other
    with pytest.raises(UserError, match="another"):
        draw_pairs(drawn, **wanted)


def test_bad_pairs_are_refused(drawn):
    with pytest.raises(UserError, match="shape"):
        load_pairs(drawn, (1, 28, 28), 10, "plane")
    with pytest.raises(UserError, match="labels 0 to 4"):
        load_pairs(drawn, (2,), 5, "plane")
    with pytest.raises(UserError, match="pairs in plane units, but the config's data have logit units"):
        load_pairs(drawn, (2,), 10, "logit")
    pairs, metadata = load_weights(shard_path(drawn, 1))
    save_weights(shard_path(drawn, 1), pairs, {**metadata, "seed": "7"})
    with pytest.raises(UserError, match="different sets of pairs"):
        load_pairs(drawn, (2,), 10, "plane")
    shard_path(drawn, 1).write_bytes(b"truncated")
    with pytest.raises(UserError, match="damaged"):
        load_pairs(drawn, (2,), 10, "plane")
    pairs, metadata = load_weights(shard_path(drawn, 0))
    save_weights(shard_path(drawn, 0), pairs, {**metadata, "path": "cosine"})
    with pytest.raises(UserError, match="linear path, but has pairs of cosine"):
        load_pairs(drawn, (2,), 10, "plane")
    with pytest.raises(UserError, match="draw some with"):
        load_pairs(drawn / "nowhere", (2,), 10, "plane")


def test_the_data_module_yields_the_pairs_themselves(drawn, small_shards):
    data = reflow.ReflowDataModule(str(drawn), CurveDataModule(prompted=True, samples=1000), batch_size=40, val_size=50)
    data.setup("fit")
    held_out = set()
    for batches, count in ((data.train_dataloader(), 240), (data.val_dataloader(), 50)):
        seen = 0
        for batch in batches:
            x0, x1, y = data.on_after_batch_transfer(batch, 0)
            assert x0.dtype == x1.dtype == torch.float32
            torch.testing.assert_close(x1, MEAN + SPREAD * x0, atol=2e-3, rtol=0)
            held_out |= {tuple(row) for row in x0.tolist()}
            seen += len(y)
        assert seen == count
    assert len(held_out) == 290  # no pair is in both splits


def test_twice_in_a_row_by_the_command_line(tmp_path, data_dir):
    """Pairs of a run, a run on the pairs, pairs of that run, and a run on those; then what is refused."""
    toy = ("--config", data_dir.parent / "configs" / "toy.yaml", "--trainer.max_epochs", 1)
    fast = ("--data.samples", 2000, "--sampling.every_n_epochs", 0, "--evaluation.every_n_epochs", 0)
    assert run_here("train.py", *toy, *fast, cwd=tmp_path).returncode == 0
    student = ("--config", data_dir.parent / "configs" / "toy_reflow.yaml", "--trainer.max_epochs", 1)
    small = ("--data.batch_size", 50, "--data.val_size", 100, "--evaluation.every_n_epochs", 0, "--sampling.rows", 5)
    teacher = "runs/toy/version_0/checkpoints/last.ckpt"
    for again in range(2):
        draw = ("--teacher", teacher, "--pairs", 2500, "--steps", 2, "--out", f"pairs{again}")
        done = run_here("flowmatch_mnist/reflow.py", *draw, cwd=tmp_path)
        assert done.returncode == 0 and f"pairs{again} holds 2,500 pairs in 1 files, 1 of them drawn now" in done.stdout
        pairs = ("--data.pairs", f"pairs{again}", "--model.start", teacher)
        done = run_here("train.py", *student, *small, *pairs, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        teacher = f"runs/toy_reflow/version_{again}/checkpoints/last.ckpt"
    (tmp_path / "runs/toy_reflow/version_0/checkpoints/last.ckpt").unlink()  # what the newest run began with
    done = run_here("train.py", "--ckpt_path", "last", "--trainer.max_epochs", 2, cwd=tmp_path)
    assert done.returncode == 0 and f"going on from {teacher}" in done.stdout, done.stderr
    mixed = ("--teacher", teacher, "--pairs", 2500, "--out", "pairs0")
    assert_one_line_error(run_here("flowmatch_mnist/reflow.py", *mixed, cwd=tmp_path), "pairs0", "another")
    cosine = (*student, *small, "--data.pairs", "pairs0", "--model.path", "cosine")
    assert_one_line_error(run_here("train.py", *cosine, cwd=tmp_path), "straight lines", "cosine")
    nowhere = ("--teacher", "few-step", "--out", "other", "--device", "abacus")
    assert_one_line_error(run_here("flowmatch_mnist/reflow.py", *nowhere, cwd=tmp_path), "no device 'abacus'")
    (tmp_path / "file").touch()
    taken = ("--teacher", "few-step", "--out", "file")
    assert_one_line_error(run_here("flowmatch_mnist/reflow.py", *taken, cwd=tmp_path), "--out file is a file; choose a folder")
    foreign = (*student, *small, "--data.pairs", "pairs0", "--model.start", "mnist")
    assert_one_line_error(run_here("train.py", *foreign, cwd=tmp_path), "mnist.safetensors", "do not fit")
