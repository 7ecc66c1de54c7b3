"""The evaluator: each measure against a closed form or a case whose answer is known, and the whole on real digits."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import assert_one_line_error, run_here

import flowmatch_mnist.digitnet as train_digitnet
from flowmatch_mnist.evaluation import digitnet
from flowmatch_mnist.evaluation.metrics import (
    Evaluator,
    Manifold,
    Measurement,
    frechet_distance,
    kernel_distance,
    label_accuracy,
    read_digits,
    table,
)
from flowmatch_mnist.images import mnist
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import load_weights

DIM = digitnet.DigitNet.num_features


def gaussian(mean, covariance, count=500):
    """Points whose sample mean and covariance are exactly these."""
    points = torch.randn(count, DIM, dtype=torch.float64)
    points -= points.mean(0)
    whitened = points @ torch.linalg.inv(torch.linalg.cholesky(points.T.cov())).T
    return mean + whitened @ torch.linalg.cholesky(covariance).T


def random_covariance():
    factor = torch.randn(DIM, DIM, dtype=torch.float64) / DIM**0.5
    return factor @ factor.T + 0.1 * torch.eye(DIM, dtype=torch.float64)


def test_the_frechet_distance_of_two_gaussians():
    means = torch.randn(2, DIM, dtype=torch.float64)
    covariances = random_covariance(), random_covariance()
    root = scipy.linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).real
    expected = (means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * np.trace(root)
    found = frechet_distance(gaussian(means[0], covariances[0]), gaussian(means[1], covariances[1], count=300))
    assert found == pytest.approx(expected.item(), rel=1e-6)


def test_equal_sets_are_at_no_distance():
    points = gaussian(torch.zeros(DIM).double(), random_covariance())
    assert frechet_distance(points, points[torch.randperm(len(points))]) == pytest.approx(0, abs=1e-6)
    assert Manifold(points).share(points) == 1


def test_the_kernel_distance_is_the_unbiased_one():
    first, second = torch.randn(50, DIM).double(), 0.3 + torch.randn(50, DIM).double()

    def kernel(a, b):
        return (a @ b.T / DIM + 1) ** 3

    within = sum((kernel(x, x).sum() - kernel(x, x).trace()) / (50 * 49) for x in (first, second))
    expected = within - 2 * kernel(first, second).mean()
    assert kernel_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)


def test_the_kernel_distance_leaves_the_global_generator_alone_and_repeats():
    first, second = torch.randn(300, DIM).double(), torch.randn(300, DIM).double()
    before = torch.get_rng_state()
    assert kernel_distance(first, second, subset_size=100) == kernel_distance(first, second, subset_size=100)
    assert torch.equal(torch.get_rng_state(), before)


def test_label_accuracy_overall_and_by_digit():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    overall, by_digit = label_accuracy(torch.tensor([0, 0, 1, 1, 3, 2]), labels)
    assert overall == pytest.approx(4 / 6)
    assert by_digit[:3] == pytest.approx([2 / 3, 1, 1 / 2])
    assert np.isnan(by_digit[3:]).all()


def test_precision_and_recall_tell_what_is_missing_from_what_is_wrong():
    left, right = torch.randn(400, 2), torch.randn(400, 2) + 100
    real = torch.cat([left, right])
    half = torch.randn(400, 2)
    precision, recall = Manifold(real).share(half), Manifold(half).share(real)
    assert precision > 0.9 and 0.4 < recall <= 0.5
    half_wrong = torch.cat([half, torch.randn(400, 2) + 50])
    precision, recall = Manifold(real).share(half_wrong), Manifold(half_wrong).share(real)
    assert 0.45 < precision <= 0.5 and 0.4 < recall <= 0.5
    # Balls reach to the third nearest other point: that of 0 to 3 (and -3), that of 4 to 1 (and 7).
    line = Manifold(torch.arange(5.0)[:, None])
    assert line.share(torch.tensor([[-2.9], [6.9]])) == 1
    assert line.share(torch.tensor([[-3.1], [6.9]])) == 0.5


def some(data_dir, split, start, stop):
    """Images and labels of a split. Mixed first: in the files, the digits of a writer stand together."""
    images, labels = mnist.load(data_dir, split)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[start:stop]
    return images[order], labels[order]


@pytest.fixture(scope="session")
def evaluator(data_dir):
    return Evaluator(some(data_dir, "test", 0, 2000), some(data_dir, "train", 0, 8000))


def measure(evaluator, images, labels):
    return {m.title: m.score for m in evaluator.measure(images, labels)}


def test_the_evaluator_knows_real_digits_copies_prototypes_and_noise(evaluator, data_dir):
    images, labels = some(data_dir, "train", 8000, 8500)
    real = measure(evaluator, images, labels)
    assert real["Frechet distance ratio"] == pytest.approx(1, abs=0.3)
    assert real["label accuracy"] > 0.98 and real["precision"] > 0.8 and real["recall"] > 0.6
    assert real["near copies"] < 0.05 and abs(real["kernel distance"]) < 0.05

    copies = measure(evaluator, evaluator.training[:500], evaluator.training_labels[:500])
    assert copies["near copies"] == 1 and copies["distance to nearest training image"] < 1e-3

    # One good digit of each class, again and again: every label right, and nothing else.
    first = torch.stack([images[labels == digit][0] for digit in range(10)])
    prototypes = measure(evaluator, first.repeat(50, 1, 1), torch.arange(10).repeat(50))
    assert prototypes["label accuracy"] > 0.89 and prototypes["recall"] < 0.1
    assert prototypes["Frechet distance ratio"] > 5 * real["Frechet distance ratio"]

    noise = measure(evaluator, torch.randint(256, (500, 28, 28), dtype=torch.uint8), labels)
    assert noise["label accuracy"] < 0.3 and noise["near copies"] == 0
    assert noise["Frechet distance ratio"] > 5 * real["Frechet distance ratio"]


def test_each_measurement_has_the_baseline_of_real_data(evaluator, data_dir):
    images, labels = some(data_dir, "train", 8000, 8100)
    found = {m.name: m for m in evaluator.measure(images, labels)}
    # As many training images of each digit, drawn once for all.
    order = torch.randperm(8000, generator=streams.generator("cpu", "floor"))
    floor = torch.cat([order[evaluator.training_labels[order] == digit][: (labels == digit).sum()] for digit in range(10)])
    features = read_digits(evaluator.net, evaluator.training[floor])[0]
    assert found["Frechet distance"].baseline == pytest.approx(frechet_distance(evaluator.features, features))
    assert found["recall"].baseline == Manifold(features).share(evaluator.features)
    assert found["label accuracy"].baseline == evaluator.accuracy > 0.99
    assert found["near copies"].baseline == pytest.approx(0.01, abs=1e-3)
    with pytest.raises(UserError, match="10000 samples are more"):
        evaluator.measure(torch.zeros(10_000, 28, 28, dtype=torch.uint8), torch.arange(10_000) % 10)
    with pytest.raises(UserError, match="9 held-out images are too few"):
        Evaluator((images[:9], labels[:9]), (images, labels))


def test_the_table_and_the_tags():
    measurements = [Measurement("Frechet distance", 3.0, 1.5, ratio=True), Measurement("label accuracy by digit/7", 0.9, 1.0)]
    first, second, third = table(measurements).splitlines()
    assert first.split() == ["samples", "real", "data", "ratio"]
    assert second.split() == ["Frechet", "distance", "3.0000", "1.5000", "2.00"]
    assert third.split() == ["label", "accuracy", "by", "digit", "7", "0.9000", "1.0000"]
    assert [m.tag for m in measurements] == ["quality/Frechet distance ratio", "quality_details/label accuracy by digit 7"]


def accuracy(net, images, labels):
    return label_accuracy(read_digits(net, images)[1], labels)[0]


def test_digitnet_reads_as_well_as_its_file_claims(data_dir):
    measured = accuracy(digitnet.digitnet(), *mnist.load(data_dir, "test"))
    claimed = load_weights(digitnet.WEIGHTS)[1]
    assert measured == pytest.approx(float(claimed["test_accuracy"]), abs=2e-4)  # two images, for other processors
    assert measured >= 0.996
    assert claimed["command"].startswith("python -m flowmatch_mnist.digitnet")
    assert digitnet.WEIGHTS.stat().st_size < 1_000_000


def test_digitnet_learns_and_learns_the_same_again(data_dir, tmp_path, monkeypatch, capsys):
    train, test = mnist.load(data_dir, "train"), mnist.load(data_dir, "test")
    few = {"train": (train[0][:1500], train[1][:1500]), "test": (test[0][:500], test[1][:500])}
    monkeypatch.setattr(mnist, "load", lambda data_dir, split: few[split])
    out = tmp_path / "weights.safetensors"
    monkeypatch.setattr("sys.argv", ["digitnet", "--epochs", "2", "--out", str(out), "--data-dir", str(data_dir)])
    train_digitnet.main()
    assert f"wrote {out}" in capsys.readouterr().out
    monkeypatch.setattr(digitnet, "WEIGHTS", out)
    net = digitnet.digitnet()
    claimed = load_weights(out)[1]["test_accuracy"]
    assert accuracy(net, *few["test"]) == pytest.approx(float(claimed), abs=2e-3)
    assert accuracy(net, *few["test"]) > 0.8
    again = train_digitnet.train(*few["train"], epochs=2, seed=0).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in net.state_dict().items())


def test_distorted_digits_are_still_white_on_black_and_each_is_distorted_by_itself(data_dir):
    image = mnist.load(data_dir, "test")[0][:1]
    distorted = train_digitnet.distort(image.expand(50, -1, -1), torch.Generator().manual_seed(0))
    assert distorted.shape == (50, 1, 28, 28) and distorted.min() == -1 and distorted.max() <= 1
    assert (distorted[:, 0, 0, 0] == -1).all()
    assert len({tuple(one.flatten().tolist()) for one in distorted}) == 50
    light = (distorted + 1).sum((1, 2, 3)) / (image / 127.5).sum()
    assert ((light > 0.7) & (light < 1.4)).all()


def test_a_distortion_turns_scales_shears_and_shifts_about_the_middle():
    images = torch.randint(256, (6, 28, 28), dtype=torch.uint8)
    dice = torch.Generator().manual_seed(3)
    angle, scale, shear, right, down = (
        width * (2 * torch.rand(6, generator=dice) - 1) for width in (0.2094395, 0.12, 0.2, 0.12, 0.12)
    )
    cos, sin, one, none = angle.cos(), angle.sin(), torch.ones(6), torch.zeros(6)
    turned = torch.stack([cos, -sin, sin, cos], 1).view(6, 2, 2) * scale.exp()[:, None, None]
    sheared = turned @ torch.stack([one, shear, none, one], 1).view(6, 2, 2)
    # The places to look up run over the middles of the pixels, from -1 to 1 over the width of the image.
    middles = (2 * torch.arange(28) + 1) / 28 - 1
    places = torch.stack(torch.meshgrid(middles, middles, indexing="xy"), 2)
    looked_up = places @ sheared.mT[:, None] + torch.stack([right, down], 1)[:, None, None]
    expected = torch.nn.functional.grid_sample(images[:, None] / 127.5, looked_up, align_corners=False) - 1
    found = train_digitnet.distort(images, torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_digitnet_is_trained_on_each_image_once_an_epoch_in_an_order_of_its_seed(monkeypatch):
    seen, optimizers, rates = [], [], []
    adamw, cycle, distort = torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR, train_digitnet.distort
    monkeypatch.setattr(train_digitnet, "distort", lambda x, dice: seen.append(x[:, 0, 0].clone()) or distort(x, dice))
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **s: optimizers.append(adamw(*a, **s)) or optimizers[-1])
    monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR", lambda *a: rates.append(a[1:]) or cycle(*a))
    images = torch.arange(200, dtype=torch.uint8)[:, None, None].expand(200, 28, 28)
    labels = torch.arange(200) % 10
    assert not train_digitnet.train(images, labels, epochs=2, seed=3).training
    dice = torch.Generator().manual_seed(3)
    order = torch.cat([torch.randperm(200, generator=dice) for _ in range(2)])
    assert torch.cat(seen).tolist() == order.tolist() and [len(some) for some in seen] == [100] * 4
    assert optimizers[0].defaults["weight_decay"] == 0.01 and rates == [(0.01, 4)]


def test_without_options_digitnet_is_trained_for_the_package(monkeypatch, capsys, grey_digits):
    asked, written, prepared = [], [], []
    monkeypatch.setattr(mnist, "prepare", prepared.append)
    monkeypatch.setattr(train_digitnet, "train", lambda *a: asked.append(a[2:]) or digitnet.digitnet())
    monkeypatch.setattr(train_digitnet, "save_weights", lambda path, *rest: written.append(path))
    monkeypatch.setattr("sys.argv", ["digitnet"])
    train_digitnet.main()
    assert asked == [(12, 0)] and written == [digitnet.WEIGHTS] and prepared == [Path("data")]


def test_data_that_cannot_be_had_are_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "prepare", mock.Mock(side_effect=UserError("no digits here")))
    assert_one_line_error(run_here("flowmatch_mnist/digitnet.py", cwd=tmp_path), "no digits here")


@pytest.mark.parametrize("content", [None, b"", b"no safetensors", "cut"])
def test_a_missing_or_damaged_classifier_is_named(content, tmp_path, monkeypatch):
    file = tmp_path / "digitnet.safetensors"
    if content is not None:
        file.write_bytes(digitnet.WEIGHTS.read_bytes()[:5000] if content == "cut" else content)
    monkeypatch.setattr(digitnet, "WEIGHTS", file)
    with pytest.raises(UserError, match="missing or damaged"):
        digitnet.digitnet()
