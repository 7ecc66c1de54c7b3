"""Do the tests notice a mistake? This script makes mistakes on purpose, one at a time, in every file of the package.

    python benchmarks/mutants.py                       all mutants
    python benchmarks/mutants.py flow.paths reflow     the mutants of some files
    python benchmarks/mutants.py --again LOG           the survivors of an earlier run, from its output
    python benchmarks/mutants.py --settings            settings without a test in tests/settings.json, which it writes

A mutant is the package with one mistake: a flipped sign, a dropped factor, a changed comparison or condition, a number off by
one, an argument dropped, ignored or swapped with its neighbour, a call left out, another split or period (`mutations.py` has
the full list). The tests run once under coverage. Then, for each mutant, a forked process runs the tests that pass through its
lines. Tests that start processes do not count, because those processes would run the unchanged code. All of this happens in a
copy of the project. The script prints the mutants that no test notices, and their number for each file. It ends with status 1
if more than 3% survive.
"""

import argparse
import ast
import gc
import importlib
import importlib.abc
import importlib.util
import json
import linecache
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from mutations import EQUIVALENT, FILES, PACKAGE, Mutant, ignored_settings, mutants, path_of
from rich.console import Console
from rich.progress import track
from rich.table import Table
from watch import WATCHED, record

ROOT = PACKAGE.parent
SETTINGS = ROOT / "tests" / "settings.json"
OPTIONS = [
    "-x",
    "-q",
    "-o",
    "addopts=",
    *(f"-pno:{name}" for name in ("cacheprovider", "unraisableexception", "threadexception")),
]
SURVIVED = "survived: "
COPY = "FLOWMATCH_MNIST_COPY"
"""An environment variable that says that the script runs in a copy of the project."""
HEARINGS = (3.0, 40.0)
"""Seconds of tests in a mutant's first round, and in its second round if it survives the first."""


class Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An importer that imports the mutant instead of its file."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> object:
        return importlib.util.spec_from_loader(name, self) if name == f"flowmatch_mnist.{self.mutant.file}" else None

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = file = str(path_of(self.mutant.file))
        source = self.mutant.source
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # jsonargparse reads the source
        exec(compile(source, file, "exec"), module.__dict__)


def run_path(mutant: Mutant) -> None:
    """Make `runpy.run_path` run the mutant, too, when a test runs its file as a script."""
    really = runpy.run_path

    def run(path: str, *arguments: Any, **settings: Any) -> dict[str, Any]:
        if Path(path) != path_of(mutant.file):
            return really(path, *arguments, **settings)
        module = {"__name__": "__main__", "__file__": path, "__doc__": ast.get_docstring(ast.parse(mutant.source))}
        exec(compile(mutant.source, path, "exec"), module)
        return module

    runpy.run_path = run


class FirstFailure:
    """A pytest plugin that writes the name of the failed test to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.path.write_text(report.nodeid)


def noticed_by(mutant: Mutant, tests: Sequence[str], seconds: float) -> str | None:
    """Run tests on a mutant in a fork. Return the test that fails, or None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        failure = Path(folder) / "failure"
        child = os.fork()
        if child == 0:
            status = 3
            with suppress(BaseException):
                nothing = os.open(os.devnull, os.O_RDWR)
                for number in (0, 1, 2):
                    os.dup2(nothing, number)
                os.setsid()
                signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))
                signal.alarm(round(60 + 6 * seconds))
                sys.meta_path.insert(0, Loader(mutant))
                run_path(mutant)
                import pytest

                status = int(pytest.main([*OPTIONS, f"--basetemp={folder}/pytest", *tests], [FirstFailure(failure)]))
            os._exit(status)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            return None
        return failure.read_text() if failure.exists() else "the end of the process"


