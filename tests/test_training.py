"""Training in this process: what is averaged is what is sampled, and a resumed run sees what the whole one saw."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowmatch_mnist.data.digits import MNISTDataModule
from flowmatch_mnist.networks.unet import UNet
from flowmatch_mnist.sampling.generate import Sampler
from flowmatch_mnist.training.console import Bar, Report
from flowmatch_mnist.training.distributed import interleave
from flowmatch_mnist.training.drawing import DrawSamples
from flowmatch_mnist.training.ema import EMA, averaged_flow
from flowmatch_mnist.training.evaluation import Evaluate
from flowmatch_mnist.training.internals import average_of
from flowmatch_mnist.training.module import FlowMatching
from flowmatch_mnist.training.muon import Muon
from flowmatch_mnist.training.tensorboard import Board, flush, log_curve, log_run


def make(data_dir, folder, callbacks, net=None, optimizer=torch.optim.AdamW, **settings):
    torch.manual_seed(1)
    module = FlowMatching(net or UNet((4, 8, 8), (1, 1, 1)), optimizer=optimizer, sampler=Sampler(steps=2), warmup_steps=2)
    data = MNISTDataModule(str(data_dir), batch_size=16, val_size=32, eval_batch_size=16)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_epochs": 2, "limit_train_batches": 5, "limit_val_batches": 2, "enable_checkpointing": False} | settings),
    )
    return trainer, module, data


def test_the_average_is_warmed_up_and_follows_its_definition(few_digits, tmp_path):
    class Follow(Callback):
        """Computes the average once more, by its definition."""

        def on_train_batch_end(self, trainer, module, *_):
            n = trainer.global_step - 1
            weights = [p.detach().clone() for p in module.net.parameters()]
            decay = min(0.5, (1 + n) / (10 + n))
            old = self.average if n else weights
            self.average = [decay * a + (1 - decay) * w for a, w in zip(old, weights, strict=True)]

    ema, follow = EMA(decay=0.5), Follow()
    trainer, module, data = make(few_digits, tmp_path, [follow, ema])
    trainer.fit(module, data)
    for expected, found in zip(follow.average, average_of(ema).net.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


class Normalised(UNet):
    """A network of a user's, whose batch normalisation keeps statistics as buffers."""

    def __init__(self):
        super().__init__((4, 8, 8), (1, 1, 1))
        self.norm = torch.nn.BatchNorm2d(1)

    def forward(self, x, t, y, until=None):
        return super().forward(self.norm(x), t, y, until)


