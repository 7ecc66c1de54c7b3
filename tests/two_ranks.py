"""train.py, but each process writes what it saw to rank<n>.pt. Run by test_cli.py."""

import torch
from lightning.pytorch import Callback

from flowmatch_mnist.training import cli


class Witness(Callback):
    """Keeps this rank's batches, and its weights at the end."""

    def __init__(self) -> None:
        self.batches: list[list[torch.Tensor]] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append([tensor.clone() for tensor in batch])

    def on_train_end(self, trainer, module):
        seen = {
            "batches": self.batches,
            "weights": [parameter.detach().clone() for parameter in module.parameters()],
            "val": trainer.callback_metrics["loss/val"].item(),
        }
        torch.save(seen, f"rank{trainer.global_rank}.pt")


class WatchedCLI(cli.CLI):
    """The command line, with a witness."""

    def instantiate_trainer(self, **kwargs):
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(Witness())
        return trainer


if __name__ == "__main__":
    cli.CLI = WatchedCLI
    cli.main()
