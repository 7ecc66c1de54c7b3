"""Do the tests notice a mistake in the mathematics?

python benchmarks/mutants.py                 every mutant, some minutes on two cores
python benchmarks/mutants.py flow.paths      those of one file

Flips each sign, swaps each alpha and sigma, and drops each factor, divisor and exponent, one at a time, and runs the tests of
the mathematics on each such mutant. It prints those that survive, and ends with status 1 if there are any.
"""

import ast
import importlib.abc
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from rich.progress import track

os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent
FILES = tuple(f"flow.{name}" for name in ("paths", "predictions", "solvers", "guidance", "weighting", "times", "loss"))
TESTS = ("paths", "times", "predictions", "weighting", "guidance", "solvers", "diffusion", "inversion", "loss")
TIME_LIMIT = 120
EQUIVALENT = {
    (
        "flow.times",
        "sign flipped in `torch.arange(count, device=generator.device) / count + offset`",
    ): "the offset is uniform modulo 1",
    (
        "flow.times",
        "sign flipped in `positions.to(widest_float(positions.device)) * golden + batch_index * root_two`",
    ): "either way, another shift per batch",
}
"""Mutants that are no mistake, and why. They are not tried."""
SWAPPED = {"alpha": "sigma", "sigma": "alpha", "alpha_dot": "sigma_dot", "sigma_dot": "alpha_dot"}


@dataclass
class Mutant:
    """One changed place of a file."""

    file: str
    line: int
    what: str
    source: str


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What a node can be changed to, and what that is called."""
    match node:
        case ast.BinOp(left, ast.Add(), right):
            yield "sign flipped", ast.BinOp(left, ast.Sub(), right)
        case ast.BinOp(left, ast.Sub(), right):
            yield "sign flipped", ast.BinOp(left, ast.Add(), right)
        case ast.UnaryOp(ast.USub(), operand):
            yield "sign dropped", operand
        case ast.BinOp(left, ast.Mult(), right):
            yield "left factor dropped", right
            yield "right factor dropped", left
        case ast.BinOp(left, ast.Div(), _):
            yield "divisor dropped", left
        case ast.BinOp(left, ast.Pow(), _):
            yield "exponent dropped", left
        case ast.Name(name, ast.Load()) if name in SWAPPED:
            yield f"{name} swapped", ast.Name(SWAPPED[name], ast.Load())
        case ast.Attribute(value, name, ast.Load()) if name in SWAPPED:
            yield f"{name} swapped", ast.Attribute(value, SWAPPED[name], ast.Load())


class Replace(ast.NodeTransformer):
    """Puts another node in the place of one; annotations and error messages are left alone."""

    def __init__(self, number: int, change: int) -> None:
        self.number, self.change, self.seen = number, change, -1

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.Raise | ast.arguments | ast.AnnAssign):
            return node
        self.seen += 1
        if self.seen == self.number:
            return list(changes(node))[self.change][1]
        return self.generic_visit(node)


def mutants(file: str) -> Iterator[Mutant]:
    """Every mutant of a file."""
    text = (ROOT / "flowmatch_mnist" / f"{file.replace('.', '/')}.py").read_text()
    places: list[ast.AST] = []

    class Collect(Replace):
        def visit(self, node: ast.AST) -> ast.AST:
            if not isinstance(node, ast.Raise | ast.arguments | ast.AnnAssign):
                places.append(node)
                self.generic_visit(node)
            return node

    Collect(-1, 0).visit(ast.parse(text))
    for number, node in enumerate(places):
        for change, (what, _) in enumerate(changes(node)):
            tree = Replace(number, change).visit(ast.parse(text))
            source = ast.unparse(ast.fix_missing_locations(tree))
            yield Mutant(file, getattr(node, "lineno", 0), f"{what} in `{ast.unparse(node)}`", source)


class Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the mutant in place of its file."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> object:
        return importlib.util.spec_from_loader(name, self) if name == f"flowmatch_mnist.{self.mutant.file}" else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.mutant.source, f"{self.mutant.file}.py", "exec"), module.__dict__)


def in_a_fork(task: Callable[[], int]) -> int:
    """The exit status of a task in a forked process, or -1 when it ran too long."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nothing:  # noqa: PTH123
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        import signal

        signal.alarm(TIME_LIMIT)
        try:
            status = task()
        except BaseException:
            status = 3
        os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def survives(mutant: Mutant | None) -> bool:
    """Whether all tests pass on the mutant, or, for None, on what is really there."""

    def run_tests() -> int:
        import pytest

        if mutant is not None:
            sys.meta_path.insert(0, Loader(mutant))
        with tempfile.TemporaryDirectory() as folder:
            options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", f"--basetemp={folder}/pytest"]
            return int(pytest.main([*options, *(str(ROOT / "tests" / f"test_{name}.py") for name in TESTS)]))

    return in_a_fork(run_tests) == 0


def main() -> None:
    """Try them all."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import pytest  # noqa: F401  once, here, and not in every fork
    import torch
    import torchdiffeq  # noqa: F401

    torch.set_num_threads(1)
    if not survives(None):
        raise SystemExit("the tests fail on the code as it is; mend that first")
    found = [mutant for file in sys.argv[1:] or FILES for mutant in mutants(file)]
    every = [mutant for mutant in found if (mutant.file, mutant.what) not in EQUIVALENT]
    alive = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, lives in track(zip(every, pool.map(survives, every), strict=True), "mutants", len(every)):
            if lives:
                alive += 1
                print(f"survived: {mutant.file}, line {mutant.line}: {mutant.what}", flush=True)
    print(f"{len(every)} mutants, {alive} survived; {len(found) - len(every)} others are no mistake")
    raise SystemExit(1 if alive else 0)


if __name__ == "__main__":
    main()
