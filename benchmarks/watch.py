"""Record which lines of the package each test passes through: run the suite once, in one process, under coverage."""

import hashlib
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from mutations import FILES, PACKAGE, path_of

ROOT = PACKAGE.parent
WATCHED = ROOT / ".pytest_cache" / "watched.json"
"""The file with the record."""


class Watch:
    """A pytest plugin. For each test and shared fixture it records the lines and the seconds.

    It also records whether a test is alone, which means that it starts no process.

    Args:
        coverage: the coverage measurement, which runs already.
    """

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.tests: dict[str, dict[str, Any]] = {}
        self.fixtures: dict[str, float] = {}
        self.context = "import"

    def turn(self, context: str) -> None:
        """Assign the lines from now on to this test or fixture."""
        self.context = context
        self.coverage.switch_context(context)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        self.tests[item.nodeid] = {"seconds": 0.0, "fixtures": item.fixturenames, "alone": True}
        self.turn(item.nodeid)
        try:
            return (yield)
        finally:
            self.turn("import")

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        before = self.context
        begun = time.perf_counter()
        if shared := fixturedef.scope != "function":
            self.turn(f"fixture {fixturedef.argname}")
        try:
            return (yield)
        finally:
            self.turn(before)
            if shared:
                taken = time.perf_counter() - begun
                self.fixtures[fixturedef.argname] = taken
                if before in self.tests:
                    self.tests[before]["seconds"] -= taken

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.tests[report.nodeid]["seconds"] += report.duration

    def hear(self, event: str, arguments: Any) -> None:
        """Note which test starts a process (a Python audit hook): a new process runs the unchanged code, not the mutant."""
        if event == "subprocess.Popen" and self.context in self.tests:
            self.tests[self.context]["alone"] = False


def state_of(paths: Iterable[Path]) -> str:
    """Return a hash of the contents of files."""
    state = hashlib.sha256()
    for path in sorted(paths):
        state.update(path.read_bytes())
    return state.hexdigest()


def record() -> dict[str, Any]:
    """Return the record for the current package and tests. Record changed files again, in a separate process.

    Returns:
        `tests`: for each test, its seconds, its fixtures, and whether it starts no process. `fixtures`: the seconds of each
        shared fixture. `lines`: for each file and line, the tests and fixtures that pass through it. `modules`: the other
        modules that the tests import.
    """
    # test_settings.py tests no code, only the table that this record leads to.
    tests = {path.name: state_of([path]) for path in (ROOT / "tests").glob("test_*.py") if path.name != "test_settings.py"}
    shared = state_of([*PACKAGE.rglob("*.py"), *(ROOT / "configs").glob("*"), ROOT / "tests/conftest.py"])
    known: dict[str, Any] = json.loads(WATCHED.read_text()) if WATCHED.exists() else {}
    if known.get("shared") != shared:
        known = {"shared": shared, "files": {}, "tests": {}, "fixtures": {}, "lines": {}, "modules": []}
    if stale := [name for name, state in tests.items() if known["files"].get(name) != state]:
        print(f"running {len(stale)} test files under coverage", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "found.json"
            subprocess.run([sys.executable, __file__, str(found), *stale], cwd=ROOT, check=True)
            new = json.loads(found.read_text())
        old = {name: about for name, about in known["tests"].items() if file_of(name) in tests and file_of(name) not in stale}
        for file, lines in new["lines"].items():
            for line, contexts in known["lines"].get(file, {}).items():
                kept_contexts = {name for name in contexts if name in old or not file_of(name).startswith("test_")}
                lines[line] = sorted(kept_contexts.union(lines.get(line, [])))
        new["fixtures"] = known["fixtures"] | new["fixtures"]
        known = {"shared": shared, "files": tests, **new, "tests": old | new["tests"]}
        WATCHED.parent.mkdir(exist_ok=True)
        WATCHED.write_text(json.dumps(known))
    return known


def file_of(test: str) -> str:
    """Return the file name of a test."""
    return test.partition("::")[0].rpartition("/")[2]


def main() -> None:
    """Run test files, and write the record."""
    import coverage

    watched = coverage.Coverage(data_file=None, source=[str(PACKAGE)], config_file=False)
    watch = Watch(watched)
    sys.addaudithook(watch.hear)
    watched.start()
    watched.switch_context("import")
    for file in FILES:  # else the first test that needs a library would seem slow
        importlib.import_module(f"flowmatch_mnist.{file}")
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "--durations=10"]
    status = pytest.main([*options, *(f"tests/{name}" for name in sys.argv[2:])], [watch])
    watched.stop()
    if status:
        raise SystemExit("the tests fail on the unchanged code; fix that first")
    data = watched.get_data()
    lines = {file: data.contexts_by_lineno(str(path_of(file))) for file in FILES}
    ours = ("flowmatch_mnist", "test_", "conftest", "__main__", *(path.stem for path in Path(__file__).parent.glob("*.py")))
    modules = sorted(name for name in sys.modules if not name.startswith(ours))
    Path(sys.argv[1]).write_text(
        json.dumps({"tests": watch.tests, "fixtures": watch.fixtures, "lines": lines, "modules": modules})
    )
    watched.report(show_missing=True)


if __name__ == "__main__":
    main()
