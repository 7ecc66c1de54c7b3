"""The options of Lightning's `Trainer` that this project restricts. All others are passed on unchanged."""

from typing import Any

from flowmatch_mnist.support.errors import UserError

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""The precisions for training a network."""

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")
"""The strategies in which each process is a program with all weights: averages and checkpoints need all weights."""

FIXED_OPTIONS: dict[str, tuple[Any, str]] = {
    "barebones": (False, "a run keeps checkpoints and logs; use benchmarks/speed.py to measure without them"),
    "enable_checkpointing": (True, "a run keeps last.ckpt and best.ckpt; use --trainer.fast_dev_run true to keep nothing"),
    "enable_autolog_hparams": (True, "the settings of a run are always logged; use --trainer.logger false to log nothing"),
    "model_registry": (None, "checkpoints are files; copy them to the place where you want them"),
    "use_distributed_sampler": (True, "batches are always shared between the processes"),
}
"""The options with only one supported value, and the reason."""


def check_options(trainer: Any) -> None:
    """Raise UserError if `trainer`, the namespace of the trainer's options, has a value that is not supported."""
    for name, (value, why) in FIXED_OPTIONS.items():
        if trainer.get(name, value) not in (value, None):
            raise UserError(f"--trainer.{name} {str(trainer[name]).lower()} is not supported: {why}")
    if isinstance(trainer.strategy, str) and trainer.strategy not in STRATEGIES:
        raise UserError(
            f"--trainer.strategy {trainer.strategy} is not supported, because each process keeps all weights and is a program "
            f"of its own; choose one of {', '.join(STRATEGIES)}"
        )


def as_list(value: Any) -> list[Any]:
    """Return a value as a list: None is an empty list, and a list or tuple keeps its values."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
