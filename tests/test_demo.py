"""The page that draws in the browser: built by its own command, opened in Chromium."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line_error, run, run_here
from filelock import FileLock
from PIL import Image
from test_runs import TOY
from test_tensorboard import BROWSER

from flowmatch_mnist.evaluation.classifiers import load_classifier
from flowmatch_mnist.evaluation.metrics import classify
from flowmatch_mnist.sampling.generate import Flow, Sampler
from flowmatch_mnist.sampling.weights import save

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on the PATH"),
    pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm on the PATH"),
]

FRAMED = """<!doctype html><iframe src="index.html#steps=1" style="width: {width}px; height: 900px; border: 0"></iframe>
<script>
const look = () => {{
  const { fits } = document.querySelector("iframe").contentDocument.body.dataset;
  if (fits) document.body.dataset.found = fits; else setTimeout(look, 50);
}};
look();
</script>""".replace("{ fits }", "{{ fits }}")

HAND = """<script type="module">
const [pad, form] = [document.querySelector("#pad"), document.querySelector("#hand")];
const wait = (until) => new Promise((done) => { const look = () => (until() ? done() : setTimeout(look, 50)); look(); });
await wait(() => document.body.dataset.fits);
const { left, top } = pad.getBoundingClientRect();
const send = (kind, x, y) => pad.dispatchEvent(new PointerEvent(kind, { clientX: left + x, clientY: top + y, buttons: 1 }));
pad.setPointerCapture = () => {};
send("pointerdown", 70, 60);
for (const [x, y] of [[210, 60], [170, 150], [140, 240]]) send("pointermove", x, y);
form.requestSubmit();
await wait(() => document.querySelector("#status").textContent.startsWith("Drew ten"));
document.body.dataset.found = document.querySelector("#hands").toDataURL();
</script>"""

PLANE = """<script type="module">
const wait = (until) => new Promise((done) => { const look = () => (until() ? done() : setTimeout(look, 50)); look(); });
await wait(() => document.body.dataset.fits);
const [form, time] = [document.querySelector("#points"), document.querySelector("#moment")];
form.elements.steps.value = 3;
form.requestSubmit();
await wait(() => time.max === "3" && time.value === "3");
await new Promise((done) => setTimeout(done, 500));
document.body.dataset.found = document.querySelector("#plane").toDataURL();
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The folder of the page, built once for all workers, with a field of the plane that was trained for a moment."""
    folder = tmp_path_factory.getbasetemp().parent / "demo"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            making = folder.with_name("demo-making")
            making.mkdir()
            done = run_here("train.py", *TOY, "--data.prompted", "true", "--model.net.classes", 10, cwd=making)
            assert done.returncode == 0, done.stderr
            (plane,) = making.glob("runs/*/version_0/checkpoints/last.ckpt")
            shutil.copytree(ROOT / "docs/demo", making / "page", ignore=shutil.ignore_patterns("built"))
            done = run("docs/demo/build.py", "--plane", plane, "--out", making / "page/built", cwd=making)
            assert done.returncode == 0 and " MB; look at it with" in done.stdout, done.stderr
            making.rename(folder)
    return folder / "page"


@contextmanager
def served(folder):
    """Where a folder is served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def address(page):
    """Where the page is."""
    with served(page) as address:
        yield address


def visit(address, name, wanted, folder):
    """What the page holds once `wanted` matches. Chromium's clock may run ahead of its compiler, so that it tries again."""
    asked = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--virtual-time-budget=120000")
    for _ in range(6):
        command = [BROWSER, *asked, "--dump-dom", f"{address}/{name}"]
        shown = html.unescape(subprocess.run(command, capture_output=True, text=True, timeout=200, check=False).stdout)
        if found := re.search(wanted, shown):
            return found
    raise AssertionError(shown[-3000:])