def test_buffers_are_averaged_and_whole_numbers_among_them_copied(few_digits, tmp_path):
    class Follow(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            now = module.net.norm.running_var.clone()
            self.average = 0.1 * self.average + 0.9 * now if trainer.global_step > 1 else now

    ema, follow = EMA(decay=0.1), Follow()
    trainer, module, data = make(few_digits, tmp_path, [follow, ema], Normalised(), limit_val_batches=0)
    trainer.fit(module, data)
    norm = average_of(ema).net.norm
    torch.testing.assert_close(norm.running_var, follow.average)
    assert norm.num_batches_tracked == 10


class DrawTwice(DrawSamples):
    """Draws, perturbs the raw weights, draws again; then perturbs the averaged ones, and draws a third time."""

    def on_train_epoch_end(self, trainer, module):
        self.pictures = [self.picture(trainer, module)]
        self.shake(module.net)
        self.pictures.append(self.picture(trainer, module))
        self.shake(averaged_flow(trainer, module).net)
        self.pictures.append(self.picture(trainer, module))

    @staticmethod
    @torch.no_grad()
    def shake(net):
        for parameter in net.parameters():
            parameter += torch.randn_like(parameter)

    def picture(self, trainer, module):
        self.act(trainer, module)
        (path,) = (self.folder / "samples").glob("grid-*.png")
        with Image.open(path) as image:
            return image.copy()


def test_the_averaged_weights_are_what_gets_sampled(few_digits, tmp_path, monkeypatch):
    draw = DrawTwice(rows=1)
    draw.folder = tmp_path
    trainer, module, data = make(few_digits, tmp_path, [EMA(), draw], max_epochs=1)
    monkeypatch.setattr(type(trainer), "log_dir", tmp_path)
    trainer.fit(module, data)
    first, raw_moved, average_moved = draw.pictures
    assert first == raw_moved
    assert first != average_moved


class Record(Callback):
    """Notes what each training step saw."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append([tensor.clone() for tensor in batch])
        module.net.register_forward_pre_hook(self.note) if not self.seen[1:] else None

    def note(self, net, inputs):
        if net.training:
            self.seen[-1].extend(tensor.clone() for tensor in inputs)


def test_no_two_steps_see_the_same_noise_even_with_gradient_accumulation(few_digits, tmp_path):
    record = Record()
    trainer, module, data = make(few_digits, tmp_path, [record], accumulate_grad_batches=2)
    trainer.fit(module, data)
    noises = {seen[0].sum().item() for seen in record.seen}
    times = {seen[4].sum().item() for seen in record.seen}
    assert len(noises) == len(times) == len(record.seen) == 10


def test_validation_is_the_same_whenever_it_is_measured_and_splits_by_time(few_digits, tmp_path):
    losses = []
    for seed, batch_size in ((1, 16), (2, 32)):
        trainer, _, _ = make(few_digits, tmp_path, [])
        torch.manual_seed(1)
        module = FlowMatching(UNet((4, 8, 8), (1, 1, 1)), seed=seed)
        data = MNISTDataModule(str(few_digits), batch_size=batch_size, val_size=32, eval_batch_size=16, seed=seed)
        losses.append(trainer.validate(module, data, verbose=False)[0])
    assert losses[0] == losses[1]
    by_time = [value for name, value in losses[0].items() if name.startswith("loss_by_time/val")]
    assert len(by_time) == 5 and min(by_time) > 0
    assert min(by_time) <= losses[0]["loss/val"] <= max(by_time)


@pytest.mark.parametrize("optimizer", [partial(torch.optim.AdamW, fused=True), Muon])
def test_trains_in_bf16_with_clipped_gradients_and_keeps_weights_in_fp32(few_digits, tmp_path, optimizer):
    trainer, module, data = make(few_digits, tmp_path, [], optimizer=optimizer, precision="bf16-mixed", gradient_clip_val=0.01)
    dtypes, norms = set(), []
    module.net.stem.register_forward_hook(lambda layer, inputs, output: dtypes.add(output.dtype))
    clip = module.configure_gradient_clipping

    def clip_and_look(*arguments, **options):
        clip(*arguments, **options)
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])))

    module.configure_gradient_clipping = clip_and_look
    trainer.fit(module, data)
    assert torch.bfloat16 in dtypes
    assert len(norms) == 10 and max(norms) < 0.0101
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("limit", [0, -1, -0.5])
def test_a_limit_of_zero_or_less_clips_no_gradients(few_digits, tmp_path, limit):
    weights = []
    for value in (None, limit):
        trainer, module, data = make(few_digits, tmp_path, [], gradient_clip_val=value)
        trainer.fit(module, data)
        weights.append(torch.nn.utils.parameters_to_vector(module.net.parameters()))
    assert torch.equal(*weights)


def test_the_report_prints_a_line_for_each_epoch(few_digits, tmp_path, capsys):
    trainer, module, data = make(few_digits, tmp_path, [Report()], log_every_n_steps=2)
    trainer.fit(module, data)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1, step 5", "epoch 2, step 10"]
    assert all("val loss" in line and "samples/s" in line for line in lines)


def test_shares_of_the_ranks_are_put_together_in_order():
    whole = torch.arange(7)
    assert torch.equal(interleave([whole[rank::3] for rank in range(3)]), whole)


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: EMA(decay=1), "decay"),
        (lambda: DrawSamples(every_n_steps=-1), "every_n_steps"),
        (lambda: Evaluate(samples=1), "samples"),
        (lambda: Sampler(0), "steps"),
    ],
)
def test_refuses_settings_out_of_range(make_it, words):
    with pytest.raises(ValueError, match=words):
        make_it()


@pytest.mark.parametrize(("passes", "shown"), [(5, "Epoch 3/4"), (-1, "Epoch 3")])
def test_the_bar_tells_how_many_passes_only_where_they_are_limited(passes, shown):
    first, *others = Bar().configure_columns(Trainer(accelerator="cpu", logger=False, max_epochs=passes, max_steps=9))
    assert len(others) > 3
    task = SimpleNamespace(description=f"[white]Epoch 3/{passes - 1}")  # as Lightning describes the epoch
    assert first.render(task).plain == shown


class Pictures(CSVLogger):
    """A logger that takes pictures, as W&B's does."""

    def log_image(self, key, images, step):
        self.taken = [*getattr(self, "taken", []), (key, images[0].shape, step)]


def test_every_logger_gets_what_it_can_take(few_digits, tmp_path):
    loggers = [CSVLogger(tmp_path, "plain"), Pictures(tmp_path, "pictures"), Board(tmp_path / "board")]
    callbacks = [EMA(), DrawSamples(rows=1), Evaluate(every_n_epochs=1, samples=20)]
    trainer, module, data = make(few_digits, tmp_path, callbacks, max_epochs=1, log_every_n_steps=1)
    trainer.loggers = loggers
    trainer.fit(module, data)
    for logger in loggers[:2]:
        table = (Path(logger.log_dir) / "metrics.csv").read_text()
        assert "loss/train" in table and "quality/label accuracy" in table
    assert loggers[1].taken == [("samples/grid", (120, 1200, 3), 4), ("samples/trajectory", (1200, 360), 4)]
    log = EventAccumulator(loggers[2].log_dir, size_guidance={"scalars": 0, "images": 0}).Reload()
    assert {"loss/train", "quality/label accuracy"} <= set(log.Tags()["scalars"]) and "epoch" not in log.Tags()["scalars"]
    assert set(log.Tags()["images"]) == {"samples/grid", "samples/trajectory"}


def test_scalars_stand_at_their_step_or_at_the_one_that_is_known(tmp_path):
    for at, step in ((None, 3), (7, 7)):
        board = Board(tmp_path / str(at), at=at)
        board.log_metrics({"loss/val": 0.5, "epoch": 1.0}, step=3)
        board.save()
        log = EventAccumulator(str(tmp_path / str(at))).Reload()
        assert [(event.step, event.value) for event in log.Scalars("loss/val")] == [(step, 0.5)]
        assert "epoch" not in log.Tags()["scalars"], "it would stand before all others"


def test_what_a_run_is_goes_to_every_logger(tmp_path):
    plain, board = CSVLogger(tmp_path, "plain"), Board(tmp_path / "board")
    trainer = Trainer(logger=[plain, board], accelerator="cpu")
    texts = {"command": "python train.py", "config": "lr: 3\nname: tiny"}
    log_run(trainer, texts, {"lr": 3.0, "kind": "UNet"}, ["lr", "batch_size"], ["quality/recall"])
    log_curve(trainer, "quality_by_evaluations/recall", {2: 0.5, 8: 0.75})
    flush(trainer)
    assert "kind: UNet" in (Path(plain.log_dir) / "hparams.yaml").read_text()
    assert "recall" not in "".join(path.read_text() for path in Path(plain.log_dir).glob("*.csv")), "it has one axis, the steps"
    log = EventAccumulator(board.log_dir, size_guidance={"scalars": 0, "tensors": 0}).Reload()
    assert [(e.step, e.value) for e in log.Scalars("quality_by_evaluations/recall")] == [(2, 0.5), (8, 0.75)]
    assert "lr: 3" in log.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "python train.py" in log.Tensors("command/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "custom_scalars__config__" in log.Tags()["tensors"]
