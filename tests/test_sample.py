"""`sample.py` as a person runs it, and the functions below it."""

import json
import os
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, Evil, assert_one_line_error, run, run_here
from PIL import Image, ImageSequence

from flowmatch_mnist.evaluation.classifiers import CLASSIFIERS, load_classifier
from flowmatch_mnist.evaluation.metrics import FrechetDistance, classify
from flowmatch_mnist.evaluation.problems import labels_like
from flowmatch_mnist.images import mnist
from flowmatch_mnist.images.pictures import grid, save_gif
from flowmatch_mnist.sampling import weights
from flowmatch_mnist.sampling.generate import Flow, Sampler, generate
from flowmatch_mnist.sampling.units import UNITS
from flowmatch_mnist.sampling.weights import PRETRAINED, draw, load, newest_checkpoint, save
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import load_weights, replacing, save_checkpoint, save_weights

CHECKPOINT = "runs/tiny/version_0/checkpoints/last.ckpt"


def sample(cwd, *arguments, run=run_here):
    done = run("sample.py", *arguments, cwd=cwd)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 2 + sum(str(argument).startswith("seven.png") for argument in arguments)
    return done.stdout


def arrays(cwd, *arguments):
    sample(cwd, *arguments, "--out", "out.npz")
    with np.load(cwd / "out.npz") as archive:
        return archive["images"], archive["labels"]


def test_draws_a_grid_with_the_newest_run_and_says_so(tiny_run):
    stdout = sample(tiny_run, "7", run=run)
    assert (
        CHECKPOINT in stdout
        and "drew 1 digits" not in stdout
        and "midpoint, 2 steps, guidance 1, 4 evaluations each, seed 0" in stdout
    )
    with Image.open(tiny_run / "digits.png") as picture:
        assert picture.size == (30 * 4, 30 * 4) and picture.mode == "L"


def test_a_range_makes_a_column_of_each_and_a_list_keeps_its_order(tiny_run):
    images, labels = arrays(tiny_run, "0-9", "--per-class", 8, "--steps", 1)
    assert images.shape == (80, 28, 28) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and labels.tolist() == [*range(10)] * 8
    assert arrays(tiny_run, "3", "1", "4-5", "--steps", 1)[1].tolist() == [3, 1, 4, 5]
    sample(tiny_run, "7", "--steps", 1, "--out", "capitals/ARRAYS.NPZ")
    assert [path.name for path in (tiny_run / "capitals").iterdir()] == ["ARRAYS.NPZ"]
    sample(tiny_run, "0-9", "--per-class", 2, "--steps", 1, "--out", "new/folder/grid.png")
    with Image.open(tiny_run / "new/folder/grid.png") as picture:
        assert picture.size == (10 * 30 * 4, 2 * 30 * 4)


def test_a_gif_shows_the_way_from_noise_to_digit(tiny_run):
    sample(tiny_run, "1", "2", "--steps", 5, "--out", "way.gif")
    with Image.open(tiny_run / "way.gif") as picture:
        assert picture.n_frames == 6 and picture.size == (2 * 30 * 4, 30 * 4)


def test_the_same_seed_gives_the_same_digits_whatever_the_batch_size(tiny_run):
    together, _ = arrays(tiny_run, "0-9", "--steps", 2)
    apart, _ = arrays(tiny_run, "0-9", "--steps", 2, "--batch-size", 3)
    other, _ = arrays(tiny_run, "0-9", "--steps", 2, "--seed", 1)
    # Sums in another order may round a grey level the other way.
    assert abs(together.astype(int) - apart).max() <= 1
    assert abs(together.astype(int) - other).max() > 50


def test_an_adaptive_solver_and_guidance_are_at_hand(tiny_run):
    assert re.search(r"dopri5, 2 steps, guidance 1, \d+ evaluations", sample(tiny_run, "3", "--solver", "dopri5", "--steps", 2))
    assert "euler, 2 steps, guidance 2, 4 evaluations each" in sample(
        tiny_run, "3", "--solver", "euler", "--steps", 2, "--guidance", 2
    )


