"""The evaluator: each measure against a closed form or a case whose answer is known, and the whole on real digits."""

import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import assert_one_line_error, run_here

import flowmatch_mnist.digitnet as train_digitnet
from flowmatch_mnist.evaluation import classifiers
from flowmatch_mnist.evaluation import evaluator as evaluators
from flowmatch_mnist.evaluation.classifiers import CLASSIFIERS, load_classifier, metadata_of, weights_of
from flowmatch_mnist.evaluation.copies import Copies
from flowmatch_mnist.evaluation.estimates import Estimate, Measurement, mean, median, share, table
from flowmatch_mnist.evaluation.evaluator import DRAWS, ClassifierMetrics, Evaluator, counts_of, draw_like, fingerprint
from flowmatch_mnist.evaluation.metrics import FrechetDistance, Manifold, classify
from flowmatch_mnist.evaluation.problems import labels_like
from flowmatch_mnist.images import mnist
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import load_weights

DIM = classifiers.Classifier.num_features


def gaussian(mean, covariance, count=500):
    """Points whose sample mean and covariance are exactly these."""
    points = torch.randn(count, DIM, dtype=torch.float64)
    points -= points.mean(0)
    whitened = points @ torch.linalg.inv(torch.linalg.cholesky(points.T.cov())).T
    return mean + whitened @ torch.linalg.cholesky(covariance).T


def random_covariance():
    factor = torch.randn(DIM, DIM, dtype=torch.float64) / DIM**0.5
    return factor @ factor.T + 0.1 * torch.eye(DIM, dtype=torch.float64)


def test_a_score_has_the_digits_that_its_error_allows():
    written = {
        (1.8437, 0.0712): "1.84 ± 0.07",
        (0.99123, 0.00094): "0.9912 ± 0.0009",
        (0.43, 0.04): "0.43 ± 0.04",
        (0.43, 0.039): "0.430 ± 0.039",
        (23.4, 1.2): "23.4 ± 1.2",
        (233.4, 12): "233 ± 12",
    }
    assert {estimate: str(Estimate(*estimate)) for estimate in written} == written
    assert [str(Estimate(value, 0.0)) for value in (0.0, 1.0, 0.25)] == ["0", "1", "0.25"]


def test_errors_of_means_shares_and_medians():
    torch.manual_seed(0)
    values = 3 + 2 * torch.randn(400, 10_000)
    for estimate, expected in ((mean, 2 / 100), (median, 2 / 100 * math.sqrt(math.pi / 2))):
        found = [estimate(some) for some in values]
        assert torch.tensor([f.value for f in found]).std() == pytest.approx(expected, rel=0.15)
        assert torch.tensor([f.error for f in found]).mean() == pytest.approx(expected, rel=0.05)
        assert sum(f.value for f in found) / 400 == pytest.approx(3, abs=0.01)
    for k, n in ((0, 10), (990, 1000), (10, 10)):
        a, b = k + 0.5, n - k + 0.5  # of the Beta distribution
        found = share(torch.arange(n) < k)
        assert found.value == k / n and found.error == pytest.approx(math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1))))
        assert found.error > 0


def test_the_error_of_a_ratio():
    draws = torch.randn(2, 100_000, dtype=torch.float64)
    expected = ((3 + 0.03 * draws[0]) / (-2 + 0.05 * draws[1])).std().item()
    ratio = Estimate(3, 0.03) / Estimate(-2, 0.05)
    assert ratio.value == -1.5 and ratio.error == pytest.approx(expected, rel=0.02)


