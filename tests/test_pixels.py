"""Grey levels on their scales: there and back, and the densities they have."""

import math

import pytest
import torch

from flowmatch_mnist.images.pixels import PIXELS, LogitPixels, bits_per_dimension, dequantize

EVERY_SCALE = pytest.mark.parametrize("pixels", PIXELS.values(), ids=PIXELS)
LEVELS = torch.arange(256, dtype=torch.uint8)


@EVERY_SCALE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", [0.0, 0.5, 0.999])
def test_every_level_comes_back(pixels, dtype, u):
    x = pixels.forward(LEVELS, torch.full((256,), u, dtype=dtype))
    assert x.dtype == dtype and x.isfinite().all() and (x.diff() > 0).all()
    assert torch.equal(pixels.inverse(x), LEVELS)


@EVERY_SCALE
def test_what_lies_outside_becomes_black_or_white(pixels):
    assert pixels.inverse(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_the_linear_scale_is_that_of_the_training():
    torch.testing.assert_close(PIXELS["linear"].forward(LEVELS, torch.full((256,), 0.5)), LEVELS.float() / 127.5 - 1)


def test_the_logit_is_that_of_the_paper():
    u = torch.rand(256).double()
    p = 0.05 + 0.9 * (LEVELS + u) / 256
    torch.testing.assert_close(LogitPixels(0.05, 2.0).forward(LEVELS, u), torch.logit(p) / 2)
    assert torch.equal(LogitPixels(0.2, 2.0).inverse(LogitPixels(0.2, 2.0).forward(LEVELS, u)), LEVELS)
    assert PIXELS["logit"].alpha == 1e-6
    # Black and white lie where the docstring says.
    u = torch.rand(100_000).double()
    black, white = (PIXELS["logit"].forward(torch.full((100_000,), v, dtype=torch.uint8), u) for v in (0, 255))
    assert abs(black.mean() + 1) < 0.01 and abs(white.mean() - 1) < 0.01 and abs(black.std() - 0.15) < 0.01


@EVERY_SCALE
def test_slopes_against_autograd(pixels):
    levels, u = LEVELS.view(4, 8, 8), torch.rand(4, 8, 8).double().requires_grad_()
    (slopes,) = torch.autograd.grad(pixels.forward(levels, u).sum(), u)
    torch.testing.assert_close(pixels.log_slope(levels, u.detach()), slopes.log().flatten(1).sum(1))


def test_levels_that_are_all_as_frequent_take_eight_bits():
    levels, u = torch.randint(256, (50, 4, 4), dtype=torch.uint8), torch.rand(50, 4, 4).double()
    alpha, scale = LogitPixels().alpha, LogitPixels().scale
    # The densities of x1 in closed form: uniform on [-1 - 1/255, 1 + 1/255], and a cut and stretched logistic one.
    linear = torch.full((50, 4, 4), 127.5 / 256).double()
    p = torch.sigmoid(scale * LogitPixels().forward(levels, u))
    logit = scale * p * (1 - p) / (1 - 2 * alpha)
    for name, density in (("linear", linear), ("logit", logit)):
        bits = bits_per_dimension(density.log().flatten(1).sum(1), PIXELS[name].log_slope(levels, u), 16)
        torch.testing.assert_close(bits, torch.full((50,), 8.0).double())


@EVERY_SCALE
def test_the_noise_of_an_image_is_a_function_of_seed_and_number(pixels):
    images = torch.randint(256, (5, 28, 28), dtype=torch.uint8)
    x1, log_slope = dequantize(images, pixels, seed=3)
    assert x1.shape == (5, 1, 28, 28) and x1.dtype == torch.float32
    assert log_slope.shape == (5,) and log_slope.dtype == torch.float64
    assert torch.equal(pixels.inverse(x1[:, 0]), images)
    some, slopes = dequantize(images[[4, 1]], pixels, seed=3, numbers=[4, 1])
    assert torch.equal(some, x1[[4, 1]]) and torch.equal(slopes, log_slope[[4, 1]])
    assert not torch.equal(dequantize(images, pixels, seed=4)[0], x1)
    same = dequantize(images[:1].expand(2, -1, -1), pixels)[0]
    assert not torch.equal(same[0], same[1])


def test_the_noise_fills_its_cells_evenly():
    levels = torch.full((40, 28, 28), 9, dtype=torch.uint8)
    u = (dequantize(levels)[0].double() + 1) * 127.5 + 0.5 - 9
    assert u.min() > -1e-4 and u.max() < 1 + 1e-4
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * u.numel())
    assert abs(u.var() - 1 / 12) < 4 / math.sqrt(180 * u.numel())


def test_what_lies_outside_is_cut_off_not_wrapped():
    assert PIXELS["linear"].inverse(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]
    assert PIXELS["logit"].inverse(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
