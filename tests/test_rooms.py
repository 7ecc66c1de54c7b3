"""The layout of the house: imports go one way only, the theory needs no trainer, and a wheel holds all of it."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "flowmatch_mnist"
HOUSE = {
    "support": ["errors", "commands", "choices", "devices", "files", "streams"],
    "networks": ["base", "mlp", "unet"],
    "flow": [
        "paths",
        "times",
        "predictions",
        "weighting",
        "couplings",
        "guidance",
        "exact",
        "teacher",
        "meanflow",
        "matching",
        "loss",
        "solvers",
    ],
    "images": ["mnist", "pixels", "pictures", "strokes"],
    "sampling": ["units", "generate", "weights", "likelihood", "export", "request"],
    "evaluation": ["classifiers", "estimates", "metrics", "copies", "evaluator", "problems"],
    "data": ["batches", "pairs", "digits", "curve", "reflow"],
    "training": [
        "steps",
        "internals",
        "folder",
        "requeue",
        "stopping",
        "gradients",
        "distributed",
        "tensorboard",
        "muon",
        "optimizer",
        "module",
        "periodic",
        "ema",
        "drawing",
        "evaluation",
        "best",
        "arguments",
        "console",
        "saving",
        "config",
        "options",
        "parser",
        "cli",
    ],
    "": ["sample", "export", "reflow", "digitnet"],
}
"""Folders from bottom to top, and the files of each; last the commands, which nothing imports."""
ORDER = [f"{folder}.{file}".lstrip(".") for folder, files in HOUSE.items() for file in files]
FOREIGN = {
    "networks": {"torch"},
    "flow": {"torch", "scipy", "torchdiffeq"},
}
"""What the folders of the theory may import beside the standard library."""


def imports(path: Path):
    """The modules that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            for alias in node.names:
                is_file = (ROOT / f"{module}.{alias.name}".replace(".", "/")).with_suffix(".py").is_file()
                yield f"{module}.{alias.name}" if is_file else module


def file_of(name: str) -> Path:
    return PACKAGE / f"{name.replace('.', '/')}.py"


def test_the_house_is_as_it_is_written_here():
    files = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")}
    assert files == {*ORDER, "__init__", *(f"{folder}.__init__" for folder in HOUSE if folder)}


@pytest.mark.parametrize("name", ORDER)
def test_each_file_imports_only_from_folders_below_and_files_before(name):
    folders = list(HOUSE)
    folder = name.rpartition(".")[0]
    for module in imports(file_of(name)):
        if not module.startswith("flowmatch_mnist."):
            top = module.partition(".")[0]
            assert top in sys.stdlib_module_names or top in FOREIGN.get(folder, {top}), f"{name} imports {module}"
            continue
        other = module.removeprefix("flowmatch_mnist.")
        below = other.rpartition(".")[0]
        assert folders.index(below) <= folders.index(folder), f"{name} imports {other}: a folder above its own"
        assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}: a file after it"


def test_no_file_is_too_long_to_read():
    lengths = {name: len(file_of(name).read_text().splitlines()) for name in ORDER}
    assert not {name: length for name, length in lengths.items() if length > 300}


def run(code: str, cwd: Path = ROOT, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment or None)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


BLOCKED = """
import importlib, sys
for name in ("lightning", "torchvision", "torchmetrics", "PIL"):
    sys.modules[name] = None
for name in {names}:
    importlib.import_module("flowmatch_mnist." + name)
"""


def test_the_theory_is_imported_where_no_trainer_and_no_images_are():
    run(BLOCKED.format(names=[name for name in ORDER if name.startswith(("networks.", "flow."))]))


def test_drawing_imports_no_lightning():
    code = (
        "import sys, sample, flowmatch_mnist.sampling.request; print(any(name.startswith('lightning') for name in sys.modules))"
    )
    assert run(code) == "False"


def test_a_mistake_is_told_before_pytorch_is_imported():
    assert run("import sys, flowmatch_mnist.sample; print('torch' in sys.modules, 'numpy' in sys.modules)") == "False False"


def foreign_privates(text: str) -> list[str]:
    """Where a file reaches for a private attribute of something that is not its own."""
    found = re.findall(r"[\w\])]+\._[a-z]\w*", text)
    return [use for use in found if not use.startswith(("self._", "cls._", "torch._foreach_"))]


def test_only_the_fence_uses_what_is_private_to_others():
    assert foreign_privates(file_of("training.internals").read_text())
    for path in [*(file_of(name) for name in ORDER if name != "training.internals"), ROOT / "sample.py", ROOT / "train.py"]:
        assert not foreign_privates(path.read_text()), path


def test_only_one_file_knows_tensorboard():
    for name in ORDER:
        if name != "training.tensorboard":
            words = re.findall(r"TensorBoardLogger|torch\.utils\.tensorboard|\.experiment\b", file_of(name).read_text())
            assert not words, f"{name} has {words}"


def test_a_wheel_draws_away_from_the_checkout(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(PACKAGE, tree / "flowmatch_mnist", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", tree / "configs")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    shutil.rmtree(tree)
    code = (
        "import flowmatch_mnist, importlib, flowmatch_mnist.evaluation.classifiers as c;"
        f"[importlib.import_module('flowmatch_mnist.' + name) for name in {ORDER}];"
        "drawn = flowmatch_mnist.draw([3, 7], 'one-step').values;"
        "print(flowmatch_mnist.__file__, drawn.shape, len([c.load_classifier(name) for name in c.CLASSIFIERS]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"{tmp_path / 'site/flowmatch_mnist/__init__.py'} torch.Size([2, 28, 28]) 2", done.stderr
    for name, options, words in (
        ("flowmatch-sample", ["7", "--steps", "1"], "wrote digits.png"),
        ("flowmatch-sample", ["--help"], "usage: flowmatch-sample"),
        ("flowmatch-train", ["fit", "--config", "toy", "--print_config"], "CurveDataModule"),
    ):
        command = [sys.executable, tmp_path / "site/bin" / name, *options]
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and words in done.stdout, done.stderr
