"""The config of a run: its copy in the run's folder, and its settings in the loggers."""

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from flowmatch_mnist.support.files import replacing
from flowmatch_mnist.training.folder import folder_of
from flowmatch_mnist.training.tensorboard import Value, log_run

OMITTED_SETTINGS = ("channels_last", "compile", "data_dir", "eval_batch_size", "num_workers", "predict_per_class")
"""Settings that are left out of the hyperparameters, because they do not change the trained network."""


LISTED_SETTINGS = (
    *("optimizer.lr", "max_steps", "max_epochs", "batch_size", "net.channels"),
    *("path", "exact_until", "label_dropout", "sampler.guidance", "seed_everything"),
)
"""The settings that TensorBoard lists for each run."""


class LogConfig(SaveConfigCallback):
    """Saves the resolved config in the run's folder, and passes it to the loggers."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Get the run's folder here, because all processes must ask for it together."""
        self.folder = folder_of(trainer)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the config and log it. Lightning calls this in one process only."""
        if self.folder is not None:
            with replacing(self.folder / "config.yaml") as temporary:
                self.parser.save(self.config, temporary, skip_unset=False, overwrite=True, multifile=False)
        config = self.parser.dump(self.config, skip_unset=False)
        texts = {"command": command(), "machine": machine(trainer), "config": config}
        headlines = trainer.datamodule.problem.headlines  # type: ignore[attr-defined]
        log_run(trainer, texts, hyperparameters(vars(self.config.as_flat())), LISTED_SETTINGS, headlines)


def command() -> str:
    """Return the command line of this run."""
    program = Path(sys.argv[0]).name
    return shlex.join([*["python"] * program.endswith(".py"), program, *sys.argv[1:]])


def machine(trainer: Trainer) -> str:
    """Describe the machine: one line for the hardware, and one line for the software."""
    device = trainer.strategy.root_device
    name = f" {torch.cuda.get_device_name(device)}" if device.type == "cuda" and torch.cuda.is_available() else ""
    versions = f"flowmatch-mnist {version('flowmatch-mnist')}, torch {torch.__version__}, lightning {version('lightning')}"
    return (
        f"{trainer.world_size} x {device.type}{name} in {trainer.precision}; {os.cpu_count()} processor cores, "
        f"{platform.system()} {platform.machine()}\nPython {platform.python_version()}, {versions}"
    )


def hyperparameters(config: dict[str, Any]) -> dict[str, Value]:
    """Return the settings of a flat config that distinguish runs, with short names, and values that TensorBoard can sort by."""
    chosen: dict[str, Value] = {}
    for key, value in config.items():
        group, _, rest = key.partition(".")
        if group in ("seed_everything", "model", "ema", "data") or key in ("trainer.max_epochs", "trainer.max_steps"):
            name = ".".join(part for part in rest.split(".") if part not in ("init_args", "class_path")) or group
            name = f"ema.{name}" if group == "ema" else name  # because the learning rate has a decay too
            unlimited = name in ("max_epochs", "max_steps") and value == -1
            if value is not None and name not in OMITTED_SETTINGS and not unlimited:
                chosen[name] = value if isinstance(value, bool | int | float) else str(value).rsplit("flowmatch_mnist.", 1)[-1]
    return chosen
