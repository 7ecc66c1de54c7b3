"""The command line of `train.py`: Lightning's command line with this project's callbacks, folders and error messages."""

import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from flowmatch_mnist.data import curve, digits, reflow  # noqa: F401  configs and options name their data modules
from flowmatch_mnist.data.pairs import PairsDataModule
from flowmatch_mnist.sampling.weights import DESCRIPTION_KEY, draws_digits, read_checkpoint, stored_arguments
from flowmatch_mnist.support.errors import UserError, exit_on_error, one_line
from flowmatch_mnist.training.arguments import NEWEST, RUNS, complete, find_checkpoint, option, run_folder
from flowmatch_mnist.training.best import KeepBest, evaluations
from flowmatch_mnist.training.config import LogConfig
from flowmatch_mnist.training.console import Bar, Report, what_next
from flowmatch_mnist.training.distributed import is_first
from flowmatch_mnist.training.drawing import DrawSamples, WriteSamples
from flowmatch_mnist.training.ema import EMA
from flowmatch_mnist.training.evaluation import Evaluate
from flowmatch_mnist.training.folder import RunFolder, check_name, create_version, lock_folder, release_on_error
from flowmatch_mnist.training.module import FlowMatching
from flowmatch_mnist.training.options import PRECISIONS, as_list, check_options
from flowmatch_mnist.training.parser import ConfigParser, accept_older_configs, explain
from flowmatch_mnist.training.requeue import checkpoint_of_this_job
from flowmatch_mnist.training.saving import CheckpointFiles, SaveLast, end_together
from flowmatch_mnist.training.tensorboard import Board


def native_precision(accelerator: str) -> str:
    """Return bf16 mixed precision if the hardware computes in it, else 32 bits: emulated bf16 is far slower than fp32."""
    if accelerator != "cpu" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_tile"))
    return "bf16-mixed" if native else "32-true"


