"""What may be left out of a command line, and which run a checkpoint belongs to."""

import re
from pathlib import Path

from flowmatch_mnist.sampling.weights import newest_checkpoint

RUNS = Path("runs")
DEFAULT_CONFIG = Path("configs/mnist.yaml")
NEWEST = ("last", "best")
"""What stands for a checkpoint of the newest run."""
SUBCOMMANDS = ("fit", "validate", "test", "predict")
MOVED = {
    "unet": "networks.unet",
    "mlp": "networks.mlp",
    "times": "flow.times",
    "meanflow": "flow.meanflow",
    "muon": "training.muon",
    "data": "data.digits",
    "toy": "data.curve",
    "reflow": "data.reflow",
}
"""Where the files are whose classes a config from before version 0.1.0 names."""


def today(text: str) -> str:
    """A text with the class paths of before version 0.1.0 as they are today."""
    return re.sub(r"\bflowmatch_mnist\.(\w+)(?=\.[A-Z])", lambda m: f"flowmatch_mnist.{MOVED.get(m[1], m[1])}", text)


def run_folder(checkpoint: Path) -> Path | None:
    """The run whose checkpoint this is, whatever its folder is called, or None for a file that lies elsewhere."""
    folder = checkpoint.parent.parent
    return folder if checkpoint.parent.name == "checkpoints" and (folder / "config.yaml").is_file() else None


def complete(arguments: list[str]) -> list[str]:
    """Fill in what may be left out of a command line: `fit`, and the config. Configs come first, other options overrule them.

    Without a config, a checkpoint's run brings its own; otherwise it is `configs/mnist.yaml`.
    """
    arguments = [today(argument) for argument in arguments]
    if arguments[:1] in (["-h"], ["--help"]):
        return arguments
    if not arguments or arguments[0] not in SUBCOMMANDS:
        arguments = ["fit", *arguments]
    configs: list[str] = []
    others: list[str] = []
    rest = iter(arguments[1:])
    for argument in rest:
        if argument in ("-c", "--config"):
            configs += ["--config", next(rest, "")]
        else:
            (configs if argument.startswith("--config=") else others).append(argument)
    if configs:
        return [arguments[0], *configs, *others]
    config = DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else Path(__file__).resolve().parents[2] / DEFAULT_CONFIG
    checkpoint = option(arguments, "--ckpt_path")
    if checkpoint is not None:
        root, name = Path(option(arguments, "--trainer.default_root_dir") or RUNS), option(arguments, "--name")
        folder = run_folder(find_checkpoint(checkpoint, name, root))
        if folder is not None:
            config = folder / "config.yaml"
            if name is None and checkpoint in NEWEST:
                others += ["--name", folder.parent.name]  # the folder may have been renamed since
    return [arguments[0], "--config", str(config), *others]


def option(arguments: list[str], name: str) -> str | None:
    """The value given to an option, as `--name value` or `--name=value`."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == name:
            return following
        if argument.startswith(name + "="):
            return argument.removeprefix(name + "=")
    return None


def find_checkpoint(wanted: str, name: str | None, root: Path) -> Path:
    """A checkpoint by its path; or `last` or `best`, that of the newest run below `root` (called `name`, if one is given)."""
    return newest_checkpoint(root, name, f"{wanted}.ckpt") if wanted in NEWEST else Path(wanted)
