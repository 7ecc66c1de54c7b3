"""What data modules hand on: whose noise a batch gets, which batches a process sees, and which splits are read when."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_reflow import Known

from flowmatch_mnist.data import reflow
from flowmatch_mnist.data.curve import CurveDataModule
from flowmatch_mnist.data.digits import IDXDataModule, MNISTDataModule
from flowmatch_mnist.data.reflow import ReflowDataModule, fits
from flowmatch_mnist.images import mnist
from flowmatch_mnist.images.pixels import dequantization
from flowmatch_mnist.sampling.generate import Flow, Sampler, Samples
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.errors import UserError


def at_work(data, rank=1, ranks=2, epoch=3, step=9, overfit_batches=0):
    """A data module whose trainer is at a certain step."""
    progress = SimpleNamespace(total=SimpleNamespace(processed=step))
    data.trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        global_rank=rank,
        world_size=ranks,
        current_epoch=epoch,
        overfit_batches=overfit_batches,
        predicting=False,
    )
    return data


def test_each_kind_of_draw_has_a_stream_of_its_own(stream_keys, grey_digits):
    """Two draws that shared one would be correlated; under other names, last year's results could not be had again."""
    curve = CurveDataModule(samples=100, batch_size=20, seed=5)
    curve.setup("fit")
    assert stream_keys() == [
        ("curve", "train"),
        *[(kind, split) for split in ("val", "test") for kind in ("curve", "fixed noise")],
    ]
    data = MNISTDataModule(batch_size=20, val_size=100, seed=5, dequantize=True, pixels="logit")
    data.setup("fit")
    found = stream_keys()
    assert {*found[:1], *found[-1:]} == {("validation split",), ("fixed noise", "val")}
    assert found[1:-1] == [(0, "dequantization", n) for n in range(100)]
    next(iter(curve.train_dataloader()))
    assert stream_keys() == [(5, "order", 0)]
    for module, drawn in ((curve, ["noise"]), (data, ["dequantization", "noise"])):
        batch = tuple(tensor[:20] for tensor in module.splits["train"])
        for step in (0, 1):
            module.on_after_batch_transfer(batch, 0)
            assert stream_keys() == [(5, kind, step) for kind in drawn]
        at_work(module).on_after_batch_transfer(batch, 0)
        assert stream_keys() == [(5, kind, 9) for kind in drawn]
        module.predict_dataloader()
        assert stream_keys() == [(5, "sampling")]


