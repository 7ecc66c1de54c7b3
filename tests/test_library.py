"""The package in a notebook: three lines, a picture, and imports that wait until they are needed."""

import io
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

import flowmatch_mnist
from flowmatch_mnist.images.pictures import grid
from flowmatch_mnist.sampling.generate import generate
from flowmatch_mnist.sampling.weights import PRETRAINED, load
from flowmatch_mnist.support.errors import UserError


def test_draw_is_load_and_generate():
    digits = flowmatch_mnist.draw([7, 3, 7], seed=5, steps=2)
    flow, sampler = load(PRETRAINED["mnist"])
    sampler.steps = 2
    again = generate(flow, torch.tensor([7, 3, 7]), sampler, seed=5)
    assert torch.equal(digits.values, again.values) and digits.labels.tolist() == [7, 3, 7]
    assert digits.values.shape == (3, 28, 28) and digits.values.dtype == torch.uint8


def test_a_notebook_shows_the_grid():
    digits = flowmatch_mnist.draw(range(10), steps=1)
    shown = Image.open(io.BytesIO(digits._repr_png_()))
    assert shown.tobytes() == grid(digits.values, 10).numpy().tobytes()


def test_mistakes_are_told():
    for labels in ([], [10], [-1, 3]):
        with pytest.raises(ValueError, match="0 to 9"):
            flowmatch_mnist.draw(labels)
    with pytest.raises(ValueError, match="solver"):
        flowmatch_mnist.draw([1], solver="magic")
    with pytest.raises(ValueError, match="mean velocities"):
        flowmatch_mnist.draw([1], solver="average")
    with pytest.raises(UserError, match=r"nobody\.ckpt"):
        flowmatch_mnist.draw([1], "nobody.ckpt")
    with pytest.raises(AttributeError, match="nothing_such"):
        flowmatch_mnist.nothing_such  # noqa: B018


def test_importing_the_package_imports_nothing_heavy_and_everything_public_is_there():
    code = (
        "import sys, flowmatch_mnist; print('torch' in sys.modules);"
        "print(all(hasattr(flowmatch_mnist, name) for name in flowmatch_mnist.__all__));"
        "print(any(name.startswith(('lightning', 'torchmetrics', 'matplotlib', 'scipy')) for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "False"]
