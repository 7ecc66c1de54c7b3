"""The choices of command-line options. PyTorch is not imported here, so `sample.py` reports a mistake before slow imports."""

from pathlib import Path
from typing import Literal, get_args

SOLVERS = ("euler", "midpoint", "heun", "rk4", "dpmpp_2m", "average", "dopri5")
"""The solvers of `flow.solvers.trajectory`."""

Spacing = Literal["uniform", "log_snr"]
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
"""The spacings of the times of `flow.solvers.time_grid`."""

PRETRAINED = {name: Path(__file__).parents[1] / "weights" / f"{name}.safetensors" for name in ("mnist", "few-step", "one-step")}
"""The trained weights in the package. Each file describes its training and its scores."""
