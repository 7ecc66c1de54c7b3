"""The choices that command lines offer. No PyTorch here, so that `sample.py` reports a mistake before it imports anything."""

from pathlib import Path
from typing import Literal, get_args

SOLVERS = ("euler", "midpoint", "heun", "rk4", "dpmpp_2m", "average", "dopri5")
"""The solvers of `flow.solvers.trajectory`."""

Spacing = Literal["uniform", "log_snr"]
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
"""How the times of `flow.solvers.time_grid` can be spaced."""

PRETRAINED = {name: Path(__file__).parents[1] / "weights" / f"{name}.safetensors" for name in ("mnist", "few-step", "one-step")}
"""The trained weights in the package. Each file says how it was trained, and its figures."""
