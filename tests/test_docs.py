"""What the README and docs/ tell a reader to type does what they say."""

import importlib.util
import json
import re
import shlex
import warnings

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT, run_here, unix
from test_strokes import seven

spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(notebooks)

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / ".github" / "CONTRIBUTING.md"]


def blocks(page, language):
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands():
    """Each command of a shell block, without its comment, once."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                found += [part.strip() for part in line.split(" #")[0].split("&&") if part.strip()]
    return list(dict.fromkeys(found))


def test_the_code_of_the_pages_runs(tmp_path, monkeypatch, data_dir):
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    ran = 0
    for page in PAGES:
        names: dict = {"__name__": "__main__"}
        for block in blocks(page, "python"):
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # there is no window to show a figure in
                exec(compile(block, f"{page.name}", "exec"), names)
            plt.close("all")
            ran += 1
    assert ran >= 20


@pytest.mark.parametrize("page", notebooks.PAGES)
def test_a_notebook_is_its_page_with_outputs(page):
    """If this fails, run `python docs/notebooks.py`."""
    stored = json.loads((ROOT / "docs" / f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    fresh = notebooks.cells(page)
    assert [(c["cell_type"], "".join(c["source"])) for c in stored] == [(c["cell_type"], c["source"]) for c in fresh]
    codes = [cell for cell in stored if cell["cell_type"] == "code"]
    assert all(output["output_type"] != "error" for cell in codes for output in cell["outputs"])
    for cell, name in zip(codes, notebooks.pictures(page), strict=True):
        shown = ["image/png" in output.get("data", {}) for output in cell["outputs"]]
        assert sum(shown) == (name is not None), f"{page}.md: {name}"


@unix
@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python sample.py")])
def test_drawing_commands_draw(command, tmp_path, data_dir):
    words = shlex.split(command)[2:]
    (tmp_path / "data").symlink_to(data_dir)
    seven().save(tmp_path / "seven.jpg")
    if "--weights" not in words and "--checkpoint" not in words:
        words += ["--weights", "mnist"]
    if "--per-class" in words and int(words[words.index("--per-class") + 1]) > 2:
        words[words.index("--per-class") + 1] = "2"  # a thousand digits take a while
    if "--checkpoint" in words:
        words[words.index("--checkpoint") + 1] = str(ROOT / "flowmatch_mnist" / "mnist.safetensors")
    done = run_here("sample.py", *words, cwd=tmp_path)
    assert done.returncode == 0 and "wrote" in done.stdout, done.stderr


@unix
@pytest.mark.parametrize("command", [c for c in commands() if "python train.py" in c and "--ckpt_path" not in c])
def test_training_commands_are_understood(command, tmp_path, monkeypatch):
    """Each with --print_config, which checks every key and ends before the training.

    Those that go on from a run of the reader's are left to test_saving.py and test_cli.py.
    """
    words = shlex.split(re.sub(r"^.*python train.py", "", command))
    for name in ("configs", "runs"):
        (tmp_path / name).symlink_to(ROOT / name)
    if "mine." in command:
        (tmp_path / "mine.py").write_text("".join(blocks(ROOT / "docs" / "extending.md", "python")))
        monkeypatch.syspath_prepend(tmp_path)
    done = run_here("train.py", *words, "--print_config", cwd=tmp_path)
    assert done.returncode == 0 and "seed_everything" in done.stdout, done.stderr


def test_every_other_command_is_known():
    """What is left is run by .ci/run, or is a script that exists."""
    for command in commands():
        if "sample.py" in command or "train.py" in command:
            continue
        words = shlex.split(command)
        if words[:2] == ["python", "-m"]:
            assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), command
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), command
        else:
            assert words[0] in ("pip", "pytest", "ruff", "mypy", "tensorboard", "pre-commit", "torchrun", "git", "cd"), command


def test_every_link_and_picture_is_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
