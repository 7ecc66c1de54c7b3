"""The script that takes pictures of TensorBoard: with a stand-in for the browser, so the test needs none."""

import importlib.util
import json
import sys

import pytest
from conftest import ROOT, unix
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from flowmatch_mnist.support.errors import UserError

spec = importlib.util.spec_from_file_location("screenshots", ROOT / "docs" / "screenshots.py")
screenshots = importlib.util.module_from_spec(spec)
spec.loader.exec_module(screenshots)

BROWSER = f"""#!{sys.executable}
import json, sys, urllib.request
from PIL import Image
options = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:-1])
page, _, tab = sys.argv[-1].partition("#")
runs = json.load(urllib.request.urlopen(page + "data/runs"))
where = json.load(urllib.request.urlopen(page + "data/environment"))["data_location"]
json.dump({{"tab": tab, "size": options["window-size"], "runs": runs, "where": where}}, open("seen.json", "w"))
Image.new("L", (2, 2)).save(options["screenshot"])
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls the script in a folder, with options."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def run(*options):
        monkeypatch.setattr("sys.argv", ["screenshots.py", *map(str, options)])
        screenshots.main()

    return run


@unix
def test_it_shows_the_tab_of_these_runs_in_this_size(call, tmp_path, capsys):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/google-chrome").write_text(BROWSER)
    (tmp_path / "bin/google-chrome").chmod(0o755)
    with SummaryWriter(str(tmp_path / "there/mine")) as writer:
        writer.add_scalar("loss", 1.0, 1)
    call("--logdir", "there", "--tab", "text", "--size", 640, 480, "--out", "there/text.png")
    with Image.open("there/text.png") as picture:
        assert picture.size == (2, 2)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen == {"tab": "text", "size": "640,480", "runs": ["mine"], "where": "there"}, "no path of this machine is shown"
    assert capsys.readouterr().out == "wrote there/text.png\n"


@unix
def test_without_a_browser_or_a_run_it_says_so(call, tmp_path):
    with pytest.raises(UserError, match="no browser; install one of chromium"):
        call()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/chromium").write_text("#!/bin/false\n")
    (tmp_path / "bin/chromium").chmod(0o755)
    with pytest.raises(UserError, match="runs holds no run; train one"):
        call()


@unix
def test_a_browser_that_fails_is_named(tmp_path):
    with pytest.raises(UserError, match="false took no picture of about:blank"):
        screenshots.photograph("/bin/false", "about:blank", (1, 1), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
