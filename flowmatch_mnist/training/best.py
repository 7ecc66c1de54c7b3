"""Keeping the best checkpoints of a run, by the validation loss or by a score of quality."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import replacing
from flowmatch_mnist.training.evaluation import QUALITY, Evaluate
from flowmatch_mnist.training.folder import folder_of

REFUSED = {
    "save_last": "last.ckpt is written by --saving",
    "save_on_exception": "after an error the weights are not the best, and --saving keeps the newest in last.ckpt",
    "save_weights_only": "a checkpoint would then hold other weights than the averages that were measured",
}
"""Arguments of `ModelCheckpoint` that are refused, with the reasons."""

REFUSED_BY_QUALITY = dict.fromkeys(
    ("every_n_train_steps", "train_time_interval", "save_on_train_epoch_end"),
    "by quality, checkpoints are saved when --evaluation measures",
)
"""Further arguments that are refused if `Evaluate` measures the number, with the reason."""


def evaluations(trainer: Trainer) -> list[Evaluate]:
    """Return the trainer's callbacks that measure the quality of samples."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, Evaluate)]


class KeepBest(ModelCheckpoint):
    """Keeps `best.ckpt`, the checkpoint with the lowest (or highest) value of one number, and more checkpoints if asked to.

    If `Evaluate` measures the number, this callback saves right after that. So the number belongs to the saved weights.

    Args:
        filename: name of the checkpoints, without the extension: by default "best" for a single one, and the step for several.
        monitor: the number: "loss/val", or one that `Evaluate` logs, such as "quality/Frechet distance ratio".
        save_top_k: number of checkpoints to keep; -1 keeps all, 0 keeps none.
        mode: "min" if a lower number is better, "max" if a higher number is better.
        enable_version_counter: whether a new file with the name of an old one gets a number instead of replacing it.
        settings: other arguments of Lightning's `ModelCheckpoint`, except those in `REFUSED`.

    Raises:
        ValueError: if several checkpoints would get the same name, an argument is refused, or other settings say when to save
            although the quality decides.
    """

    def __init__(
        self,
        filename: str | None = None,
        monitor: str | None = "loss/val",
        save_top_k: int = 1,
        mode: str = "min",
        enable_version_counter: bool = False,
        **settings: Any,
    ) -> None:
        self.by_quality = monitor is not None and monitor.startswith(QUALITY)
        for setting, reason in (REFUSED | (REFUSED_BY_QUALITY if self.by_quality else {})).items():
            if settings.get(setting):
                raise ValueError(f"{reason}; leave out --checkpoint.{setting}")
        if filename is not None and save_top_k not in (0, 1) and "{" not in filename:
            raise ValueError(
                f"--checkpoint.filename {filename!r} is one name for several checkpoints; add {{step}} to it, or leave it out"
            )
        filename = filename or ("best" if save_top_k == 1 else "{step}")
        if self.by_quality:
            settings["save_on_train_epoch_end"] = False
        super().__init__(
            filename=filename,
            monitor=monitor,
            save_top_k=save_top_k,
            mode=mode,
            enable_version_counter=enable_version_counter,
            **settings,
        )
        self._copied: tuple[str, int] | None = None  # the path, and the time of its last change in ns

    @property
    def state_key(self) -> str:
        """Return the key of Lightning's own callback, because older checkpoints store the state under it."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the checkpoints in the run's folder, unless `dirpath` names another.

        Raises:
            UserError: if the run never measures the number.
        """
        if stage == "fit" and self.by_quality and not any(evaluate.scheduled for evaluate in evaluations(trainer)):
            raise UserError(
                f"--checkpoint.monitor {self.monitor!r} needs measurements during training; set --evaluation.every_n_epochs or "
                "--evaluation.every_n_steps"
            )
        self.folder = folder_of(trainer)
        if self.dirpath is None and self.folder is not None:
            self.dirpath = str(self.folder / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the list of best checkpoints if they are in this folder. The run may have been moved, or may be a new one."""

        def here(path: str) -> str:
            return str(Path(self.dirpath or ".") / Path(path).name) if path else ""

        paths = {key: here(state_dict.get(key, "")) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        if Path(paths["best_model_path"]).is_file():
            best = {here(path): score for path, score in state_dict["best_k_models"].items()}
            super().load_state_dict({**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if `Evaluate` measured the quality in this step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._save_by_quality(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if the quality was just measured, or as Lightning does. An epoch that stopped in the middle has no scores."""
        if trainer.should_stop and not trainer.is_last_batch:
            return
        super().on_train_epoch_end(trainer, pl_module)
        self._save_by_quality(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save as Lightning does, but not by quality: at this point, the last score may belong to earlier weights."""
        if not self.by_quality:
            super().on_validation_end(trainer, pl_module)
            self._copy(trainer)

    def _save_by_quality(self, trainer: Trainer, module: LightningModule) -> None:
        if self.by_quality and any(evaluate.done_at == trainer.global_step for evaluate in evaluations(trainer)):
            super().on_validation_end(trainer, module)
        self._copy(trainer)

    def _copy(self, trainer: Trainer) -> None:
        """Copy the best checkpoint to `best.ckpt` in the run's folder if it has another name or folder."""
        if self.folder is None or not trainer.is_global_zero:
            return
        path, best = Path(self.best_model_path), self.folder / "checkpoints" / "best.ckpt"
        if path == best or not path.is_file():  # there is no best checkpoint yet, or somebody has removed it
            return
        newest = (str(path), path.stat().st_mtime_ns)
        if newest != self._copied:
            with replacing(best) as temporary:
                shutil.copyfile(path, temporary)
            self._copied = newest
