"""The layout of the house: imports go one way only, and drawing digits needs no Lightning."""

import ast
import subprocess
import sys

from conftest import ROOT

ROOMS = [
    "errors",
    "files",
    "streams",
    "paths",
    "times",
    "convert",
    "weighting",
    "couplings",
    "network",
    "guidance",
    "solvers",
    "unet",
    "mlp",
    "pictures",
    "pixels",
    "generate",
    "models",
    "meanflow",
    "likelihood",
    "muon",
    "mnist",
    "digitnet",
    "metrics",
    "data",
    "toy",
    "reflow",
    "export",
    "module",
    "saving",
    "callbacks",
    "cli",
]


def test_each_room_imports_only_from_those_before_it():
    package = ROOT / "flowmatch_mnist"
    assert {path.stem for path in package.glob("*.py")} == {*ROOMS, "__init__"}
    for room in ROOMS:
        for node in ast.walk(ast.parse((package / f"{room}.py").read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("flowmatch_mnist"):
                continue
            parts = node.module.split(".")
            imported = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            for other in imported:
                assert ROOMS.index(other) < ROOMS.index(room), f"{room} imports {other}"


def test_drawing_imports_no_lightning():
    code = "import sys, sample, flowmatch_mnist.models; print(any(name.startswith('lightning') for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