class Court:
    """The choice and order of the tests for each mutant.

    Args:
        known: the record from `watch.record`.
    """

    def __init__(self, known: dict[str, Any]) -> None:
        self.tests, self.lines, self.fixtures = known["tests"], known["lines"], known["fixtures"]
        self.successes: dict[str, Counter[str]] = {file: Counter() for file in FILES}
        shared: dict[str, list[str]] = {}
        for test, about in self.tests.items():
            for fixture in about["fixtures"]:
                shared.setdefault(f"fixture {fixture}", []).append(test)
        self.shared = shared

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Return the tests that pass through the mutant's lines, the fastest first.

        If its lines only run at import, return the tests that pass through its file. If the whole file only runs at import,
        return all tests. Later cases of the same test wait longer, because the cases have much in common.
        """
        lines = self.lines.get(mutant.file, {})
        inside = [lines.get(str(line), []) for line in range(mutant.line, mutant.end + 1)]
        contexts = {context for found in inside for context in found if context != "import"}
        if not contexts or mutant.what.startswith("field "):
            contexts = {context for found in lines.values() for context in found if context != "import"} or set(self.tests)
        names = {test for context in contexts for test in self.shared.get(context, [context])}
        successes, cases, waits = self.successes[mutant.file], Counter[str](), {}
        for name in sorted(names):
            if name in self.tests and self.tests[name]["alone"]:
                cases[name.partition("[")[0]] += 1
                waits[name] = self.seconds(name) * cases[name.partition("[")[0]] / (1 + successes[name])
        return sorted(waits, key=lambda name: (waits[name], name))

    def seconds(self, test: str, paid: Collection[str] = ()) -> float:
        """Return the seconds of a test, with its shared fixtures except those in `paid`, which exist already."""
        fixtures = set(self.tests[test]["fixtures"]).difference(paid)
        return float(self.tests[test]["seconds"] + sum(self.fixtures.get(fixture, 0.0) for fixture in fixtures))

    def try_one(self, mutant: Mutant) -> tuple[Mutant, str | None]:
        """Return the mutant, and the test that notices it, or None."""
        tests, paid = self.tests_of(mutant), set[str]()
        for seconds in HEARINGS:
            heard, taken = [], 0.0
            while tests and (taken + self.seconds(tests[0], paid) <= seconds or not heard):
                taken += self.seconds(tests[0], paid)
                paid.update(self.tests[tests[0]]["fixtures"])
                heard.append(tests.pop(0))
            if heard and (test := noticed_by(mutant, heard, seconds)):
                self.successes[mutant.file][test] += 1
                return mutant, test
            paid.clear()
        return mutant, None


court: Court
"""The court of this process."""


def hear(mutant: Mutant) -> tuple[Mutant, str | None]:
    """Return the mutant, and the test that notices it, or None, by this process's court."""
    return court.try_one(mutant)


def in_a_copy() -> int:
    """Run this script in a copy of the project, which mutants may damage. Copy the results back, and return the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / ROOT.name
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", ".venv*", "*.egg-info"))
        command = [sys.executable, str(copy / "benchmarks/mutants.py"), *sys.argv[1:]]
        status = subprocess.run(command, env=os.environ | {COPY: "1", "PYTHONPATH": str(copy)}, check=False).returncode
        for path in (SETTINGS, WATCHED):
            if (made := copy / path.relative_to(ROOT)).exists():
                path.parent.mkdir(exist_ok=True)
                shutil.copy(made, path)
    return status


def exists(test: str) -> bool:
    """Return whether a test with that name exists."""
    file, _, name = test.partition("::")
    return (ROOT / file).exists() and f"def {name}(" in (ROOT / file).read_text()


def main() -> None:
    """Test all mutants, and print the survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"files of the package: {', '.join(FILES)}")
    parser.add_argument("--settings", action="store_true", help="only settings that tests/settings.json has no test for")
    parser.add_argument("--share", type=int, default=1, metavar="N", help="only every N-th mutant (default: 1)")
    parser.add_argument("--again", type=Path, metavar="LOG", help="only the survivors of an earlier run, from its output")
    options = parser.parse_args()
    if COPY not in os.environ:
        raise SystemExit(in_a_copy())
    log = options.again.read_text() if options.again else ""
    survivors = {line.removeprefix(SURVIVED).rpartition(", line ")[0] for line in log.splitlines() if line.startswith(SURVIVED)}
    os.chdir(ROOT)
    known = record()
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    for name in known["modules"]:  # import once here, instead of in every fork
        with suppress(Exception):
            importlib.import_module(name)
    kind = ignored_settings if options.settings else mutants
    table: dict[str, str] = json.loads(SETTINGS.read_text()) if options.settings and SETTINGS.exists() else {}
    table = {key: test for key, test in table.items() if exists(test)}
    found = [mutant for file in options.files or FILES for mutant in kind(file) if mutant.key not in table]
    found = [mutant for mutant in found if not options.again or mutant.key in survivors]
    mistakes = [mutant for mutant in found if mutant.key not in EQUIVALENT]
    every = mistakes[:: options.share]
    global court
    court = Court(known)
    gc.freeze()
    counts, alive = Counter(mutant.file for mutant in every), Counter[str]()
    # These processes have no threads, so they can fork safely. They are no daemons, because a test may start processes. Each
    # has its own court, which learns which tests notice the most mutants.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        hearings = [pool.submit(hear, mutant) for mutant in every]
        for done in track(as_completed(hearings), "mutants", len(every)):
            mutant, test = done.result()
            if test is None:
                alive[mutant.file] += 1
                print(f"{SURVIVED}{mutant.key}, line {mutant.line}", flush=True)
            elif options.settings and "::" in test:
                table[mutant.key] = test.partition("[")[0]
                SETTINGS.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    counted = Table("file", "mutants", "survived")
    for file, count in sorted(counts.items()):
        counted.add_row(file, str(count), str(alive[file]))
    Console().print(counted)
    share = alive.total() / max(1, len(every))
    print(f"{len(every)} mutants, {alive.total()} survived ({share:.1%}); {len(found) - len(mistakes)} others are no mistakes")
    raise SystemExit(int(share > 0.03))


if __name__ == "__main__":
    main()
