"""The fence: each function that uses what is private to Lightning or PyTorch does what it says, in a real run."""

import ast
import inspect
import signal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch.utils.data import DataLoader

from flowmatch_mnist.training import internals
from flowmatch_mnist.training.ema import EMA

FENCED = [name for name, found in inspect.getmembers(internals, inspect.isfunction) if found.__module__ == internals.__name__]


class Line(LightningModule):
    """The smallest module that learns; it notes how often its gradients are unscaled by the optimizer's own step."""

    def __init__(self, optimizer=torch.optim.SGD):
        super().__init__()
        self.layer, self.optimizer = torch.nn.Linear(2, 1), optimizer

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.1)


def fit(folder, *callbacks, module=None, ckpt_path=None, **settings):
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[NoFiles(), *callbacks],
        **({"max_epochs": 1} | settings),
    )
    loaders = DataLoader(torch.ones(6, 2)), DataLoader(torch.ones(1, 2))
    trainer.fit(module or Line(), *loaders, ckpt_path=ckpt_path, weights_only=True)


class NoFiles(Checkpoint):
    """Keeps Lightning from keeping checkpoints of its own."""


def check_average_of(tmp_path):
    ema = EMA(decay=0.5)
    assert internals.average_of(ema) is None
    module = Line()
    fit(tmp_path, ema, module=module)
    average = internals.average_of(ema)
    assert isinstance(average, Line) and average is not module


def check_unscale_before_clipping(tmp_path):
    module = Line(lambda parameters, lr: torch.optim.AdamW(parameters, lr, fused=True))
    settings = {"gradient_clip_val": 0.5, "precision": "bf16-mixed", "max_steps": 1}
    with pytest.raises(RuntimeError, match="clip"):
        fit(tmp_path, module=module, **settings)

    def unscaled(parameters, lr):
        optimizer = torch.optim.AdamW(parameters, lr, fused=True)
        internals.unscale_before_clipping(optimizer)
        return optimizer

    fit(tmp_path, module=Line(unscaled), **settings)


def check_validation_follows(tmp_path):
    class Note(Callback):
        told, done = [], []

        def on_train_batch_end(self, trainer, *_):
            self.told.append(internals.validation_follows(trainer))

        def on_validation_end(self, trainer, *_):
            self.done.append(trainer.global_step)

    fit(tmp_path, Note(), val_check_interval=2)
    assert Note.told == [False, True] * 3 and Note.done == [2, 4, 6]


def check_begin_next_epoch(tmp_path):
    class Save(Checkpoint):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    class Seen(Callback):
        def __init__(self):
            self.batches = []

        def on_train_start(self, trainer, pl_module):
            internals.begin_next_epoch(trainer)
            assert not trainer.fit_loop.restarted_on_epoch_end

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.batches.append((trainer.current_epoch, batch_idx))

    limits = {"max_steps": 5, "max_epochs": 5, "limit_train_batches": 3, "val_check_interval": 2}
    fit(tmp_path, Save(), **limits)
    seen = Seen()
    fit(tmp_path, seen, ckpt_path=tmp_path / "3.ckpt", **limits)
    assert seen.batches == [(1, 0), (1, 1)]


def check_on_sigterm(tmp_path):
    heard = []

    class Signalled(Callback):
        def setup(self, trainer, pl_module, stage):
            internals.on_sigterm(trainer, lambda number, frame: heard.append(number))

        def on_train_start(self, trainer, *_):
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        fit(tmp_path, Signalled())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def check_take_over_requeueing(tmp_path):
    for plugins, told in (
        ([], None),
        ([SLURMEnvironment(auto_requeue=True)], signal.SIGUSR1),
        ([SLURMEnvironment(auto_requeue=True, requeue_signal=signal.SIGUSR2)], signal.SIGUSR2),
        ([SLURMEnvironment(auto_requeue=False)], None),
    ):
        trainer = Trainer(accelerator="cpu", logger=False, plugins=plugins)
        assert internals.take_over_requeueing(trainer) == told
        assert internals.take_over_requeueing(trainer) is None, "it is no longer Lightning's"


@pytest.mark.parametrize("name", FENCED)
def test_the_fence_stands(name, tmp_path):
    """A function that fails here is what an upgrade of Lightning or PyTorch has broken."""
    globals()[f"check_{name}"](tmp_path)


@pytest.mark.parametrize("name", FENCED)
def test_each_of_its_functions_needs_to_be_there(name):
    tree = ast.parse(inspect.getsource(getattr(internals, name)))
    private = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")]
    assert private, f"{name} uses nothing private; it belongs elsewhere"
    assert len(inspect.getdoc(getattr(internals, name)).split(".")) > 1, f"{name} does not say why"
