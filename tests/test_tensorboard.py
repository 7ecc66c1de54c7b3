"""What TensorBoard shows of a run, asked of TensorBoard itself."""

import io
import json
import shutil
import subprocess
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
from conftest import TINY, only_first_images, run_here
from PIL import Image
from tensorboard import program

from flowmatch_mnist.training.config import LISTED_SETTINGS

RUN = "tiny/version_0"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory, data_dir):
    """A folder in which the tiny config ran, with evaluation."""
    folder = tmp_path_factory.mktemp("measured")
    few = ("--evaluation.every_n_epochs", 1, "--evaluation.samples", 20, "--data.data_dir", data_dir)
    with only_first_images(data_dir):
        for arguments in (["--config", TINY, *few], ["test", "--ckpt_path", "last"]):
            done = run_here("train.py", *arguments, cwd=folder)
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(measured_run):
    """Where a TensorBoard of that run listens."""
    board = program.TensorBoard()
    board.configure(argv=[None, "--logdir", str(measured_run / "runs"), "--port", "0", "--load_fast", "false"])
    return board.launch()


@pytest.fixture(scope="module")
def ask(address):
    """A function that asks that TensorBoard: by path and query, or with a body."""

    def get(path, body=None, **query):
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{address}data/plugin/{path}?{urlencode(query)}", data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=30) as answer:
            content = answer.read()
        return content if answer.headers["Content-Type"].startswith("image") else json.loads(content)

    return get


def test_scalars_have_few_groups_and_telling_names(ask):
    tags = set(ask("scalars/tags")[RUN])
    assert {"loss/train", "loss/val", "optimizer/learning_rate", "optimizer/gradient_norm", "speed/samples_per_second"} <= tags
    assert {f"loss_by_time/val {i / 5:.1f} to {(i + 1) / 5:.1f}" for i in range(5)} <= tags
    assert {tag.split("/")[0] for tag in tags} == {
        "loss",
        "loss_by_time",
        "loss_exact",
        "optimizer",
        "speed",
        "quality",
        "quality_details",
        "quality_errors",
        "quality_details_errors",
    }
    assert {"loss_exact/val 0.0 to 0.1", "loss_exact/val 0.1 to 0.2", "quality_errors/Frechet distance ratio"} <= tags
    assert {"quality/label accuracy", "quality/Frechet distance ratio", "quality/precision", "quality/recall"} <= tags
    steps, values = zip(*[point[1:] for point in ask("scalars/scalars", run=RUN, tag="loss/val")], strict=True)
    assert steps == (5, 11) and all(0 < value < 10 for value in values)
    # In a folder of its own: TensorBoard follows one writer in each, and a fit may still be at work.
    curve = ask("scalars/scalars", run=f"{RUN}/test", tag="quality_by_evaluations/Frechet distance ratio")
    assert [point[1] for point in curve] == [2, 6]  # midpoint in one step, and in three
    assert [point[1] for point in ask("scalars/scalars", run=f"{RUN}/test", tag="loss/test")] == [12], "the checkpoint's step"


def test_pictures_are_those_on_disk(ask, measured_run):
    tags = ask("images/tags")[RUN]
    assert set(tags) == {"samples/grid", "samples/trajectory"}
    for tag in tags:
        shown = ask("images/images", run=RUN, tag=tag, sample=0)
        last = ask(f"images/individualImage?{shown[-1]['query']}&x")
        name = f"{tag.removeprefix('samples/')}-{shown[-1]['step'] + 1:06d}.png"
        assert pixels(last) == pixels((measured_run / "runs" / RUN / "samples" / name).read_bytes())


def pixels(png):
    """The picture's pixels, in grey."""
    return Image.open(io.BytesIO(png)).convert("L").tobytes()


def test_the_config_is_a_text_and_hyper_parameters_stand_beside_the_outcome(ask):
    assert "batch_size: 16" in ask("text/text", run=RUN, tag="config/text_summary")[0]["text"]
    experiment = ask("hparams/experiment", {"experimentName": ""})
    parameters = {info["name"] for info in experiment["hparamInfos"]}
    assert parameters == set(LISTED_SETTINGS) - {"max_steps"}, "which is not limited"
    assert ask("text/text", run=RUN, tag="command/text_summary")[0]["text"].count("train.py fit --config") == 1
    assert "1 x cpu in" in ask("text/text", run=RUN, tag="machine/text_summary")[0]["text"]
    metrics = {info["name"]["tag"] for info in experiment["metricInfos"]}
    assert {"loss/val", "quality/Frechet distance ratio", "quality/label accuracy"} <= metrics
    wanted = {
        "colParams": [{"metric": {"tag": "loss/val"}}],
        "startIndex": 0,
        "sliceSize": 10,
        "allowedStatuses": ["STATUS_SUCCESS"],
    }
    (session,) = ask("hparams/session_groups", {"experimentName": "", **wanted})["sessionGroups"]
    (loss,) = [value["value"] for value in session["metricValues"] if value["name"]["tag"] == "loss/val"]
    assert loss == ask("scalars/scalars", run=RUN, tag="loss/val")[-1][2]


def test_the_first_look_has_a_layout(ask):
    (category,) = ask("custom_scalars/layout")["category"]
    charts = {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
    assert charts["losses"] == ["loss/train", "loss/val"]
    assert charts["losses by time"] == ["loss_by_time/val.*"]
    assert charts["samples per second"] == ["speed/samples_per_second"]
    assert charts["Frechet distance ratio"] == ["quality/Frechet distance ratio"]


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on the PATH")
def test_a_browser_shows_the_groups(address, tmp_path):
    asked = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=30000")
    done = subprocess.run([BROWSER, *asked, "--dump-dom", f"{address}#timeseries"], capture_output=True, text=True, timeout=120)
    for shown in (RUN, "loss_by_time", "optimizer", "quality_by_evaluations", "speed"):
        assert shown in done.stdout, (shown, done.stderr[-500:])