def test_the_frechet_distance_of_two_gaussians():
    means = torch.randn(2, DIM, dtype=torch.float64)
    covariances = random_covariance(), random_covariance()
    root = scipy.linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).real
    expected = (means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * np.trace(root)
    distance = FrechetDistance(gaussian(means[0], covariances[0]))
    for _ in range(2):
        assert distance(gaussian(means[1], covariances[1], count=300)) == pytest.approx(expected.item(), rel=1e-6)


def test_equal_sets_are_at_no_distance():
    points = gaussian(torch.zeros(DIM).double(), random_covariance())
    assert FrechetDistance(points)(points[torch.randperm(len(points))]) == pytest.approx(0, abs=1e-6)
    on_it, back = Manifold(points).shared_with(Manifold(points))
    assert on_it.all() and back.all()


def test_the_error_of_a_frechet_distance_is_the_scatter_of_draws():
    covariance = random_covariance()
    distance = FrechetDistance(gaussian(torch.zeros(DIM).double(), covariance, 2000))
    factor = torch.linalg.cholesky(covariance).T
    draws = [0.3 + torch.randn(1000, DIM, dtype=torch.float64) @ factor for _ in range(40)]
    scatter = torch.tensor([distance(draw) for draw in draws]).std().item()
    before = torch.get_rng_state()
    found = distance.estimate(draws[0])
    assert found.value == distance(draws[0]) and found.error == pytest.approx(scatter, rel=0.5)
    assert distance.estimate(draws[0]) == found and torch.equal(torch.get_rng_state(), before)


def test_precision_and_recall_tell_what_is_missing_from_what_is_wrong():
    def compare(points, real):
        return [float(those.double().mean()) for those in Manifold(points).shared_with(Manifold(real))]

    left, right = torch.randn(400, 2), torch.randn(400, 2) + 100
    real = torch.cat([left, right])
    half = torch.randn(400, 2)
    precision, recall = compare(half, real)
    assert precision > 0.9 and 0.4 < recall <= 0.5
    half_wrong = torch.cat([half, torch.randn(400, 2) + 50])
    precision, recall = compare(half_wrong, real)
    assert 0.45 < precision <= 0.5 and 0.4 < recall <= 0.5
    # Balls reach to the third nearest other point: that of 0 to 3 (and -3), that of 4 to 1 (and 7).
    line = Manifold(torch.arange(5.0)[:, None])
    assert line.radii.tolist() == [3, 2, 2, 2, 3]
    for points, inside in (([-2.9, 6.9], [True, True]), ([-3.1, 6.9], [False, True])):
        assert Manifold(torch.tensor(points)[:, None]).shared_with(line)[0].tolist() == inside
        assert line.shared_with(Manifold(torch.tensor(points)[:, None]))[1].tolist() == inside
    assert Manifold(torch.arange(5.0)[:, None], neighbours=1).radii.tolist() == [1] * 5


def test_points_are_compared_chunk_by_chunk_as_in_one(monkeypatch):
    points, real = torch.randn(70, 2), torch.randn(50, 2)
    whole = Manifold(points).shared_with(Manifold(real))
    monkeypatch.setattr("flowmatch_mnist.evaluation.metrics.CHUNK", 16)
    assert all(torch.equal(*both) for both in zip(whole, Manifold(points).shared_with(Manifold(real)), strict=True))


def test_labels_are_in_the_proportions_of_the_real_ones():
    real = torch.tensor([3, 1, 3, 3, 0, 3, 1, 3])
    assert labels_like(real, 8).tolist() == [0, 1, 1, 3, 3, 3, 3, 3]
    assert labels_like(real, 16).bincount().tolist() == [2, 4, 0, 10]
    assert labels_like(real, 4).tolist() == [1, 3, 3, 3] or labels_like(real, 4).tolist() == [0, 1, 3, 3]
    assert labels_like(torch.arange(10).repeat(7), 20).tolist() == [digit for digit in range(10) for _ in range(2)]


def some(data_dir, split, start, stop):
    """Images and labels of a split. Mixed first: in the files, the digits of a writer stand together."""
    images, labels = mnist.load(data_dir, split)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[start:stop]
    return images[order], labels[order]


@pytest.fixture(scope="session")
def evaluator(data_dir):
    return Evaluator(some(data_dir, "test", 0, 2000), some(data_dir, "train", 0, 8000))


def measure(evaluator, images, labels):
    return {m.title: m.score.value for m in evaluator.measure(images, labels)}


def test_the_evaluator_knows_real_digits_copies_prototypes_and_noise(evaluator, data_dir):
    images, labels = some(data_dir, "train", 8000, 8500)
    real = measure(evaluator, images, labels)
    for by in ("", "resnet/"):
        assert real[f"{by}Frechet distance ratio"] == pytest.approx(1, abs=0.4)
        assert real[f"{by}label accuracy"] > 0.98 and real[f"{by}precision"] > 0.8 and real[f"{by}recall"] > 0.6
    assert real["near copies"] < 0.05

    copies = measure(evaluator, evaluator.training[:500], evaluator.training_labels[:500])
    assert copies["near copies"] == 1 and copies["distance to nearest training image"] < 1e-3

    # One good digit of each class, again and again: every label right, and nothing else.
    first = torch.stack([images[labels == digit][0] for digit in range(10)])
    prototypes = measure(evaluator, first.repeat(50, 1, 1), torch.arange(10).repeat(50))
    noise = measure(evaluator, torch.randint(256, (500, 28, 28), dtype=torch.uint8), labels)
    assert noise["near copies"] == 0
    for by in ("", "resnet/"):
        assert prototypes[f"{by}label accuracy"] > 0.89 and prototypes[f"{by}recall"] < 0.1
        assert noise[f"{by}label accuracy"] < 0.4
        for wrong in (prototypes, noise):
            assert wrong[f"{by}Frechet distance ratio"] > 5 * real[f"{by}Frechet distance ratio"]


def test_each_measurement_has_the_baseline_of_real_data(evaluator, data_dir):
    images, labels = some(data_dir, "train", 8000, 8100)
    found = {m.name: m for m in evaluator.measure(images, labels)}
    held_out, held_out_labels = some(data_dir, "test", 0, 2000)
    # Ten times as many training images of each digit, drawn once for all.
    draws = []
    for number in range(DRAWS):
        order = torch.randperm(8000, generator=streams.generator("cpu", "baseline", number))
        mixed = evaluator.training_labels[order]
        draws.append(torch.cat([order[mixed == digit][: (labels == digit).sum()] for digit in range(10)]))
    for name, by in (("digitnet", ""), ("resnet", "resnet/")):
        net = load_classifier(name)
        real, digits = classify(net, held_out)
        features = [classify(net, evaluator.training[draw])[0] for draw in draws]
        distances = torch.tensor([FrechetDistance(real)(some) for some in features])
        recalls = [Manifold(some.float()).shared_with(Manifold(real.float()))[1].double().mean() for some in features]
        assert found[f"{by}Frechet distance"].real == pytest.approx(mean(distances), rel=1e-3)
        assert found[f"{by}recall"].real == pytest.approx(mean(torch.stack(recalls)), rel=1e-3)
        assert found[f"{by}label accuracy"].real == share(digits == held_out_labels)
        assert found[f"{by}label accuracy"].samples == share(classify(net, images)[1] == labels)
    assert found["near copies"].real.value == pytest.approx(0.01, abs=1e-3)
    right = classify(load_classifier("digitnet"), images)[1] == labels
    assert found["label accuracy by digit/7"].samples == share(right[labels == 7])
    with pytest.raises(UserError, match="10000 samples are too many"):
        evaluator.measure(torch.zeros(10_000, 28, 28, dtype=torch.uint8), torch.arange(10_000) % 10)
    with pytest.raises(UserError, match="9 held-out images are too few"):
        Evaluator((images[:9], labels[:9]), (images, labels))


def test_beside_the_test_set_the_baseline_is_the_one_in_the_files(data_dir, monkeypatch):
    """A few of the digits stand for all of the test set."""
    training, test = some(data_dir, "train", 0, 6000), some(data_dir, "test", 0, 300)
    metadata = {"beside": fingerprint(test[0]), "scores": [[0.25, 0.01], [0.9, 0.02], [0.8, 0.03]]}
    asked = []
    monkeypatch.setattr(evaluators, "metadata_of", lambda name: {"real digits": json.dumps(metadata)})
    monkeypatch.setattr(evaluators, "draw_like", lambda *arguments: asked.append(arguments) or draw_like(*arguments))
    evaluator = Evaluator(test, training)
    found = {m.name: m for m in evaluator.measure(*test)}
    for by in ("", "resnet/"):
        names = (f"{by}Frechet distance", f"{by}precision", f"{by}recall")
        assert [found[name].real for name in names] == [Estimate(*estimate) for estimate in metadata["scores"]]
    evaluator.measure(*(tensor.flip(0) for tensor in test))
    assert not asked
    for _ in range(2):  # of other numbers of each digit nothing is known, until they are measured
        evaluator.measure(test[0][:200], test[1][:200])
    assert len(asked) == 1
    other = test[0].clone()
    other[0, 14, 14] ^= 1
    Evaluator((other, test[1]), training).measure(*test)
    monkeypatch.setattr(evaluators, "metadata_of", lambda name: {})
    Evaluator(test, training).measure(*test)
    assert len(asked) == 3


def test_the_evaluator_measures_where_it_is_told_to(evaluator, data_dir):
    """On the meta device there are no numbers: what asks for one there fails."""
    held_out, training = some(data_dir, "test", 0, 20), some(data_dir, "train", 0, 20)
    with pytest.raises(NotImplementedError, match="meta"):
        Copies(held_out[0], training[0], "meta")
    with pytest.raises(NotImplementedError, match="meta"):
        Evaluator(held_out, training, "meta")


def test_copies_are_looked_for_among_so_many(monkeypatch):
    monkeypatch.setattr("flowmatch_mnist.evaluation.copies.MAX_COMPARED", 30)
    monkeypatch.setattr("flowmatch_mnist.evaluation.copies.CHUNK", 16)
    training = torch.randint(256, (20, 28, 28), dtype=torch.uint8)
    held_out = torch.randint(256, (40, 28, 28), dtype=torch.uint8)
    distance, near = Copies(held_out, training).measure(training.repeat(2, 1, 1))
    assert near.samples == share(torch.ones(30) > 0) and distance.samples.value < 1e-3
    pixels = [images.double().flatten(1) / 255 for images in (held_out, training)]
    order = torch.randperm(40, generator=streams.generator("cpu", "near copies"))[:30]
    nearest = torch.cdist(*pixels)[order].amin(1) / 28
    assert distance.real.value == pytest.approx(nearest.median().item(), rel=0.02)


def test_the_table_and_the_tags():
    measurements = [
        Measurement("Frechet distance", Estimate(3.0, 0.12), Estimate(1.5, 0.02), ratio=True),
        Measurement("label accuracy by digit/7", Estimate(0.9, 0.03), Estimate(1.0, 0.0)),
        Measurement("resnet/Frechet distance", Estimate(3.0, 0.12), Estimate(1.5, 0.02), ratio=True),
    ]
    first, second, third, fourth = table(measurements).splitlines()
    assert first.split() == ["samples", "real", "data", "ratio"]
    assert second.split() == ["Frechet", "distance", "3.00", "±", "0.12", "1.500", "±", "0.020", "2.00", "±", "0.08"]
    assert third.split() == ["label", "accuracy", "by", "digit", "7", "0.900", "±", "0.030", "1"]
    assert fourth.split()[:3] == ["resnet", "Frechet", "distance"]
    tags = ["quality/Frechet distance ratio", "quality_details/label accuracy by digit 7"]
    assert [m.tag for m in measurements] == [*tags, "quality_details/resnet Frechet distance ratio"]
    errors = ["quality_errors/Frechet distance ratio", "quality_details_errors/label accuracy by digit 7"]
    assert [m.error_tag for m in measurements[:2]] == errors


def accuracy(net, images, labels):
    return share(classify(net, images)[1] == labels).value


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_reader_reads_as_well_as_its_file_says_and_so_do_real_digits(data_dir, name):
    test, training = mnist.load(data_dir, "test"), mnist.load(data_dir, "train")
    metadata, metrics = metadata_of(name), ClassifierMetrics(load_classifier(name), test)
    measured = share(metrics.right).value
    assert measured == pytest.approx(float(metadata["test_accuracy"]), abs=2e-4)  # two images, for other processors
    assert measured >= {"digitnet": 0.996, "resnet": 0.994}[name]
    command = "python -m flowmatch_mnist.digitnet" + (" --net resnet" if name == "resnet" else "")
    assert metadata["command"].startswith(f"{command} --epochs")
    assert weights_of(name).stat().st_size < 1_000_000

    real = json.loads(metadata["real digits"])
    assert real["beside"] == fingerprint(test[0])
    draw = draw_like(training[1], counts_of(test[1]))[0]
    distance = metrics.frechet(classify(metrics.net, training[0][draw])[0])
    value, error = real["scores"][0]
    assert distance == pytest.approx(value, abs=3 * DRAWS**0.5 * error) and 0 < error < 0.05 * value


def test_the_two_readers_see_by_features_of_their_own(data_dir):
    """What one sees does not follow from what the other sees: a linear map between them leaves much unexplained."""
    images, _ = some(data_dir, "test", 0, 2000)
    first, second = (classify(load_classifier(name), images)[0] for name in CLASSIFIERS)
    first, second = ((x - x.mean(0)) for x in (first, second))
    for a, b in ((first, second), (second, first)):
        left = b[1000:] - a[1000:] @ torch.linalg.lstsq(a[:1000], b[:1000]).solution
        assert left.square().sum() > 0.1 * b[1000:].square().sum()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_reader_learns_and_learns_the_same_again(data_dir, tmp_path, monkeypatch, capsys, name):
    train, test = mnist.load(data_dir, "train"), mnist.load(data_dir, "test")
    few = {"train": (train[0][:1500], train[1][:1500]), "test": (test[0][:500], test[1][:500])}
    monkeypatch.setattr(mnist, "load", lambda data_dir, split: few[split])
    out = tmp_path / "weights.safetensors"
    epochs = {"digitnet": 2, "resnet": 6}[name]
    words = ["digitnet", "--net", name, "--epochs", str(epochs), "--out", str(out), "--data-dir", str(data_dir)]
    monkeypatch.setattr("sys.argv", words)
    train_digitnet.main()
    assert f"wrote {out}" in capsys.readouterr().out
    monkeypatch.setattr(classifiers, "weights_of", lambda name: out)
    net = load_classifier(name)
    claimed = load_weights(out)[1]["test_accuracy"]
    assert accuracy(net, *few["test"]) == pytest.approx(float(claimed), abs=2e-3)
    assert accuracy(net, *few["test"]) > {"digitnet": 0.8, "resnet": 0.15}[name]
    again = train_digitnet.train(name, *few["train"], epochs, seed=train_digitnet.RECIPES[name].seed).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("distort", [train_digitnet.affine_distortion, train_digitnet.warp])
def test_distorted_digits_are_still_white_on_black_and_each_is_distorted_by_itself(data_dir, distort):
    image = mnist.load(data_dir, "test")[0][:1]
    distorted = distort(image.expand(50, -1, -1), torch.Generator().manual_seed(0))
    assert distorted.shape == (50, 1, 28, 28) and distorted.min() == -1 and distorted.max() <= 1
    assert (distorted[:, 0, 0, 0] == -1).all()
    assert len({tuple(one.flatten().tolist()) for one in distorted}) == 50
    light = (distorted + 1).sum((1, 2, 3)) / (image / 127.5).sum()
    assert ((light > 0.7) & (light < 1.4)).all()


def test_a_distortion_turns_scales_shears_and_shifts_about_the_middle():
    images = torch.randint(256, (6, 28, 28), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(3)
    angle, scale, shear, right, down = (
        width * (2 * torch.rand(6, generator=generator) - 1) for width in (0.2094395, 0.12, 0.2, 0.12, 0.12)
    )
    cos, sin, one, none = angle.cos(), angle.sin(), torch.ones(6), torch.zeros(6)
    turned = torch.stack([cos, -sin, sin, cos], 1).view(6, 2, 2) * scale.exp()[:, None, None]
    sheared = turned @ torch.stack([one, shear, none, one], 1).view(6, 2, 2)
    # The places to look up run over the middles of the pixels, from -1 to 1 over the width of the image.
    middles = (2 * torch.arange(28) + 1) / 28 - 1
    places = torch.stack(torch.meshgrid(middles, middles, indexing="xy"), 2)
    looked_up = places @ sheared.mT[:, None] + torch.stack([right, down], 1)[:, None, None]
    expected = torch.nn.functional.grid_sample(images[:, None] / 127.5, looked_up, align_corners=False) - 1
    found = train_digitnet.affine_distortion(images, torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_warp_bends_and_shifts():
    images = torch.randint(256, (6, 28, 28), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(3)
    bend = 0.05 * torch.randn(6, 2, 5, 5, generator=generator)
    shift = 0.12 * (2 * torch.rand(6, 2, 1, 1, generator=generator) - 1)
    middles = (2 * torch.arange(28) + 1) / 28 - 1
    places = torch.stack(torch.meshgrid(middles, middles, indexing="xy"))
    smooth = torch.nn.functional.interpolate(bend, size=(28, 28), mode="bicubic", align_corners=False)
    looked_up = (places + smooth + shift).permute(0, 2, 3, 1)
    expected = torch.nn.functional.grid_sample(images[:, None] / 127.5, looked_up, align_corners=False) - 1
    found = train_digitnet.warp(images, torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "distorted", "rate"), [("digitnet", "affine_distortion", 0.01), ("resnet", "warp", 0.004)])
def test_a_reader_is_trained_on_each_image_once_an_epoch_in_an_order_of_its_seed(monkeypatch, name, distorted, rate):
    seen, optimizers, rates = [], [], []
    adamw, cycle, move = torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR, train_digitnet.move
    monkeypatch.setattr(train_digitnet, "move", lambda x, places: seen.append(x[:, 0, 0].clone()) or move(x, places))
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **s: optimizers.append(adamw(*a, **s)) or optimizers[-1])
    monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR", lambda *a: rates.append(a[1:]) or cycle(*a))
    images = torch.arange(200, dtype=torch.uint8)[:, None, None].expand(200, 28, 28)
    labels = torch.arange(200) % 10
    assert not train_digitnet.train(name, images, labels, epochs=2, seed=3).training
    generator = torch.Generator().manual_seed(3)
    order = torch.cat([torch.randperm(200, generator=generator) for _ in range(2)])
    assert torch.cat(seen).tolist() == order.tolist() and [len(some) for some in seen] == [100] * 4
    assert optimizers[0].defaults["weight_decay"] == 0.01 and rates == [(rate, 4)]
    assert train_digitnet.RECIPES[name].distort is getattr(train_digitnet, distorted)


@pytest.mark.parametrize(("words", "expected"), [((), ("digitnet", 12, 0)), (("--net", "resnet"), ("resnet", 10, 1))])
def test_without_options_a_reader_is_trained_for_the_package(monkeypatch, capsys, grey_digits, words, expected):
    asked, written, prepared = [], [], []
    monkeypatch.setattr(mnist, "prepare", prepared.append)
    monkeypatch.setattr(train_digitnet, "train", lambda *a: asked.append((a[0], *a[3:])) or CLASSIFIERS[a[0]]().eval())
    monkeypatch.setattr(train_digitnet, "save_weights", lambda path, *rest: written.append(path))
    monkeypatch.setattr("sys.argv", ["digitnet", *words])
    train_digitnet.main()
    assert asked == [expected] and written == [weights_of(expected[0])] and prepared == [Path("data")]


def test_data_that_cannot_be_had_are_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "prepare", mock.Mock(side_effect=UserError("no digits here")))
    assert_one_line_error(run_here("flowmatch_mnist/digitnet.py", cwd=tmp_path), "no digits here")


def test_before_a_reader_is_trained_it_is_clear_that_it_can_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(train_digitnet, "train", None)
    done = run_here("flowmatch_mnist/digitnet.py", "--out", tmp_path, cwd=tmp_path)
    assert_one_line_error(done, "it is a folder")
    for option, refused in (("--epochs", 0), ("--seed", -1), ("--seed", 2**63)):
        done = run_here("flowmatch_mnist/digitnet.py", "--measure", option, 3, cwd=tmp_path)
        assert_one_line_error(done, "--measure trains nothing")
        assert_one_line_error(run_here("flowmatch_mnist/digitnet.py", option, refused, cwd=tmp_path), f"{option} must be")


@pytest.mark.parametrize("content", [None, b"", b"no safetensors", "cut"])
def test_a_missing_or_damaged_classifier_is_named(content, tmp_path, monkeypatch):
    file = tmp_path / "digitnet.safetensors"
    if content is not None:
        file.write_bytes(weights_of("digitnet").read_bytes()[:5000] if content == "cut" else content)
    monkeypatch.setattr(classifiers, "WEIGHTS_FOLDER", tmp_path)
    with pytest.raises(UserError, match="missing or damaged"):
        load_classifier("digitnet")