def test_a_process_sees_its_share_of_the_batches_of_the_trainers_epoch(grey_digits):
    data = MNISTDataModule(batch_size=20, val_size=100, eval_batch_size=30, seed=5, num_workers=2)
    data.setup("fit")
    alone = data.train_dataloader()
    assert (alone.batch_size, alone.rank, alone.world_size, alone.epoch(), alone.same_order) == (20, 0, 1, 0, False)
    at_work(data)
    batches = data.train_dataloader()
    assert (batches.batch_size, batches.rank, batches.world_size, batches.epoch()) == (40, 1, 2, 3)
    assert (batches.seed, batches.drop_last, batches.num_workers, batches.same_order) == (5, True, 2, False)
    assert at_work(data, overfit_batches=1).train_dataloader().same_order
    held_out = data.val_dataloader()
    assert (held_out.batch_size, held_out.rank, held_out.world_size, held_out.seed) == (30, 1, 2, None)
    assert (held_out.drop_last, held_out.num_workers) == (False, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_lie_on_the_device_unless_workers_cut_them(workers, grey_digits):
    data = MNISTDataModule(batch_size=20, val_size=100, num_workers=workers)
    data.setup("fit")
    at_work(data).trainer.strategy.root_device = torch.device("meta")
    assert {tensor.device.type for tensor in data.train_dataloader().tensors} == {"cpu" if workers else "meta"}


def test_a_process_gets_its_share_of_the_global_batchs_noise(grey_digits):
    data = MNISTDataModule(batch_size=20, val_size=100, seed=5)
    data.setup("fit")
    batch = tuple(tensor[:20] for tensor in data.splits["train"])
    whole = torch.randn(40, 1, 28, 28, generator=streams.generator("cpu", 5, "noise", 9))
    for rank in (0, 1):
        assert torch.equal(at_work(data, rank).on_after_batch_transfer(batch, 0)[0], whole[rank::2])
        even = torch.rand(8, 3, generator=streams.generator("cpu", 5, "kind", 9))
        assert torch.equal(streams.BatchPosition(9, rank, 2).uniform((4, 3), torch.device("cpu"), 5, "kind"), even[rank::2])


def test_splits_are_read_once_and_when_they_are_needed(monkeypatch, grey_digits):
    read, load = [], mnist.load
    monkeypatch.setattr(mnist, "load", lambda folder, split: read.append((folder, split)) or load(folder, split))
    fetched = []
    monkeypatch.setattr(mnist, "prepare", fetched.append)
    data = MNISTDataModule("there", val_size=100)
    data.prepare_data()
    assert fetched == [Path("there")]
    for stage, expected in (("predict", []), ("fit", ["train"]), ("fit", []), ("test", ["test"]), ("test", [])):
        data.setup(stage)
        assert read == [(Path("there"), split) for split in expected]
        read.clear()
    assert [len(data.splits[split]) for split in ("train", "val", "test")] == [2, 3, 3]
    noisy = MNISTDataModule(val_size=100, dequantize=True)
    noisy.setup("test")
    for split, count in (("val", 100), ("test", 600)):
        assert torch.equal(noisy.splits[split][2], noisy.fixed_noise(split, count))
    assert torch.equal(noisy.splits["test"][3], dequantization(0, range(600), (28, 28)))


def test_sizes_at_the_edge(monkeypatch):
    for size in (1, 60_000 - 128):
        assert MNISTDataModule(val_size=size).val_size == size
    for size in (0, 60_001 - 128):
        with pytest.raises(ValueError, match="val_size"):
            MNISTDataModule(val_size=size)
    for samples, batch_size in ((9, 5), (19, 20)):
        with pytest.raises(ValueError, match="samples must be at least"):
            CurveDataModule(samples=samples, batch_size=batch_size)
    assert CurveDataModule(samples=10, batch_size=5).samples == 10 and CurveDataModule(samples=20, batch_size=20).samples == 20
    images, labels = torch.zeros(150, 28, 28, dtype=torch.uint8), torch.zeros(150, dtype=torch.int64)
    monkeypatch.setattr(mnist, "load_any", lambda folder, split: (images, labels))
    assert IDXDataModule(val_size=22).read("train")[0] is images
    with pytest.raises(UserError, match="150 training images; lower val_size"):
        IDXDataModule(val_size=23).read("train")
    assert IDXDataModule(val_size=23).read("test")[0] is images


def test_a_shard_of_pairs_is_drawn_by_its_numbers(stream_keys, monkeypatch):
    asked = {}

    def generate(flow, labels, sampler, **settings):
        asked.update(labels=labels, sampler=sampler, **settings)
        return Samples(torch.zeros(30, 2), labels, 1)

    monkeypatch.setattr(reflow, "SHARD", 30)
    monkeypatch.setattr(reflow, "generate", generate)
    drawn = reflow.draw_shard(Flow(Known()), Sampler(3), 2, 5, 7)
    assert (asked["seed"], asked["numbers"], asked["batch_size"]) == (5, list(range(60, 90)), 7)
    assert stream_keys() == [(5, "pairs", 2)] and torch.equal(asked["noise"], drawn["x0"].float())
    assert torch.equal(asked["labels"], torch.arange(60, 90) % 10) and asked["decode"](torch.ones(1)).dtype == torch.float16


def test_a_drawing_says_on_the_terminal_how_far_it_is(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(reflow, "draw_shard", lambda flow, sampler, *key: seen.append(key) or {"x0": torch.zeros(1)})
    reflow.draw_pairs(tmp_path, Flow(Known()), Sampler(3), 2 * 2500, seed=5, batch_size=7)
    assert seen == [(0, 5, 7), (1, 5, 7)], "of 2,500 each, as in folders that are there already"
    out, err = capsys.readouterr()
    assert out == "" and "drawing pairs" in err
    assert err.rstrip("\n").endswith("\x1b[2K"), "what is done is wiped away"


def damaged(**changes):
    whole = {"x0": torch.zeros(4, 2), "x1": torch.zeros(4, 2), "y": torch.tensor([0, 9, 1, 2])}
    return {name: value for name, value in (whole | changes).items() if value is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {"x0": None},
        {"z": torch.zeros(4)},
        {"y": torch.zeros(4)},
        {"y": torch.zeros(4, 1, dtype=torch.int64)},
        {"y": torch.tensor([0, 1, 2])},
        {"y": torch.tensor([0, 1, 2, 10])},
        {"y": torch.tensor([0, 1, 2, -1])},
        {"x0": torch.zeros(4, 3)},
        {"x1": torch.full((4, 2), torch.inf)},
        {"x0": torch.zeros(0, 2), "x1": torch.zeros(0, 2), "y": torch.zeros(0, dtype=torch.int64)},
    ],
    ids=str,
)
def test_what_is_no_pairs_is_seen(changes):
    assert fits(damaged(), (2,), 10) and fits({name: value[:1] for name, value in damaged().items()}, (2,), 10)
    assert not fits(damaged(**changes), (2,), 10)


def test_the_teachers_data_are_prepared_too_and_pairs_are_read_once(monkeypatch):
    asked, read = [], []
    pairs = {"x0": torch.zeros(150, 2), "x1": torch.ones(150, 2), "y": torch.zeros(150, dtype=torch.int64)}
    monkeypatch.setattr(reflow, "load_pairs", lambda *arguments: read.append(arguments) or pairs)
    curve = CurveDataModule()
    monkeypatch.setattr(curve, "prepare_data", lambda: asked.append("prepared"))
    monkeypatch.setattr(curve, "setup", asked.append)

    def made(val_size):
        return ReflowDataModule("there", curve, batch_size=50, val_size=val_size)

    data = made(100)
    data.prepare_data()
    for stage in ("predict", "fit", "test"):
        data.setup(stage)
        assert len(read) == (stage != "predict")
    assert asked == ["prepared", "predict", "fit", "test"] and read == [(Path("there"), (2,), 1, "plane")]
    assert len(data.splits["train"][0]) == 50 and len(data.splits["val"][0]) == 100
    made(1).setup("fit")
    for size in (0, 101):
        with pytest.raises(UserError, match="val_size"):
            made(size).setup("fit")


def test_without_dequantisation_nothing_is_drawn_for_it():
    assert not CurveDataModule().dequantize and not MNISTDataModule().dequantize
    assert MNISTDataModule(dequantize=True).dequantize
