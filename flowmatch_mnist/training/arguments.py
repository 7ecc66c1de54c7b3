"""Completing a command line, and finding checkpoints and the runs that they belong to."""

import re
from importlib import metadata
from pathlib import Path

from flowmatch_mnist.sampling.weights import newest_checkpoint
from flowmatch_mnist.training.folder import check_name

RUNS = Path("runs")
"""The default folder of all runs."""
NEWEST = ("last", "best")
"""Names for the checkpoints of the newest run."""
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
"""The current module paths, by the module names in configs from before version 0.1.0."""


def with_current_class_paths(text: str) -> str:
    """Return a text in which the current class paths replace those from before version 0.1.0."""
    return re.sub(r"\bflowmatch_mnist\.(\w+)(?=\.[A-Z])", lambda m: f"flowmatch_mnist.{MOVED.get(m[1], m[1])}", text)


def run_folder(checkpoint: Path) -> Path | None:
    """Return the folder of the run that a checkpoint belongs to, whatever its name, or None if the file is not in a run."""
    if checkpoint.parent == Path():
        checkpoint = checkpoint.absolute()  # given from its own folder, without the folder's name
    folder = checkpoint.parent.parent
    return folder if checkpoint.parent.name == "checkpoints" and (folder / "config.yaml").is_file() else None


def shipped_configs() -> Path:
    """Return the folder of this project's configs: in a clone, or where the wheel's data files are installed."""
    root = Path(__file__).resolve().parents[2]
    for folder in (root / "configs", root / "share/flowmatch-mnist/configs"):  # second: `pip install --target`
        if (folder / "mnist.yaml").is_file():
            return folder
    installed = (Path(str(file.locate())) for file in metadata.files("flowmatch-mnist") or [])
    return next((path.resolve().parent for path in installed if path.name == "mnist.yaml"), root / "configs")


def find_config(wanted: str) -> str:
    """Return the path of a config: the file itself, or this project's config of that name, such as `quick`."""
    path = Path(wanted)
    if path.is_file() or path.suffix not in ("", ".yaml") or path.parent not in (Path(), Path("configs")):
        return wanted
    shipped = shipped_configs() / f"{path.stem}.yaml"
    return str(shipped) if shipped.is_file() else wanted


def complete(arguments: list[str]) -> list[str]:
    """Return a command line with its omitted parts filled in: `fit`, and the config.

    Configs come first, so the other options overrule them. Without a config, the config of the checkpoint's run is used, or
    `configs/mnist.yaml` if there is no such run.

    Raises:
        UserError: if `--ckpt_path` is `last` or `best`, and there is no undamaged checkpoint, or `--name` is no folder's name.
    """
    arguments = [with_current_class_paths(argument) for argument in arguments]
    if arguments[:1] in (["-h"], ["--help"]):
        return arguments
    if not arguments or arguments[0] not in SUBCOMMANDS:
        arguments = ["fit", *arguments]
    configs: list[str] = []
    others: list[str] = []
    rest = iter(arguments[1:])
    for argument in rest:
        if argument in ("-c", "--config"):
            configs += ["--config", find_config(next(rest, ""))]
        elif argument.startswith("--config="):
            configs += ["--config", find_config(argument.removeprefix("--config="))]
        else:
            others.append(argument)
    if configs:
        return [arguments[0], *configs, *others]
    config = Path(find_config("configs/mnist.yaml"))
    checkpoint = option(arguments, "--ckpt_path")
    if checkpoint is not None:
        root, name = Path(option(arguments, "--trainer.default_root_dir") or RUNS), option(arguments, "--name")
        if name is not None:
            check_name(name)
        folder = run_folder(find_checkpoint(checkpoint, name, root))
        if folder is not None:
            config = folder / "config.yaml"
            if name is None and checkpoint in NEWEST:
                others += ["--name", folder.parent.name]  # the config has the old name if the folder was renamed
    return [arguments[0], "--config", str(config), *others]


def option(arguments: list[str], name: str) -> str | None:
    """Return the last value of an option, given as `--name value` or `--name=value`, or None if the option is absent."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == name:
            value = following
        if argument.startswith(name + "="):
            value = argument.removeprefix(name + "=")
    return value


def find_checkpoint(wanted: str, name: str | None, root: Path) -> Path:
    """Return a checkpoint's path. `last` and `best` mean the newest run below `root` (called `name`, if a name is given).

    Raises:
        UserError: if `wanted` is such a name, and there is no undamaged checkpoint.
    """
    return newest_checkpoint(root, name, f"{wanted}.ckpt") if wanted in NEWEST else Path(wanted)
