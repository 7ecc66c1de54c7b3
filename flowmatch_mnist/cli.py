"""The command line of `train.py`: Lightning's, with this project's callbacks, folders and error messages."""

import logging
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.tensorboard.summary import hparams

import flowmatch_mnist.reflow
import flowmatch_mnist.toy  # noqa: F401  so that configs and options can name their data modules
from flowmatch_mnist.callbacks import EMA, Bar, DrawSamples, Evaluate, Report, WriteSamples
from flowmatch_mnist.data import PairsDataModule
from flowmatch_mnist.errors import UserError, exit_on_error, one_line
from flowmatch_mnist.files import replacing
from flowmatch_mnist.models import KEY, newest_checkpoint, read_checkpoint
from flowmatch_mnist.module import FlowMatching
from flowmatch_mnist.network import Network
from flowmatch_mnist.saving import CheckpointFiles, SaveLast, end_together, requeued
from flowmatch_mnist.times import TimeDensity

RUNS = Path("runs")
DEFAULT_CONFIG = Path("configs/mnist.yaml")
SEE_HELP = "; see `python train.py fit --help`"
BASES: dict[str, type[object]] = {"model.net": Network, "model.times": TimeDensity, "data": PairsDataModule}
"""Whose subclasses a setting names."""
SUBCOMMANDS = ("fit", "validate", "test", "predict")


ALIKE = ("channels_last", "compile", "data_dir", "eval_batch_size", "num_workers", "predict_per_class")
"""Settings that do not change what is learned."""


class Board(TensorBoardLogger):
    """TensorBoard without a curve of the epoch, which would stand before all others."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log scalars."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


class Parser(LightningArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, and end with status 2."""
        what = plain(message).replace('"<unicode string>"', str(option(sys.argv, "--config")))
        raise UserError(f"{what[:600]}{SEE_HELP}")


def plain(message: object) -> str:
    """What jsonargparse says of a mistake, on one line, without the types that it tried in vain."""
    text = re.sub(r":\n +(?=[^\s-])", ": ", str(message).replace(SEE_HELP, ""))
    key = ".".join(re.findall(r'Parser key "([^"]+)"', text))
    given = next(iter(re.findall(r"(?:import path string|[Gg]ot value|Given value): (.*)", text)), "")
    if choices := re.search(r"typing\.Literal\[(.*?)\]", text):
        return f"there is no {key} {given!r}; choose one of {choices[1]}"
    if key in BASES and "import path string" in text:
        names = ", ".join(kind.__name__ for kind in heirs(BASES[key]))
        return f"there is no {key} {given!r}; choose one of {names}, or name a class of yours by its import path"
    complaints = re.findall(r"^ *- (?!.*NoneType|Expected a path|Does not validate)(.*)", text, re.MULTILINE)
    if not complaints:
        return one_line(re.sub(r'Parser key "([^"]+)":', r"\1:", text))
    # A value that is a whole section says nothing that the complaint does not.
    got = f", got {given}" if complaints[0].startswith("Expected") and "(" not in given else ""
    return one_line(f"{key}{': ' * bool(key)}{' or '.join(complaints)}{got}")


def heirs(base: type[object]) -> list[type[object]]:
    """All classes that are of the kind, each before those that are of its own; by module, whichever was imported first."""
    children = sorted(base.__subclasses__(), key=lambda child: child.__module__)
    return [kind for child in children for kind in (child, *heirs(child))]