def picture(found):
    """The picture of a data URL that was found."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGB"))


def test_it_is_small_and_fetches_nothing_from_elsewhere(page):
    assert sum(path.stat().st_size for path in page.rglob("*") if path.is_file()) < 10e6
    for path in (page / "index.html", page / "style.css", page / "demo.js", page / "flow.js"):
        assert not re.search(r"https?://|//[a-z]+\.", path.read_text().replace("http.server", "")), path


@pytest.mark.parametrize("power", [0, 1])
def test_it_draws_the_digits_that_sample_draws(page, tmp_path, power):
    shutil.copytree(page, tmp_path / "page")
    settings = tmp_path / "page/built/settings.json"
    built = json.loads(settings.read_text())
    built["sampler"]["guidance_power"] = power
    settings.write_text(json.dumps(built))
    with served(tmp_path / "page") as address:
        found = visit(address, "index.html#labels=0123456789&steps=3", 'href="data:image/png;base64,([^"]+)"', tmp_path)
    drawn = picture(found)[2::4, 2::4, 0].reshape(30, 10, 30)[1:29, :, 1:29].transpose(1, 0, 2)
    options = ["--weights", "mnist", "--steps", 3, "--guidance-power", power]
    done = run_here("sample.py", "0-9", *options, "--out", "out.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as archive:
        off = np.abs(drawn.astype(int) - archive["images"])
    assert off.mean() < 0.5 and np.quantile(off, 0.999) <= 6, "weights are rounded to 16 bits"


@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_a_telephone_and_a_desk(page, address, tmp_path, width):
    (page / f"{width}.html").write_text(FRAMED.format(width=width))
    assert visit(address, f"{width}.html", 'data-found="(true|false)"', tmp_path)[1] == "true"


def test_a_digit_of_ones_own_is_drawn_as_all_ten(page, address, tmp_path):
    (page / "hand.html").write_text((page / "index.html").read_text() + HAND)
    sheet = picture(visit(address, "hand.html#steps=1", 'data-found="data:image/png;base64,([^"]+)"', tmp_path))
    cells = sheet[2::4, 2::4, 0].reshape(30, 11, 30)[1:29, :, 1:29].transpose(1, 0, 2)
    read = classify(load_classifier("digitnet"), torch.from_numpy(cells.copy()))[1].tolist()
    assert read[0] == 7 and sum(a == b for a, b in zip(read[1:], range(10), strict=True)) >= 7, read


def test_points_follow_the_arrows(page, address, tmp_path):
    (page / "plane.html").write_text((page / "index.html").read_text() + PLANE)
    shown = picture(visit(address, "plane.html#steps=1", 'data-found="data:image/png;base64,([^"]+)"', tmp_path)).astype(int)
    orange = (np.abs(shown - [217, 95, 2]).sum(-1) < 30).sum()
    blue = (np.abs(shown - [122, 166, 216]).sum(-1) < 30).sum()
    assert orange > 500 and blue > 500


def test_a_missing_file_is_a_sentence(page, tmp_path):
    shutil.copytree(page, tmp_path / "page", ignore=shutil.ignore_patterns("noise.bin"))
    with served(tmp_path / "page") as address:
        message = visit(address, "index.html", r'<p id="status"[^>]*class="error"[^>]*>([^<]*)<', tmp_path)[1]
    assert message.startswith("The file built/noise.bin is missing. Run")


def test_what_the_page_cannot_integrate_is_refused(tmp_path, tiny_net):
    save(tmp_path / "noise.safetensors", Flow(tiny_net, "vp", "noise"), Sampler(), {})
    done = run("docs/demo/build.py", "--weights", tmp_path / "noise.safetensors", "--out", tmp_path / "built", cwd=tmp_path)
    assert_one_line_error(done, "velocity on the linear path, not noise on vp")
    done = run_here("docs/demo/build.py", "--weights", "one-step", "--out", tmp_path / "built", cwd=tmp_path)
    assert_one_line_error(done, "learned only one")
