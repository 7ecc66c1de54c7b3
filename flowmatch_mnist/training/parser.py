"""The parser of configs and options: the parser of jsonargparse, with errors on one line."""

import re
import sys
from typing import NoReturn

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from flowmatch_mnist.data.pairs import PairsDataModule
from flowmatch_mnist.flow.times import TimeDensity
from flowmatch_mnist.networks.base import Network
from flowmatch_mnist.support.commands import as_typed
from flowmatch_mnist.support.errors import UserError, one_line
from flowmatch_mnist.training.arguments import option, with_current_class_paths

SEE_HELP = f"; see `{as_typed('train')} fit --help`"
"""The end of each error message."""
BASES: dict[str, type[object]] = {"model.net": Network, "model.times": TimeDensity, "data": PairsDataModule}
"""The settings that name a class, and the base class for each."""

load_yaml = get_loader("yaml")
"""The loader of jsonargparse. `accept_older_configs` builds on it."""


def accept_older_configs() -> None:
    """Make the parser accept the class paths of configs from before version 0.1.0, such as an older run's `config.yaml`."""
    set_loader("yaml", lambda text: load_yaml(with_current_class_paths(text)), (yaml.YAMLError,))


class ConfigParser(LightningArgumentParser):
    """A parser that reports errors on one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UserError with the message of jsonargparse on one line. The command then ends with status 2."""
        what = explain(message).replace('"<unicode string>"', str(option(sys.argv, "--config")))
        raise UserError(f"{what[:600]}{SEE_HELP}")


def explain(message: object) -> str:
    """Return jsonargparse's message about a mistake on one line, without the types that it tried first."""
    text = re.sub(r":\n +(?=[^\s-])", ": ", str(message).replace(SEE_HELP, ""))
    key = ".".join(re.findall(r'Parser key "([^"]+)"', text))
    given = next(iter(re.findall(r"(?:import path string|[Gg]ot value|Given value): (.*)", text)), "")
    if choices := re.search(r"typing\.Literal\[(.*?)\]", text):
        return f"there is no {key} {given!r}; choose one of {choices[1]}"
    if key in BASES and "import path string" in text:
        names = ", ".join(kind.__name__ for kind in subclasses(BASES[key]))
        return f"there is no {key} {given!r}; choose one of {names}, or give the import path of your own class"
    complaints = re.findall(r"^ *- (?!.*NoneType|Expected a path|Does not validate)(.*)", text, re.MULTILINE)
    if not complaints:
        return one_line(re.sub(r'Parser key "([^"]+)":', r"\1:", text))
    # If the value is a whole section, it adds nothing to the message.
    got = f", got {given}" if complaints[0].startswith("Expected") and "(" not in given else ""
    return one_line(f"{key}{': ' * bool(key)}{' or '.join(complaints)}{got}")


def subclasses(base: type[object]) -> list[type[object]]:
    """Return all subclasses, each before its own subclasses. They are sorted by module, not by the order of imports."""
    children = sorted(base.__subclasses__(), key=lambda child: child.__module__)
    return [kind for child in children for kind in (child, *subclasses(child))]
