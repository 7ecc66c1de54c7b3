"""The data module: what a batch is, who sees which digit, and that noise is a function of (seed, step, rank)."""

import pytest
import torch
from test_pairs import at_work

from flowmatch_mnist.data.batches import Batches
from flowmatch_mnist.data.digits import MNISTDataModule


def data_module(data_dir, rank=0, world_size=1, step=0, seed=0, epoch=0, **settings):
    """A data module set up for training, in a process that stands where we say it does."""
    data = MNISTDataModule(str(data_dir), batch_size=8, val_size=100, seed=seed, **settings)
    data.setup("fit")
    return at_work(data, rank, world_size, epoch, step)


def pairs(data, index=0):
    batch = list(zip(range(index + 1), data.train_dataloader(), strict=False))[-1][1]
    return data.on_after_batch_transfer(batch, 0)


def test_a_batch_is_noise_data_and_labels(data_dir):
    data = data_module(data_dir)
    x0, x1, y = pairs(data)
    assert x0.shape == x1.shape == (8, 1, 28, 28) and x0.dtype == x1.dtype == torch.float32
    assert x1.min() == -1 and x1.max() <= 1 and y.dtype == torch.int64 and y.shape == (8,)
    assert abs(x0.mean()) < 0.1 and abs(x0.std() - 1) < 0.1
    assert data.splits["train"][0].dtype == torch.uint8, "what is kept in memory is one byte a pixel"


def test_noise_is_a_function_of_seed_step_and_rank(data_dir):
    base = pairs(data_module(data_dir))[0]
    assert torch.equal(base, pairs(data_module(data_dir))[0])
    for other in ({"step": 1}, {"rank": 1, "world_size": 2}, {"seed": 1}):
        different = pairs(data_module(data_dir, **other))[0]
        correlation = torch.corrcoef(torch.stack([base.flatten(), different.flatten()]))[0, 1]
        assert abs(correlation) < 0.06, other


def test_without_a_trainer_each_batch_still_gets_noise_of_its_own(data_dir):
    data = MNISTDataModule(str(data_dir), batch_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert not torch.equal(data.on_after_batch_transfer(batch, 0)[0], data.on_after_batch_transfer(batch, 0)[0])


def test_validation_is_held_out_of_train_and_its_noise_is_fixed(data_dir):
    first, second = data_module(data_dir, seed=0), data_module(data_dir, seed=1)
    train, val = first.splits["train"], first.splits["val"]
    assert len(train[0]) == 59_900 and len(val[0]) == 100
    everything = torch.cat([train[1], val[1]]).bincount()
    assert everything.tolist()[:3] == [5923, 6742, 5958], "together they are the training set, each digit once"
    for one, other in zip(first.val_dataloader(), second.val_dataloader(), strict=True):
        for a, b in zip(first.on_after_batch_transfer(one, 0), second.on_after_batch_transfer(other, 0), strict=True):
            assert torch.equal(a, b)


def test_test_is_the_official_test_set(data_dir):
    data = MNISTDataModule(str(data_dir))
    data.setup("predict")
    assert not data.splits, "drawing needs no data"
    data.setup("test")
    batches = list(data.test_dataloader())
    assert torch.cat([y for _, y, _ in batches]).bincount().tolist()[:3] == [980, 1135, 1032]
    assert "train" in data.splits, "what was drawn is measured beside both"


@pytest.mark.parametrize(("samples", "world_size", "drop_last"), [(100, 1, True), (100, 4, True), (103, 2, False)])
def test_together_the_processes_see_every_sample_once_and_the_same_global_batches(samples, world_size, drop_last):
    def batches(rank, world_size):
        return Batches(torch.arange(samples), batch_size=20, rank=rank, world_size=world_size, seed=5, drop_last=drop_last)

    alone = [batch[0] for batch in batches(0, 1)]
    shares = [[batch[0] for batch in batches(rank, world_size)] for rank in range(world_size)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert sorted(whole.tolist()) == sorted(torch.cat(parts).tolist())
    assert sorted(torch.cat(alone).tolist()) == list(range(samples))


def test_the_order_changes_with_the_epoch_and_the_seed_and_repeats_with_both():
    def order(seed, epoch):
        return torch.cat([b[0] for b in Batches(torch.arange(50), batch_size=10, seed=seed, epoch=lambda: epoch)]).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(*key)) for key in ((0, 0), (0, 1), (1, 0))}) == 3


def test_the_place_in_the_epoch_is_saved_and_restored():
    batches = Batches(torch.arange(50), batch_size=10, seed=0)
    whole = [batch[0].tolist() for batch in batches]
    walk = iter(batches)
    next(walk), next(walk)
    resumed = Batches(torch.arange(50), batch_size=10, seed=0)
    resumed.load_state_dict(batches.state_dict())
    assert [batch[0].tolist() for batch in resumed] == whole[2:]
    assert [batch[0].tolist() for batch in resumed] == whole, "the pass after it is a full one"


def test_predict_draws_each_class_with_the_noise_that_sample_gives(data_dir):
    data = MNISTDataModule(str(data_dir), predict_per_class=2)
    ((noise, labels, numbers),) = data.predict_dataloader()
    assert labels.tolist() == [*range(10)] * 2 and noise.shape == (20, 1, 28, 28)
    assert numbers.tolist() == [*range(20)]


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("val_size", 0), ("val_size", 60_000), ("predict_per_class", 0)]
)
def test_refuses_sizes_that_cannot_be(name, value):
    with pytest.raises(ValueError, match=name):
        MNISTDataModule(**{name: value})


def assert_same_levels(found, levels):
    """The same but where the noise came within rounding of the next level, which is one in ten thousand."""
    above = found.int() - levels
    assert above.min() == 0 and above.max() <= 1 and above.float().mean() < 1e-3


def test_dequantised_levels_get_noise_of_their_own_in_each_step_and_the_same_in_each_evaluation(data_dir):
    data = MNISTDataModule(str(data_dir), val_size=100, pixels="logit", dequantize=True)
    data.setup("fit")
    batch = (data.splits["train"][0][:8], data.splits["train"][1][:8])
    first, second = (data.on_after_batch_transfer(batch, 0)[1] for _ in range(2))
    assert first.shape == (8, 1, 28, 28) and not (first == second).any(), "each of its pixels is another"
    assert_same_levels(data.problem.units.decode(first), batch[0])
    assert_same_levels(data.problem.units.decode(second), batch[0])
    assert abs(first.square().mean().sqrt() - 1) < 0.1
    assert first.max() > 1.02, "linear grey levels would end at 1.004"
    evaluated = [data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)[1] for _ in range(2)]
    assert torch.equal(*evaluated)
    assert_same_levels(data.problem.units.decode(evaluated[0]), data.splits["val"][0])
    assert len(evaluated[0][0].unique()) == 28 * 28


def test_without_noise_a_level_is_the_middle_of_its_cell(data_dir):
    data = MNISTDataModule(str(data_dir))
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    torch.testing.assert_close(data.encode(levels), levels[None] / 127.5 - 1)
    assert torch.equal(data.problem.units.decode(data.encode(levels)), levels)