class LogConfig(SaveConfigCallback):
    """Keeps the resolved config beside the checkpoints, and shows it in TensorBoard: as a text, as hyper-parameters beside what
    came of them, and, what to look at first, as a layout of its custom scalars.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learn the run's folder, which the processes agree on together."""
        self.folder = trainer.log_dir
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it. Lightning calls this in one process."""
        if self.folder:
            with replacing(Path(self.folder) / "config.yaml") as temporary:
                self.parser.save(self.config, temporary, skip_none=False, overwrite=True, multifile=False)
        if isinstance(trainer.logger, TensorBoardLogger):
            text = self.parser.dump(self.config, skip_none=False)
            board = trainer.logger.experiment
            board.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))
            headlines: tuple[str, ...] = trainer.datamodule.headlines  # type: ignore[attr-defined]
            # Only that these tags are the outcome is written here; their values are the scalars of the same name.
            for summary in hparams(settings(vars(self.config.as_flat())), dict.fromkeys((*headlines, "loss/val"), 0.0)):
                board._get_file_writer().add_summary(summary)
            charts = {"losses": ["loss/train", "loss/val"], **{tag.removeprefix("quality/"): [tag] for tag in headlines}}
            board.add_custom_scalars({"first look": {title: ["Multiline", tags] for title, tags in charts.items()}})


def settings(config: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """What tells one run from another, of a flat config: by short names, and in values that TensorBoard can sort by."""
    told = {}
    for key, value in config.items():
        group, _, rest = key.partition(".")
        if group in ("seed_everything", "model", "ema", "data") or key in ("trainer.max_epochs", "trainer.max_steps"):
            name = ".".join(part for part in rest.split(".") if part not in ("init_args", "class_path")) or group
            name = f"ema.{name}" if group == "ema" else name  # the learning rate has a decay too
            if value is not None and name not in ALIKE:
                told[name] = value if isinstance(value, bool | int | float) else str(value).rsplit("flowmatch_mnist.", 1)[-1]
    return told


def native_precision(accelerator: str) -> str:
    """bf16 mixed precision where the hardware computes in it, else 32 bits: emulated bf16 is far slower than fp32."""
    if accelerator != "cpu" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


def run_folder(checkpoint: Path) -> Path | None:
    """The run `.../<name>/version_<n>` whose checkpoint this is, or None for a file that lies elsewhere."""
    folder = checkpoint.parent.parent  # not made absolute: what ModelCheckpoint kept is for the folder as it was given
    return folder if checkpoint.parent.name == "checkpoints" and re.fullmatch(r"version_\d+", folder.name) else None


def complete(arguments: list[str]) -> list[str]:
    """Fill in what may be left out of a command line: `fit`, and the config. Configs come first, other options overrule them.

    Without a config, a checkpoint's run brings its own; otherwise it is `configs/mnist.yaml`.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        return arguments
    if not arguments or arguments[0] not in SUBCOMMANDS:
        arguments = ["fit", *arguments]
    configs: list[str] = []
    others: list[str] = []
    rest = iter(arguments[1:])
    for argument in rest:
        if argument in ("-c", "--config"):
            configs += ["--config", next(rest, "")]
        else:
            (configs if argument.startswith("--config=") else others).append(argument)
    if configs:
        return [arguments[0], *configs, *others]
    config = DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else Path(__file__).resolve().parent.parent / DEFAULT_CONFIG
    checkpoint = option(arguments, "--ckpt_path")
    if checkpoint is not None:
        folder = run_folder(find_checkpoint(checkpoint, option(arguments, "--name") or "*"))
        if folder is not None and (folder / "config.yaml").is_file():
            config = folder / "config.yaml"
    return [arguments[0], "--config", str(config), *others]


