"""Logging: numbers for every logger, pictures and texts for the loggers that accept them. Only this file calls TensorBoard."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

Value = bool | int | float | str
"""A value that TensorBoard can sort runs by."""


class Board(TensorBoardLogger):
    """A TensorBoard logger for one folder, without the epoch's curve, which would be the first of all curves.

    Args:
        folder: the folder for the event files.
        at: the step of all scalars, if it is known. Otherwise the validation of a checkpoint would log them at step 0.
        settings: settings of TensorBoard's writer.
    """

    def __init__(self, folder: Path, at: int | None = None, **settings: Any) -> None:
        super().__init__(folder.parent, "", folder.name, default_hp_metric=False, **settings)
        self.at = at

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars, but not the epoch."""
        step = step if self.at is None else self.at
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


def boards(trainer: Trainer) -> list[SummaryWriter]:
    """Return the writers of all TensorBoard loggers."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def log_scalars(trainer: Trainer, scalars: Mapping[str, float], step: int) -> None:
    """Log numbers with their tags to every logger."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step)


def log_picture(trainer: Trainer, tag: str, picture: Tensor, step: int) -> None:
    """Log a picture, uint8 (H, W) or (H, W, 3), to TensorBoard, and to other loggers with a `log_image`, such as W&B."""
    for board in boards(trainer):
        board.add_image(tag, picture if picture.dim() == 3 else picture[..., None], step, dataformats="HWC")
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger) and hasattr(logger, "log_image"):
            logger.log_image(tag, [picture.numpy()], step)


def log_curve(trainer: Trainer, tag: str, points: Mapping[int, float]) -> None:
    """Log a curve over a quantity other than the step. Only TensorBoard gets it, because other loggers cannot show it."""
    for board in boards(trainer):
        for x, y in points.items():
            board.add_scalar(tag, y, x)


def log_run(
    trainer: Trainer, texts: Mapping[str, str], settings: dict[str, Value], few: Sequence[str], headlines: Sequence[str]
) -> None:
    """Log the settings of a run. TensorBoard also gets texts, and a page of the charts to look at first.

    Args:
        trainer: the run's trainer.
        texts: texts by their titles, such as the config.
        settings: the settings that distinguish this run from others; loggers other than TensorBoard get all of them.
        few: the names of the settings that TensorBoard lists for each run; names that this run lacks are left out.
        headlines: the tags of the scores to look at first.
    """
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(settings)
    for board in boards(trainer):
        for title, text in texts.items():
            board.add_text(title, "".join(f"    {line}\n" for line in text.splitlines()))
        # This only marks the tags as results of the run. Their values are the scalars with the same names.
        listed = {name: settings[name] for name in few if name in settings}
        for summary in hparams(listed, dict.fromkeys((*headlines, "loss/val"), 0.0)):
            writer: Any = board.file_writer
            writer.add_summary(summary)
        charts = {"losses": ["loss/train", "loss/val"], "losses by time": ["loss_by_time/val.*"]}
        charts |= {tag.removeprefix("quality/"): [tag] for tag in headlines}
        charts |= {"gradient norm": ["optimizer/gradient_norm"], "samples per second": ["speed/samples_per_second"]}
        board.add_custom_scalars({"first look": {title: ["Multiline", tags] for title, tags in charts.items()}})


def flush(trainer: Trainer) -> None:
    """Write everything that was logged so far to the disk."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.save()
