"""The commands of this project: how a user types them, and their parser."""

import argparse
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn

from flowmatch_mnist.support.errors import one_line


def as_typed(command: Literal["train", "sample"]) -> str:
    """Return how the user types a command: `python train.py` in a clone, or `flowmatch-train` if that script is running."""
    installed = Path(sys.argv[0]).stem in ("flowmatch-train", "flowmatch-sample")
    return f"flowmatch-{command}" if installed else f"python {command}.py"


class CommandParser(argparse.ArgumentParser):
    """An argument parser. It reports errors on one line, and its help shows the docstring unchanged."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and exit with status 2."""
        self.exit(2, f"error: {one_line(message)}; see `{self.prog} --help`\n")