def test_other_ways_through_the_noise(tiny_run):
    stdout = sample(tiny_run, "3", "--spacing", "log_snr", "--churn", 0.5, "--guidance", 2, "--guidance-interval", "0.2-0.9")
    assert "midpoint, 2 steps, guidance 2 from t = 0.2 to 0.9, spacing log_snr, churn 0.5" in stdout
    together, _ = arrays(tiny_run, "0-9", "--churn", 1)
    apart, _ = arrays(tiny_run, "0-9", "--churn", 1, "--batch-size", 3)
    assert abs(together.astype(int) - apart).max() <= 1
    assert abs(together.astype(int) - arrays(tiny_run, "0-9")[0]).max() > 50


def test_interpolates_between_two_noises(tiny_run):
    images, labels = arrays(tiny_run, "3", "8", "--interpolate", 5, "--per-class", 2)
    assert labels.tolist() == [3] * 5 + [8] * 5 + [3] * 5 + [8] * 5
    rows = images.astype(int).reshape(4, 5, -1)
    steps, whole = abs(rows[:, 1:] - rows[:, :-1]).mean(), abs(rows[:, -1] - rows[:, 0]).mean()
    assert steps < 0.6 * whole
    assert abs(rows[0, 0] - rows[2, 0]).mean() > 10, "each row has noises of its own"


def test_a_picture_is_drawn_again_from_its_own_noise(tiny_run, data_dir):
    real = mnist.load(data_dir, "test")[0][0].numpy().astype(int)  # a seven
    ways = ("--solver", "rk4", "--steps", 32, "--data-dir", data_dir)
    again, _ = arrays(tiny_run, "7", "2", "--from-image", "test:0", *ways)
    assert abs(again[0] - real).max() <= 2
    Image.fromarray(real.astype(np.uint8)).save(tiny_run / "seven.png")
    from_file, _ = arrays(tiny_run, "7", "--from-image", "seven.png:7", *ways)
    assert abs(from_file[0].astype(int) - again[0]).max() <= 1
    between, _ = arrays(tiny_run, "7", "--interpolate", 3, "--from-image", "test:0", "--from-image", "seven.png:7", *ways)
    assert abs(between.astype(int) - again[0]).max() <= 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["7", "--device", "abacus"], ["abacus", "--device cpu"]),
        (["7", "--checkpoint", "nowhere.ckpt"], ["nowhere.ckpt"]),
        (["7", "--checkpoint", "half.ckpt"], ["half.ckpt", "damaged"]),
        (["7", "--checkpoint", "shape.ckpt"], ["shape.ckpt", "do not fit"]),
        (["7", "--checkpoint", "foreign.ckpt"], ["foreign.ckpt", "no checkpoint of this project"]),
        (["7", "--checkpoint", "network.ckpt"], ["network.ckpt", "os.system"]),
        (["7", "--checkpoint", "nan.ckpt"], ["not finite"]),
        (["7", "--checkpoint", "evil.ckpt"], ["evil.ckpt"]),
        (["7", "--churn", "-1"], ["churn", "at least 0"]),
        (["7", "--churn", "1", "--solver", "dpmpp_2m"], ["churn", "dpmpp_2m", "euler, midpoint"]),
        (["7", "--from-image", "nowhere.png:7"], ["nowhere.png"]),
        (["7", "--from-image", "half.ckpt:7"], ["half.ckpt", "no picture"]),
        (["7", "--checkpoint", "path.ckpt"], ["path.ckpt", "zigzag", "linear, cosine, vp"]),
        (["7", "--checkpoint", "prediction.ckpt"], ["prediction.ckpt", "velocity, data, noise"]),
        (["7", "--checkpoint", "units.ckpt"], ["units.ckpt", "linear, logit, plane"]),
        (["7", "--out", "half.ckpt/digits.png"], ["half.ckpt/digits.png", "cannot write"]),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing_behind(tiny_run, tmp_path, arguments, words):
    whole = (tiny_run / CHECKPOINT).read_bytes()
    (tmp_path / "runs/x/version_0/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/x/version_0/checkpoints/last.ckpt").write_bytes(whole)
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    for name, change in {
        "shape": lambda c: c["flowmatch_mnist"]["arguments"].update(channels=[4, 4, 4]),
        "foreign": lambda c: c.pop("flowmatch_mnist"),
        "network": lambda c: c["flowmatch_mnist"].update(network="os.system"),
        "path": lambda c: c["flowmatch_mnist"].update(path="zigzag"),
        "prediction": lambda c: c["flowmatch_mnist"].update(prediction="future"),
        "units": lambda c: c["flowmatch_mnist"].update(units="sepia"),
        "nan": lambda c: c["state_dict"]["net.stem.bias"].fill_(float("nan")),
    }.items():
        checkpoint = torch.load(tiny_run / CHECKPOINT, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, tmp_path / f"{name}.ckpt")
    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    before = sorted(tmp_path.rglob("*"))
    assert_one_line_error(run_here("sample.py", *arguments, cwd=tmp_path), *words)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_evil_file_would_have_worked_without_our_care(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "owned").is_dir()


