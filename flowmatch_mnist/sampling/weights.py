"""From files to networks: the checkpoints that training leaves, and the trained weights in the package."""

import glob
import inspect
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.flow.predictions import PREDICTIONS
from flowmatch_mnist.networks.base import Network
from flowmatch_mnist.networks.mlp import MLP
from flowmatch_mnist.networks.unet import UNet
from flowmatch_mnist.sampling.generate import Flow, Sampler, Samples, generate
from flowmatch_mnist.sampling.units import UNITS
from flowmatch_mnist.support.choices import PRETRAINED
from flowmatch_mnist.support.errors import UserError, one_line
from flowmatch_mnist.support.files import damage, load_checkpoint, load_weights, save_weights

log = logging.getLogger(__name__)

KEY = "flowmatch_mnist"
"""Where in a file the description of its network stands."""

MAY_DIFFER = ("spans", "dropout")
"""Arguments of a network that may differ from those of the weights it starts from."""

NETWORKS: dict[str, type[Network]] = {"UNet": UNet, "MLP": MLP}
"""The networks that a file may name. A file from a stranger must not choose what is imported."""


def newest_checkpoint(runs: Path = Path("runs"), name: str | None = None, file: str = "last.ckpt") -> Path:
    """The whole checkpoint called `file` that was written most recently, of the runs called `name` (any, by default).

    One that is damaged is named, and gives way to its run's `best.ckpt`, then to the next newest.

    Raises:
        UserError: if there is none.
    """
    pattern = "*" if name is None else glob.escape(name)
    found = [path for path in runs.glob(f"{pattern}/*/checkpoints/{file}") if path.is_file()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        for candidate in dict.fromkeys([path, path.with_name("best.ckpt")]):
            if not (wrong := damage(candidate)):
                return candidate
            log.warning("passing over %s: %s", candidate, wrong)
    raise UserError(
        f"no {'whole ' * bool(found)}{file} of a run below {runs if name is None else runs / name}; train a model with "
        "`python train.py`, or name a checkpoint"
    )


def newest_or_packaged() -> Path:
    """The newest run's last checkpoint, or where there is no run, the weights in the package."""
    try:
        return newest_checkpoint()
    except UserError:
        return PRETRAINED["mnist"]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this project, on the CPU. Only tensors and plain values are read: no file can run code.

    Raises:
        UserError: if the file is missing, damaged, or not one of this project's checkpoints.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; check the path, or train one with `python train.py`")
    checkpoint = load_checkpoint(path)
    if not isinstance(checkpoint.get(KEY), dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path} is no checkpoint of this project; use one that train.py wrote")
    return checkpoint | {KEY: with_units(checkpoint[KEY])}


def with_units(description: dict[str, Any]) -> dict[str, Any]:
    """The description of a network; a file from before version 0.1.0 says "pixels" of points too, and has no "units"."""
    older = "plane" if description.get("network") == "MLP" else description.get("pixels")
    return {"units": older} | description


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description of a network and its weights, from a checkpoint or from what `save` wrote.

    Raises:
        UserError: if the file is missing, damaged, or neither of the two.
    """
    if path.suffix != ".safetensors":
        checkpoint = read_checkpoint(path)
        weights = {key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()}
        return checkpoint[KEY], weights
    weights, metadata = load_weights(path)
    try:
        description = json.loads(metadata[KEY])
    except (KeyError, ValueError):
        description = None
    if not isinstance(description, dict):
        raise UserError(f"{path} holds no model of this project; use another")
    return with_units(description), weights


def weights_path(weights: str) -> Path:
    """Where weights are: in the package, if that is their name, else in a file of that name."""
    return PRETRAINED.get(weights, Path(weights))


def warm_start(net: Network, path: Path) -> None:
    """Give a network the weights of a file. What takes in spans, the file may lack.

    Raises:
        UserError: if the file is missing or damaged, or its weights do not fit.
    """
    description, weights = read_model(path)
    own = net.state_dict()
    wrong = [name for name, value in weights.items() if name not in own or own[name].shape != value.shape]
    wrong += [name for name in own if name not in weights and not name.startswith("span.")]
    # What makes no difference to any shape, such as the groups of a normalisation; older files lack what was fixed then.
    defaults = {name: parameter.default for name, parameter in inspect.signature(type(net)).parameters.items()}
    arguments = description.get("arguments")
    theirs = defaults | arguments if isinstance(arguments, dict) else {}
    wrong += [name for name, value in net.arguments.items() if name not in MAY_DIFFER and theirs.get(name) != value]
    if wrong:
        raise UserError(
            f"the weights in {path} do not fit the config's network ({', '.join(wrong[:3])}); set model.net as there"
        )
    net.load_state_dict(weights, strict=False)


def load_teacher(weights: str, student: Network, device: torch.device) -> Network:
    """The network of a file or of a name in the package, whose velocity of the linear path a student can learn from.

    Raises:
        UserError: if its file cannot be read, it is for other samples than the student, or it predicts something else.
    """
    flow, _ = load(weights_path(weights), device)
    if (flow.path, flow.prediction) != ("linear", "velocity"):
        raise UserError(f"the teacher {weights} predicts {flow.prediction} on the {flow.path} path; take another")
    if (flow.net.shape, flow.net.no_label) != (student.shape, student.no_label):
        raise UserError(f"the teacher {weights} draws samples of shape {flow.net.shape}, not {student.shape}; take another")
    return flow.net.requires_grad_(False)


def save(path: Path, flow: Flow, sampler: Sampler, metadata: Mapping[str, str]) -> None:
    """Write a network's weights, how to sample it, and other metadata, as safetensors for `load`."""
    save_weights(path, flow.net.state_dict(), {**metadata, KEY: json.dumps(flow.describe(sampler))})


def load(path: Path, device: torch.device | str = "cpu") -> tuple[Flow, Sampler]:
    """The network of a checkpoint, or of what `save` wrote, ready to sample with its averaged weights, and its sampler.

    Raises:
        UserError: if the file is missing, damaged, of another shape than it says, or names what this program does not know.
    """
    description, weights = read_model(path)
    for what, known in (("network", NETWORKS), ("path", PATHS), ("prediction", PREDICTIONS), ("units", UNITS)):
        if description.get(what) not in tuple(known):
            raise UserError(f"{path} holds a {what} {description.get(what)!r}; this program knows {', '.join(known)}")
    try:
        net = NETWORKS[description["network"]](**description["arguments"])
        net.load_state_dict(weights)
        sampler = Sampler(**description["sampler"])
        units = UNITS[description["units"]]
        units.decode(torch.zeros(1, *net.shape))
    except Exception as error:  # a damaged description can fail in any way a constructor can
        raise UserError(f"the weights in {path} do not fit its network: {one_line(error)[:200]}; use another") from error
    # Channels last, convolutions are faster by half, on processors too.
    net.to(memory_format=torch.channels_last)
    return Flow(net.to(device).eval(), description["path"], description["prediction"], units), sampler


def with_changes(flow: Flow, sampler: Sampler, asked: Mapping[str, Any]) -> Sampler:
    """A model's own sampler with what a command line asks for in its place; None stands for what it does not mention.

    Raises:
        UserError: if the sampler cannot be changed so, or the network cannot do it.
    """
    try:
        changed = replace(sampler, **{name: value for name, value in asked.items() if value is not None})
        flow.check(changed)
    except ValueError as error:
        raise UserError(error) from error
    return changed


def draw(
    labels: Iterable[int], weights: str | Path = "mnist", *, seed: int = 0, device: str = "cpu", **changes: Any
) -> Samples:
    """Draw a sample for each label, in a line.

    Args:
        labels: of the classes, such as `range(10)`.
        weights: a name of weights in the package, or a file.
        seed: of the noise.
        device: where to compute.
        changes: of the weights' own sampler: `steps`, `solver`, `guidance` and the rest, see `Sampler`.

    Returns:
        Of digits, `values` uint8 (N, 28, 28), of points, places in the plane (N, 2); and `labels`. In a notebook digits show
        themselves.

    Raises:
        UserError: as `load` does.
        ValueError: if there is no such label, or the sampler cannot be changed so.
    """
    flow, sampler = load(weights_path(str(weights)), device)
    y = torch.tensor(list(labels), dtype=torch.int64)
    if not len(y) or not 0 <= int(y.min()) <= int(y.max()) < flow.net.no_label:
        raise ValueError(f"labels must be some of 0 to {flow.net.no_label - 1}, got {y.tolist()}")
    return generate(flow, y, replace(sampler, **changes), seed=seed)


def load_digits(path: Path | None, device: str) -> tuple[Path, Flow, Sampler]:
    """What `load` gives of a model that draws digits, and its path; None stands for `newest_or_packaged`.

    Raises:
        UserError: as `load` does, and if there is no such device, or the model draws something else.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {device!r} here; use --device cpu") from error
    path = path or newest_or_packaged()
    flow, sampler = load(path, device)
    if flow.net.shape != (1, 28, 28) or flow.net.no_label != 10:
        raise UserError(f"{path} draws no digits (its samples have shape {flow.net.shape}); name another with --checkpoint")
    return path, flow, sampler