class CLI(LightningCLI):
    """Lightning's command line for `FlowMatching` on MNIST.

    A run's files go to `runs/<name>/version_<n>/`; `--trainer.default_root_dir` replaces `runs`. `--ckpt_path last` (or `best`)
    means that checkpoint of the newest run with this name, and `fit` resumes in its folder. `fit` from the path of a checkpoint
    starts a new version.

    Attributes:
        folder: the run's folder; None if the run keeps nothing. Only the first process always knows it.
        lock: the lock of this folder during `fit`.
        stored_step: the step at which the given checkpoint was saved, or None.
        resumes: whether the command works in the folder of an earlier run.
        verbose: whether `validate` and `test` print their table.
    """

    folder: Path | None = None
    lock: FileLock | None = None
    stored_step: int | None = None
    resumes = False
    verbose = True

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's subcommands, or only the one that is asked for: it takes a while to build the parser of each."""
        found = LightningCLI.subcommands()
        asked = sys.argv[1:2]
        return {name: skipped for name, skipped in found.items() if [name] == asked} or found

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, default="mnist", help="The run's name: it goes to runs/<name>/version_<n>/.")
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(DrawSamples, "sampling")
        parser.add_lightning_class_args(Evaluate, "evaluation")
        parser.add_lightning_class_args(KeepBest, "checkpoint")
        parser.add_lightning_class_args(SaveLast, "saving")  # last, so its checkpoint has the newest state of the others
        for target in ("model.seed", "data.init_args.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        # Hidden from Lightning, which would now read settings from the checkpoint: the file may not be trustworthy.
        settings = self.config[self.config.subcommand]
        self.checkpoint, settings.ckpt_path = settings.ckpt_path, None

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        check_name(config.name)
        check_options(config.trainer)
        # A run may go on, or be measured, on other hardware than its config was written on.
        moved = self.checkpoint is not None and option(sys.argv, "--trainer.precision") is None
        if config.trainer.precision is None or (moved and config.trainer.precision == "bf16-mixed"):
            config.trainer.precision = native_precision(config.trainer.accelerator)
        if config.weights_only is False:
            raise UserError("--weights_only false is not supported, because a checkpoint could then run any code; leave it out")
        config.weights_only = True
        for seed in ("--data.seed", "--data.init_args.seed"):
            if option(sys.argv, seed) is not None:
                raise UserError(f"{seed} would have no effect, because the data use the run's seed; set --seed_everything")
        root = Path(config.trainer.default_root_dir or RUNS)
        self.versions = root / config.name
        path = None
        if self.checkpoint is not None:
            path = find_checkpoint(self.checkpoint, config.name, root)
        elif self.subcommand == "fit":
            path = checkpoint_of_this_job(self.versions)
        else:
            raise UserError(f"{self.subcommand} needs a trained model; give --ckpt_path (a file, or last, or best)")
        if path is not None:
            stored = read_checkpoint(path)
            self.stored, self.stored_step = stored[DESCRIPTION_KEY], stored.get("global_step")
            if self.subcommand != "fit":
                self.folder = run_folder(path) or path.parent
            elif self.checkpoint in (None, *NEWEST):
                self.folder = run_folder(path)
            self.resumes = self.folder is not None
            config.ckpt_path = str(path)
        if self.subcommand != "fit":
            self.save_config_callback = None
        if self.subcommand in ("validate", "test"):
            self.verbose, config.verbose = config.verbose, False  # Evaluate prints a table instead of Lightning's

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, RuntimeError, ImportError, MemoryError, MisconfigurationException) as error:
            raise UserError(f"{explain(error)[:600]}; correct the config or the command line") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init[self.subcommand].trainer
        if self.subcommand == "fit" and not settings.fast_dev_run and is_first():
            self.folder = self.folder or create_version(self.versions)
            self.lock = lock_folder(self.folder)
        with release_on_error(self.folder, self.lock):
            # By default, Lightning looks for SLURM's files in this folder, and other callbacks and plugins write there.
            kwargs["default_root_dir"] = self.folder or self.versions
            folder = RunFolder(self.folder, self.lock, new=self.lock is not None and not self.resumes)
            # Report comes early, so its clock stops before the other callbacks use time.
            kwargs["callbacks"] = [folder, Report(), *as_list(settings.callbacks)]
            bars = [callback for callback in kwargs["callbacks"] if isinstance(callback, ProgressBar)]
            callbacks: list[Callback] = [WriteSamples()]
            if settings.enable_progress_bar is not False and not bars:
                callbacks.append(Bar())
            self.trainer_defaults["callbacks"] = callbacks
            kwargs["plugins"] = [CheckpointFiles(), *as_list(settings.plugins)]
            if settings.logger in (None, True):
                kwargs["logger"] = self.board()
            return super().instantiate_trainer(**kwargs)

    def board(self) -> Board | bool:
        """Return this command's TensorBoard logger, or False for none.

        TensorBoard follows only one writer in a folder, so only `fit` writes to the run's own folder.
        """
        if self.subcommand == "fit":
            # A resumed run logs the steps after its checkpoint again. TensorBoard must hide the killed run's values for them.
            return Board(self.folder or self.versions, purge_step=self.stored_step if self.resumes else None)
        if self.subcommand == "predict" or self.folder is None:
            return False
        return Board(self.folder / str(self.subcommand), at=self.stored_step)

    def after_instantiate_classes(self) -> None:
        signal.signal(signal.SIGTERM, end_together(self.trainer))
        with release_on_error(self.folder, self.lock):
            self.check()
        if self.subcommand == "fit" and self.trainer.is_global_zero:
            self.announce()
        for evaluate in evaluations(self.trainer):
            evaluate.verbose = self.verbose

    def check(self) -> None:
        """Raise UserError for an unsupported precision, too small batches, and a checkpoint of another model."""
        if self.trainer.precision not in PRECISIONS:
            raise UserError(
                f"precision {self.trainer.precision} is not supported, because weights and averages are kept in 32 bits; "
                f"set --trainer.precision to one of {', '.join(PRECISIONS)}"
            )
        if self.datamodule.eval_batch_size < self.trainer.world_size:
            raise UserError(
                f"eval_batch_size {self.datamodule.eval_batch_size} is divided among {self.trainer.world_size} processes, so "
                "some would get no samples; raise --data.eval_batch_size"
            )
        checkpoint = self.config[self.subcommand].ckpt_path
        self.model.check_data_and_set_units(self.datamodule)
        if checkpoint is not None:
            wanted = self.model.flow.describe(self.model.sampler)
            for key in ("network", "arguments", "path", "prediction", "units"):
                stored = stored_arguments(self.stored, self.model.net) if key == "arguments" else self.stored.get(key)
                if stored != wanted[key]:
                    raise UserError(
                        f"{checkpoint} holds a model with {key} {self.stored.get(key)}, but the config asks for {wanted[key]}; "
                        "give the --config that it was trained with, or no --config"
                    )
            self.model.resumes = True
            # The saved config has no checkpoint, because a run from that config should start from the beginning.
            self.config[self.subcommand].ckpt_path = None
            if self.trainer.is_global_zero:
                print(f"{'going on from' if self.subcommand == 'fit' else 'using'} {checkpoint}", flush=True)

    def announce(self) -> None:
        """Print the network, the devices, the precision and the folder of a run that begins."""
        size = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        print(
            f"training {type(self.model.net).__name__} ({size:.2f} M parameters) on {self.trainer.world_size} x "
            f"{self.trainer.strategy.root_device.type} in {self.trainer.precision}, into {self.folder or 'no folder'}",
            flush=True,
        )
        if self.folder is not None:
            watch = f"tensorboard --logdir {self.versions.parent}"
            print(f"watch it with `{watch}`; pictures go to {self.folder / 'samples'}", flush=True)
        if (processes := self.trainer.world_size) > 1:
            batch = self.datamodule.batch_size
            print(
                f"{processes} processes take {batch} samples each, {processes * batch} a step; to match one process, set "
                f"--data.batch_size {max(1, batch // processes)}; with the larger batch, another --model.optimizer.lr may be "
                f"better, up to {processes**0.5:.2g} times as high",
                flush=True,
            )

    def after_fit(self) -> None:
        """Print the results, and the next commands."""
        if self.folder is not None and self.trainer.is_global_zero and self.trainer.state.finished:
            print(what_next(self.folder, self.versions.parent, draws_digits(self.model.net)), flush=True)