def test_without_any_run_it_draws_with_the_weights_in_the_package(tmp_path):
    stdout = sample(tmp_path, "0-9", run=run)
    assert "mnist.safetensors" in stdout and (tmp_path / "digits.png").is_file()


def test_the_weights_in_the_package_can_be_asked_for_beside_a_run(tiny_run):
    assert "mnist.safetensors" in sample(tiny_run, "7", "--weights", "mnist", "--steps", 1)
    assert_one_line_error(
        run_here("sample.py", "7", "--weights", "mnist", "--checkpoint", CHECKPOINT, cwd=tiny_run), "not allowed with"
    )


def test_the_weights_in_the_package_draw_as_well_as_they_say(data_dir):
    """A few of the digits whose scores stand in each file, drawn and measured anew."""
    images, labels = mnist.load(data_dir, "test")
    classifiers = {}
    for name in CLASSIFIERS:
        net = load_classifier(name)
        classifiers["" if name == "digitnet" else f"{name}/"] = net, FrechetDistance(classify(net, images)[0])
    for path in PRETRAINED.values():
        flow, sampler = load(path)
        metadata = load_weights(path)[1]
        every = json.loads(metadata["scores"])
        assert {int(count): len(seeds) for count, seeds in every.items()} == {500: 1, 10_000: 3}
        count, (scores,) = 500, every["500"]
        drawn = generate(flow, labels_like(labels, count), sampler)
        for by, (net, distance) in classifiers.items():
            features, digits = classify(net, drawn.values)
            accuracy, its_error, *_ = scores[f"{by}label accuracy"]
            assert (digits == drawn.labels).double().mean() == pytest.approx(accuracy, abs=its_error / 2)
            expected, its_error, *_ = scores[f"{by}Frechet distance"]
            assert distance(features) == pytest.approx(expected, abs=its_error / 2)
        assert path.stat().st_size < 6e6 and metadata["command"].split(" && ")[-1].startswith("python train.py")


def test_a_saved_model_is_loaded_as_it_was(tmp_path, tiny_net):
    flow, sampler = Flow(tiny_net, "vp", "noise", UNITS["logit"]), Sampler(3, "heun", 2.0, (0.1, 0.9))
    save(tmp_path / "model.safetensors", flow, sampler, {"seed": "7"})
    again, its_sampler = load(tmp_path / "model.safetensors")
    assert again.describe(its_sampler) == flow.describe(sampler)
    assert all(torch.equal(a, b) for a, b in zip(again.net.parameters(), flow.net.parameters(), strict=True))
    save_weights(tmp_path / "other.safetensors", flow.net.state_dict(), {})
    for name, words in (("other.safetensors", "holds no model"), ("none.safetensors", "missing")):
        assert_one_line_error(run_here("sample.py", "7", "--checkpoint", name, cwd=tmp_path), name, words)