def option(arguments: list[str], name: str) -> str | None:
    """The value given to an option, as `--name value` or `--name=value`."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == name:
            return following
        if argument.startswith(name + "="):
            return argument.removeprefix(name + "=")
    return None


def find_checkpoint(wanted: str, name: str) -> Path:
    """A checkpoint by its path; or `last` or `best`, that of the newest run called `name`."""
    return newest_checkpoint(RUNS, name, f"{wanted}.ckpt") if wanted in ("last", "best") else Path(wanted)


class CLI(LightningCLI):
    """Lightning's command line for `FlowMatching` on MNIST.

    Runs go to `runs/<name>/version_<n>/`. `--ckpt_path last` (or `best`) is the newest run of that name, and `fit` goes on in
    that run's folder; `fit` from the path of a checkpoint starts a new version.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, default="mnist", help="The run's name: it goes to runs/<name>/version_<n>/.")
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(DrawSamples, "sampling")
        parser.add_lightning_class_args(Evaluate, "evaluation")
        parser.add_lightning_class_args(SaveLast, "saving")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "loss/val",
                "checkpoint.filename": "best",
                "checkpoint.enable_version_counter": False,
            }
        )
        for target in ("model.seed", "data.init_args.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)

    def _parse_ckpt_path(self) -> None:
        """Take no settings from a checkpoint, as Lightning would: it may come from a stranger."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        self.folder: Path | None = None
        if config.trainer.precision is None:
            config.trainer.precision = native_precision(config.trainer.accelerator)
        config.weights_only = True
        if self.subcommand != "fit" and config.ckpt_path is None:
            raise UserError(f"{self.subcommand} needs a trained model; name it with --ckpt_path (a file, or last, or best)")
        if config.ckpt_path is not None:
            checkpoint = find_checkpoint(config.ckpt_path, config.name)
            held = read_checkpoint(checkpoint)
            self.held, self.held_step = held[KEY], held.get("global_step")
            if self.subcommand != "fit" or config.ckpt_path in ("last", "best"):
                self.folder = run_folder(checkpoint)
            config.ckpt_path = str(checkpoint)
        if self.subcommand != "fit":
            self.save_config_callback = None
        if self.subcommand in ("validate", "test"):
            config.verbose = False  # Evaluate prints a table of its own

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, RuntimeError, MemoryError, MisconfigurationException) as error:
            raise UserError(f"{plain(error)[:600]}; mend the config or the command line") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self._get(self.config_init, "trainer")
        # Report is first, so that its clock stops before others take their time.
        kwargs["callbacks"] = [Report(), *(settings.callbacks or [])]
        callbacks: list[Callback] = [WriteSamples()]
        if settings.enable_progress_bar is not False:
            callbacks.append(Bar())
        self.trainer_defaults["callbacks"] = callbacks
        kwargs["plugins"] = [CheckpointFiles(), *(settings.plugins or [])]
        if settings.logger in (None, True):
            save_dir, name, version = RUNS, self._get(self.config, "name"), None
            # What a killed run logged after its last checkpoint is logged again: the first time shall not be seen.
            purge: dict[str, Any] = {}
            if self.folder is not None:
                save_dir, name, version = (
                    self.folder.parent.parent,
                    self.folder.parent.name,
                    int(self.folder.name.removeprefix("version_")),
                )
                purge = {"purge_step": self.held_step} if self.subcommand == "fit" else {}
            kwargs["logger"] = Board(save_dir, name, version, default_hp_metric=False, **purge)
        return super().instantiate_trainer(**kwargs)

    def after_instantiate_classes(self) -> None:
        if not requeued(self.trainer):
            signal.signal(signal.SIGTERM, end_together(self.trainer))
        checkpoint = self._get(self.config, "ckpt_path")
        net, data = self.model.net, self.datamodule
        if net.shape != data.shape or net.no_label != data.classes:
            raise UserError(
                f"{type(net).__name__} is for {net.no_label} classes of shape {tuple(net.shape)}, but {type(data).__name__} "
                f"has {data.classes} of shape {tuple(data.shape)}; mend the config"
            )
        wanted = self.model.flow.describe(self.model.sampler) | {"pixels": data.pixels}
        if checkpoint is not None:
            held = self.held
            for key in ("network", "arguments", "path", "prediction", "pixels"):
                # What an older file does not mention of its network is as by default, and so as in the config.
                said = {**wanted[key], **held[key]} if key == "arguments" and isinstance(held.get(key), dict) else held.get(key)
                if said != wanted[key]:
                    raise UserError(
                        f"{checkpoint} holds a model with {key} {held.get(key)}, but the config asks for {wanted[key]}; "
                        "give the --config it was trained with, or none"
                    )
            self.model.start = None  # the checkpoint overrules those weights, and their file may be gone by now
            # Not in the config that is kept: a run from it should start afresh.
            self.config[self.subcommand].ckpt_path = None
            if self.trainer.is_global_zero:
                print(f"{'going on from' if self.subcommand == 'fit' else 'using'} {checkpoint}", flush=True)
        if self.subcommand == "fit" and self.trainer.is_global_zero:
            size = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
            print(
                f"training {wanted['network']} ({size:.2f} M parameters) on {self.trainer.world_size} x "
                f"{self.trainer.strategy.root_device.type} in {self.trainer.precision}, "
                f"into {self.trainer.log_dir or 'no folder'}",
                flush=True,
            )


def main() -> None:
    """Run the command line; mistakes end with one line and status 2."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # says so when a compiler for GPUs finds none
    log = logging.getLogger("flowmatch_mnist")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", message=".*treespec.*LeafSpec.*")  # Lightning's own, of PyTorch's newest versions
    warnings.filterwarnings("ignore", message=".*Grad strides do not match bucket view strides.*")  # of 1x1 convolutions
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")  # when a run goes on
    torch.set_float32_matmul_precision("high")
    with exit_on_error():
        try:
            sys.argv[1:] = complete(sys.argv[1:])
            CLI(
                FlowMatching,
                PairsDataModule,
                subclass_mode_data=True,
                parser_class=Parser,
                save_config_callback=LogConfig,
                save_config_kwargs={"save_to_log_dir": False},
                seed_everything_default=0,
                trainer_defaults={"enable_model_summary": False, "num_sanity_val_steps": 0},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )
        except MisconfigurationException as error:
            raise UserError(error) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{option(sys.argv, '--config')} is no text, so it is no config; name another") from error
