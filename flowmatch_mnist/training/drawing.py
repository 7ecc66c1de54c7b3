"""Callbacks that write samples: pictures during training, and the files of `predict`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from flowmatch_mnist.images.pictures import save_film, save_npz, save_png
from flowmatch_mnist.sampling.generate import Samples, generate
from flowmatch_mnist.training.distributed import gather, interleave
from flowmatch_mnist.training.ema import averaged_flow
from flowmatch_mnist.training.folder import folder_of
from flowmatch_mnist.training.module import FlowMatching
from flowmatch_mnist.training.periodic import Periodic
from flowmatch_mnist.training.steps import last_step
from flowmatch_mnist.training.tensorboard import log_picture

FILM = "learning.gif"
"""The animation in `samples/`. It shows all pictures of one kind, from the first step to the last."""


class DrawSamples(Periodic):
    """Draws samples of every class with the averaged weights, and writes pictures of them to TensorBoard and as PNG files.

    The noise is the same every time, so you can see how each sample develops. The problem decides what the pictures show. The
    files go to `samples/` in the run's folder, next to `checkpoints/`. At the end of training, an animation of the pictures
    goes there too. One process draws, and the others wait for it at their next step.

    Args:
        every_n_epochs: number of epochs from one drawing to the next; 0 means never.
        every_n_steps: number of optimizer steps from one drawing to the next; 0 means never.
        at_steps: additional steps at which to draw, such as the first steps, when samples change most.
        rows: number of samples of each class.
        seed: random seed of the noise.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self, every_n_epochs: int = 1, every_n_steps: int = 0, at_steps: Sequence[int] = (), rows: int = 8, seed: int = 0
    ) -> None:
        super().__init__(every_n_epochs, every_n_steps, at_steps)
        if rows < 1:
            raise ValueError(f"DrawSamples needs rows of at least 1, got {rows}")
        self.rows = rows
        self.seed = seed
        self.folder: Path | None = None
        self._filmed: str | None = None  # the name of the pictures in the animation

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last drawing, and the name of its pictures for the animation."""
        return {**super().state_dict(), "filmed": self._filmed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both."""
        super().load_state_dict(state_dict)
        self._filmed = state_dict.get("filmed")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Get the run's folder now, because all processes must ask together; later only one process draws."""
        self.folder = folder_of(trainer)

    def act(self, trainer: Trainer, module: FlowMatching) -> None:
        """Draw samples, log the pictures, and write the files."""
        if not trainer.is_global_zero:
            return
        problem = trainer.datamodule.problem  # type: ignore[attr-defined]
        samples = generate(
            averaged_flow(trainer, module),
            torch.arange(problem.classes).repeat(self.rows),
            module.sampler,
            seed=self.seed,
            keep_states=True,
        )
        pictures = problem.pictures(samples)
        self._filmed = next(iter(pictures))
        for name, picture in pictures.items():
            if self.folder is not None:
                save_png(picture, self.folder / "samples" / f"{name}-{trainer.global_step:06d}.png")
            log_picture(trainer, f"samples/{name}", picture, last_step(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the animation. It also shows the pictures from before the run was resumed."""
        if self.folder is not None and self._filmed is not None and trainer.is_global_zero:
            pictures = sorted((self.folder / "samples").glob(f"{self._filmed}-*.png"))
            if pictures:  # a user may have removed them
                save_film(pictures, self.folder / "samples" / FILM)


class WriteSamples(BasePredictionWriter):
    """Writes the samples of `predict` to the run's folder: arrays as `predictions.npz`, and pictures next to it."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(self, trainer: Trainer, pl_module: LightningModule, predictions: Any, batch_indices: Any) -> None:
        """Gather the samples of all processes, and write them in the order of the data."""
        shares = gather(trainer, predictions)
        folder = folder_of(trainer) or Path()
        if not trainer.is_global_zero:
            return
        problem = trainer.datamodule.problem  # type: ignore[attr-defined]
        batches = [interleave(share) for batch in zip(*shares, strict=True) for share in zip(*batch, strict=True)]
        # Each batch gave two entries: values and labels.
        values, labels = torch.cat(batches[0::2]).cpu(), torch.cat(batches[1::2]).cpu()
        written = [folder / "predictions.npz"]
        save_npz(written[0], **{problem.kind: values}, labels=labels)
        for name, picture in problem.pictures(Samples(values, labels, evaluations=0)).items():
            written.append(folder / f"predictions-{name}.png")
            save_png(picture, written[-1])
        print(f"wrote {len(values)} samples: {', '.join(map(str, written))}")