def test_the_newest_run_is_chosen(tmp_path):
    for age, name in ((10, "old"), (5, "new"), (20, "oldest")):
        path = tmp_path / name / "version_0" / "checkpoints" / "last.ckpt"
        save_checkpoint(path, {})
        os.utime(path, (1e9 - age, 1e9 - age))
    assert "new/" in str(newest_checkpoint(tmp_path))
    assert "oldest/" in str(newest_checkpoint(tmp_path, "oldest"))
    save_checkpoint(tmp_path / "old/version_0/checkpoints/best.ckpt", {})
    assert newest_checkpoint(tmp_path, file="best.ckpt") == tmp_path / "old/version_0/checkpoints/best.ckpt"
    with pytest.raises(UserError, match="none"):
        newest_checkpoint(tmp_path, "none")


def test_a_model_goes_to_its_device(tmp_path, tiny_net, monkeypatch):
    save(tmp_path / "model.safetensors", Flow(tiny_net), Sampler(), {})
    for device in ("cpu", "meta"):
        flow, _ = load(tmp_path / "model.safetensors", device)
        assert {parameter.device.type for parameter in flow.net.parameters()} == {device}
    seen = []
    monkeypatch.setattr(
        weights, "load", lambda path, device: seen.append((path, device)) or (Flow(tiny_net), Sampler(1, "euler"))
    )
    for asked in ({}, {"weights": "few-step", "device": "abacus"}):
        draw([1], **asked)
    assert seen == [(PRETRAINED["mnist"], "cpu"), (PRETRAINED["few-step"], "abacus")]


def test_a_checkpoint_gives_the_averaged_weights(tiny_run):
    checkpoint = torch.load(tiny_run / CHECKPOINT, weights_only=True)
    flow, sampler = load(tiny_run / CHECKPOINT)
    assert sampler == Sampler(steps=2)
    for name, value in flow.net.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][f"net.{name}"])
    assert any(
        not torch.equal(value, checkpoint["current_model_state"][name]) for name, value in checkpoint["state_dict"].items()
    )


def test_more_digits_leave_the_first_ones_as_they_were(tiny_net):
    flow = Flow(tiny_net)
    few = generate(flow, torch.arange(5), Sampler(steps=2))
    many = generate(flow, torch.arange(10), Sampler(steps=2), keep_states=True)
    assert (few.values.int() - many.values[:5].int()).abs().max() <= 1
    assert many.states.shape == (3, 10, 28, 28) and torch.equal(many.states[-1], many.values)


def test_a_grid_is_rows_of_cells():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None].expand(5, 2, 3)
    sheet = grid(images, columns=2, scale=1)
    assert sheet.shape == (3 * 4, 2 * 5)
    assert sheet[1::4, 1::5].tolist() == [[0, 1], [2, 3], [4, 0]]
    assert sheet[0, 0] == 64
    assert torch.equal(grid(images, 2, scale=3)[::3, ::3], sheet)


def test_an_animation_shows_each_state_for_a_while_and_holds_the_last(tmp_path):
    frames = 50 * torch.arange(3, dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    for settings, durations in (({}, [80, 80, 1200]), ({"milliseconds": 40, "hold": 500}, [40, 40, 500])):
        save_gif(frames, tmp_path / "way.gif", **settings)
        with Image.open(tmp_path / "way.gif") as picture:
            shown = [(frame.info["duration"], frame.convert("L").getpixel((1, 1))) for frame in ImageSequence.Iterator(picture)]
            assert shown == [*zip(durations, (0, 50, 100), strict=True)] and picture.info["loop"] == 0


@pytest.mark.parametrize("option", [("--steps", 4), ("--solver", "heun"), ("--from-image", "test:0")])
def test_a_network_of_one_step_is_not_asked_for_more(tmp_path, data_dir, option):
    done = run_here("sample.py", 7, "--weights", "one-step", *option, "--data-dir", data_dir, cwd=tmp_path)
    assert_one_line_error(done, "learned only one step from noise to data; use 1 step of average, or other weights")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "digits.png"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_help_is_readable():
    done = run("sample.py", "--help", cwd=ROOT)
    assert done.returncode == 0 and "python sample.py 0-9 --per-class 8" in done.stdout