def raised_by_lightning(error: BaseException) -> bool:
    """Return whether Lightning's own code raised an error, for example in a check, and not the code that Lightning calls."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__")).startswith("lightning.")


def main() -> None:
    """Run the command line. After a mistake of the user, print one line and exit with status 2."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # profilers print their report only through it
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns if a GPU compiler finds no GPU
    log = logging.getLogger("flowmatch_mnist")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", message=".*treespec.*LeafSpec.*")  # from Lightning with the newest PyTorch
    warnings.filterwarnings("ignore", message=".*Grad strides do not match bucket view strides.*")  # from 1x1 convolutions
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")  # in a resumed run
    torch.set_float32_matmul_precision("high")
    accept_older_configs()
    with exit_on_error():
        try:
            sys.argv[1:] = complete(sys.argv[1:])
            CLI(
                FlowMatching,
                PairsDataModule,
                subclass_mode_data=True,
                parser_class=ConfigParser,
                save_config_callback=LogConfig,
                save_config_kwargs={"save_to_log_dir": False},
                seed_everything_default=0,
                trainer_defaults={"devices": 1, "enable_model_summary": False, "num_sanity_val_steps": 0},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )
        except UnicodeDecodeError as error:
            raise UserError(f"{option(sys.argv, '--config')} is not a text file, so it is no config; use another") from error
        except (MisconfigurationException, ValueError, TypeError, RuntimeError, KeyError, NotImplementedError) as error:
            if not raised_by_lightning(error):
                raise
            raise UserError(f"{one_line(error)[:600]}; correct the config or the command line") from error
