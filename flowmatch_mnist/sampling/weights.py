"""Networks in files: checkpoints from training, and the trained weights in the package."""

import glob
import inspect
import json
import logging
from collections.abc import Callable, Iterable, Mapping
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
from flowmatch_mnist.support.commands import as_typed
from flowmatch_mnist.support.devices import check_device
from flowmatch_mnist.support.errors import UserError, one_line
from flowmatch_mnist.support.files import find_damage, load_checkpoint, load_weights, save_weights

log = logging.getLogger(__name__)

DESCRIPTION_KEY = "flowmatch_mnist"
"""The key of the network's description in a file."""

MAY_DIFFER = ("spans", "dropout")
"""Arguments that may differ between a network and the weights of its warm start."""

NETWORKS: dict[str, type[Network]] = {"UNet": UNet, "MLP": MLP}
"""The networks that a file may name. A file from an unknown source must not choose what this program imports."""


def newest_checkpoint(runs: Path = Path("runs"), name: str | None = None, file: str = "last.ckpt") -> Path:
    """Return the newest undamaged checkpoint called `file` from the runs called `name` (by default, from any run).

    A damaged checkpoint is named in a warning. Its run's `best.ckpt` is tried next, then the next newest checkpoint.

    Raises:
        UserError: if there is no undamaged checkpoint.
    """
    pattern = "*" if name is None else glob.escape(name)
    found = [path for path in runs.glob(f"{pattern}/*/checkpoints/{file}") if path.is_file()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        for candidate in dict.fromkeys([path, path.with_name("best.ckpt")]):
            if not (wrong := find_damage(candidate)):
                return candidate
            log.warning("skipping %s: %s", candidate, wrong)
    raise UserError(
        f"found no {'undamaged ' * bool(found)}{file} below {runs if name is None else runs / name}; train a model with "
        f"`{as_typed('train')}`, or give a checkpoint"
    )


def newest_or_packaged() -> Path:
    """Return the path of the newest run's last checkpoint, or if there is no run, of the weights in the package."""
    try:
        return newest_checkpoint()
    except UserError:
        return PRETRAINED["mnist"]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint of this project, on the CPU. Only tensors and plain values are read: no file can run code.

    Raises:
        UserError: if the file is missing, damaged, or not one of this project's checkpoints.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}; check the path, or train a model with `{as_typed('train')}`")
    checkpoint = load_checkpoint(path)
    if not isinstance(checkpoint.get(DESCRIPTION_KEY), dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"cannot read {path}: it is no checkpoint of this project; use one that train.py wrote")
    return checkpoint | {DESCRIPTION_KEY: with_units(checkpoint[DESCRIPTION_KEY])}


def with_units(description: dict[str, Any]) -> dict[str, Any]:
    """Return a network's description with its "units". Before version 0.1.0, files had "pixels" instead, even for points."""
    older = "plane" if description.get("network") == "MLP" else description.get("pixels")
    return {"units": older} | description


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description of a network and its weights, from a checkpoint or from a file that `save` wrote.

    Raises:
        UserError: if the file is missing, damaged, or neither of the two.
    """
    if path.suffix != ".safetensors":
        checkpoint = read_checkpoint(path)
        # A student of distribution matching has a second network, which only its training needs.
        stored = checkpoint["state_dict"].items()
        weights = {key.removeprefix("net."): value for key, value in stored if not key.startswith("fake.")}
        return checkpoint[DESCRIPTION_KEY], weights
    weights, metadata = load_weights(path)
    try:
        description = json.loads(metadata[DESCRIPTION_KEY])
    except (KeyError, ValueError):
        description = None
    if not isinstance(description, dict):
        raise UserError(f"cannot read {path}: it holds no model of this project; use another file")
    return with_units(description), weights


def weights_path(weights: str) -> Path:
    """Return the path of weights: of those in the package with this name, or otherwise of the file with this name."""
    return PRETRAINED.get(weights, Path(weights))


def stored_arguments(description: dict[str, Any], net: Network) -> dict[str, Any]:
    """Return the arguments of a described network, which is like `net`; None for what is unknown.

    Older files lack arguments that were constants at that time. The defaults are these constants.
    """
    stored = description.get("arguments")
    defaults = {name: parameter.default for name, parameter in inspect.signature(type(net)).parameters.items()}
    known = defaults | stored if isinstance(stored, dict) else {}
    return {name: known.get(name) for name in net.arguments}


def warm_start(net: Network, path: Path) -> None:
    """Load the weights of a file into a network. The weights for spans may be missing in the file.

    Raises:
        UserError: if the file is missing or damaged, or its weights do not fit.
    """
    description, weights = read_model(path)
    own = net.state_dict()
    wrong = [name for name, value in weights.items() if name not in own or own[name].shape != value.shape]
    wrong += [name for name in own if name not in weights and not name.startswith("span.")]
    # Arguments that shapes do not reveal, such as the number of norm groups, must match.
    theirs = stored_arguments(description, net)
    wrong += [name for name, value in net.arguments.items() if name not in MAY_DIFFER and theirs[name] != value]
    if wrong:
        raise UserError(
            f"the weights in {path} do not fit the config's network ({', '.join(wrong[:3])}); set model.net as in that file"
        )
    net.load_state_dict(weights, strict=False)


def load_teacher(weights: str, student: Flow, device: torch.device) -> Network:
    """Return a teacher network: a student can learn from its velocity on the linear path.

    The weights are a file, or a name of weights in the package.

    Raises:
        UserError: if the file cannot be read, the teacher's samples, their units or their labels differ from the student's, or
            the teacher has another path or prediction target, or learned only one step.
    """
    flow, _ = load(weights_path(weights), device)
    if (flow.path, flow.prediction) != ("linear", "velocity"):
        raise UserError(
            f"the teacher {weights} predicts {flow.prediction} on the {flow.path} path; use one for velocity on the linear path"
        )
    if flow.one_step:
        raise UserError(
            f"the teacher {weights} learned only one step, so it has no velocity at other times; use another teacher"
        )
    theirs, ours = (
        f"{some.net.no_label} classes of shape {tuple(some.net.shape)} in {some.units.name} units" for some in (flow, student)
    )
    if theirs != ours:
        raise UserError(f"the teacher {weights} draws {theirs}, but the student draws {ours}; use another teacher")
    return flow.net.requires_grad_(False)


def load_drawer(weights: str, device: torch.device) -> tuple[Network, Callable[[Tensor, Tensor], Tensor]]:
    """Return a network with fixed weights, and a function that draws with its own sampler: noise (B, ...), y (B,) -> (B, ...).

    The weights are a file, or a name of weights in the package. The samples follow from the noise alone, so there is no churn.

    Raises:
        UserError: if the file cannot be read.
    """
    flow, sampler = load(weights_path(weights), device)
    sampler = replace(sampler, churn=0.0)

    def draw(x0: Tensor, y: Tensor) -> Tensor:
        *_, x1 = flow.states(flow.guided(y, sampler), x0, sampler)
        return x1

    return flow.net.requires_grad_(False), draw


def save(path: Path, flow: Flow, sampler: Sampler, metadata: Mapping[str, str]) -> None:
    """Write a network's weights, its description with its sampler, and other metadata, as a safetensors file for `load`."""
    save_weights(path, flow.net.state_dict(), {**metadata, DESCRIPTION_KEY: json.dumps(flow.describe(sampler))})


def load(path: Path, device: torch.device | str = "cpu") -> tuple[Flow, Sampler]:
    """Return the network of a checkpoint, or of a file that `save` wrote, and its sampler.

    The network has its averaged weights (EMA) and is ready to sample.

    Raises:
        UserError: if the file is missing or damaged, its weights do not fit its description, or this program does not know a
            name in it.
    """
    description, weights = read_model(path)
    for what, known in (("network", NETWORKS), ("path", PATHS), ("prediction", PREDICTIONS), ("units", UNITS)):
        if description.get(what) not in tuple(known):
            raise UserError(f"{path} has an unknown {what}: {description.get(what)!r}; use a file with {', '.join(known)}")
    try:
        net = NETWORKS[description["network"]](**description["arguments"])
        net.load_state_dict(weights)
        sampler = Sampler(**description["sampler"])
        units = UNITS[description["units"]]
        units.decode(torch.zeros(1, *net.shape))
    except Exception as error:  # with a damaged description, a constructor can raise any error
        raise UserError(f"the weights in {path} do not fit its network: {one_line(error)[:200]}; use another file") from error
    # With channels last, convolutions are about 1.5 times as fast, on CPUs too.
    net.to(memory_format=torch.channels_last)
    one_step = description.get("one_step") is True
    return Flow(net.to(device).eval(), description["path"], description["prediction"], units, one_step), sampler


def with_changes(flow: Flow, sampler: Sampler, asked: Mapping[str, Any]) -> Sampler:
    """Return a model's own sampler with the settings of a command line. None leaves a setting unchanged.

    Raises:
        UserError: if the changed sampler is not valid, or the network does not support it.
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
    """Draw a sample for each label, in one line of code.

    Args:
        labels: labels of classes, such as `range(10)`.
        weights: a name of weights in the package, or a file.
        seed: random seed of the noise.
        device: the device that computes.
        changes: changes to the weights' own sampler: `steps`, `solver`, `guidance` and the rest, see `Sampler`.

    Returns:
        The samples, with `values` and `labels`. For digits, `values` are images uint8 (N, 28, 28), and a notebook shows them.
        For points, `values` are their coordinates (N, 2).

    Raises:
        UserError: as `load` does.
        ValueError: if there are no labels, a label does not exist, or the changed sampler is not valid.
        FloatingPointError: if a state is not finite.
    """
    flow, sampler = load(weights_path(str(weights)), device)
    y = torch.tensor(list(labels), dtype=torch.int64)
    if not len(y) or not 0 <= int(y.min()) <= int(y.max()) < flow.net.no_label:
        raise ValueError(f"labels must be one or more of 0 to {flow.net.no_label - 1}, got {y.tolist()}")
    return generate(flow, y, replace(sampler, **changes), seed=seed)


def draws_digits(net: Network) -> bool:
    """Return whether `sample.py` can use a network: it must be one of this package, for ten classes of images of 28x28."""
    return type(net).__name__ in NETWORKS and net.shape == (1, 28, 28) and net.no_label == 10


def load_digits(path: Path | None, device: str) -> tuple[Path, Flow, Sampler]:
    """Return the path of a model that draws digits, its network and its sampler. None means the path `newest_or_packaged()`.

    Raises:
        UserError: as `load` does, and if the device does not exist, or the model draws other samples than digits.
    """
    check_device(device)
    path = path or newest_or_packaged()
    flow, sampler = load(path, device)
    if not draws_digits(flow.net):
        drawn = f"{flow.net.no_label} classes of shape {tuple(flow.net.shape)}"
        raise UserError(f"{path} draws no digits (it draws {drawn}); use other weights, such as `--weights mnist`")
    return path, flow, sampler
