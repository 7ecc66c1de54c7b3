"""Which of Lightning's options a run takes. All others of `Trainer` are handed on as they are."""

from typing import Any

from flowmatch_mnist.support.errors import UserError

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""The precisions that a network can be trained in."""

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")
"""Those that keep all weights in each process, as averages and checkpoints need them, and start each as a program."""

ONLY: dict[str, tuple[Any, str]] = {
    "barebones": (False, "a run here keeps checkpoints and logs; benchmarks/speed.py measures the bare loop"),
    "enable_checkpointing": (True, "a run keeps last.ckpt and best.ckpt; --trainer.fast_dev_run true keeps nothing"),
    "enable_autolog_hparams": (True, "the settings of a run are always logged; --trainer.logger false logs nothing"),
    "model_registry": (None, "checkpoints are files here; copy them to where you want them"),
    "use_distributed_sampler": (True, "batches are always shared between the processes"),
}
"""Options that have one value, and why."""


def check_options(trainer: Any) -> None:
    """Raise UserError for an option of the trainer, a namespace, that a run cannot have."""
    for name, (value, why) in ONLY.items():
        if trainer.get(name, value) not in (value, None):
            raise UserError(f"--trainer.{name} {str(trainer[name]).lower()} is not supported: {why}")
    if isinstance(trainer.strategy, str) and trainer.strategy not in STRATEGIES:
        raise UserError(
            f"--trainer.strategy {trainer.strategy} is not supported, since each process keeps all weights and is a program of "
            f"its own; choose one of {', '.join(STRATEGIES)}"
        )


def as_list(value: Any) -> list[Any]:
    """One or several, or None, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
