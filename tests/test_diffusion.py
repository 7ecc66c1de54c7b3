"""Flow matching and Gaussian diffusion are one: DDIM, DDPM and the reverse SDE, each as its paper writes it, against ours."""

import math
from itertools import pairwise

import pytest
import torch
from oracle import MEAN, SPREAD, Gaussian

from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.flow.predictions import PREDICTIONS, StraightVelocity, pair
from flowmatch_mnist.flow.solvers import ONE_STEP, churned, euler, time_grid, trajectory

STRAIGHT = PATHS["linear"]
EVERY_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def random_network(prediction, tiny_net):
    """A random UNet that knows nothing of paths, made tame so that trajectories stay of order one."""
    return lambda x, t: torch.tanh(tiny_net(x.float(), t.float().expand(len(x)), torch.zeros(len(x), dtype=torch.long))).to(x)


@EVERY_PATH
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_euler_on_the_straight_path_is_ddim(path, prediction, tiny_net):
    """DDIM in the path's own coordinates (Song, Meng and Ermon 2020, equation 12), over a whole trajectory."""
    network = random_network(prediction, tiny_net)
    grid = time_grid(12, "log_snr")[1:-1]  # between log-SNRs that every path has
    own = path.time(STRAIGHT.log_snr(grid))
    noise = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    x = noise
    with torch.no_grad():
        for s, s_next in pairwise(own):
            x0, x1 = pair(prediction, path, network(x, s), x, s)
            x = path.alpha(s_next) * x1 + path.sigma(s_next) * x0
        size = [torch.hypot(path.alpha(s), path.sigma(s)) / torch.hypot(t, 1 - t) for s, t in zip(own, grid, strict=True)]
        *_, ours = trajectory(StraightVelocity(network, path, prediction), noise / size[0], grid, "euler")
    torch.testing.assert_close(ours * size[-1], x, atol=1e-5 * x.abs().max().item(), rtol=0)


def test_a_churned_euler_step_is_ddpm_s_posterior():
    """q(x_{s-1} | x_s, x1) of Ho et al. 2020, equations 6 and 7: mean and deviation, on the variance-preserving path."""
    path = PATHS["vp"]
    s, s_next = torch.tensor(0.30, dtype=torch.float64), torch.tensor(0.31, dtype=torch.float64)  # our times, towards the data
    x, x1 = torch.randn(1000).double(), torch.randn(1000).double()
    alpha_bar, alpha_bar_next = path.alpha(s) ** 2, path.alpha(s_next) ** 2
    beta = 1 - alpha_bar / alpha_bar_next
    mean = alpha_bar_next.sqrt() * beta / (1 - alpha_bar) * x1
    mean = mean + (1 - beta).sqrt() * (1 - alpha_bar_next) / (1 - alpha_bar) * x
    deviation = ((1 - alpha_bar_next) / (1 - alpha_bar) * beta).sqrt()

    t, t_next = (STRAIGHT.time(path.log_snr(time)) for time in (s, s_next))
    size, size_next = torch.hypot(t, 1 - t), torch.hypot(t_next, 1 - t_next)
    z = torch.randn(1000).double()
    step = churned(euler, 1.0, lambda: z)
    ours = step(lambda y, t: (x1 - y) / (1 - t), x * size, t, t_next)
    torch.testing.assert_close(ours / size_next, mean + deviation * z)


@pytest.mark.parametrize("churn", [0.3, 1.0, 2.5])
def test_a_churned_step_is_the_exact_step_of_its_sde_where_the_data_are_known(churn):
    """With x1 known, the noise follows dw = -churn l'/2 w dt + sqrt(churn l') dW: decay and deviation in closed form."""
    t, t_next, x1 = torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64), 0.7
    gained = STRAIGHT.log_snr(t_next) - STRAIGHT.log_snr(t)
    w, z = torch.randn(1000).double(), torch.randn(1000).double()
    step = churned(euler, churn, lambda: z)
    ours = step(lambda y, t: (x1 - y) / (1 - t), t * x1 + (1 - t) * w, t, t_next)
    decay = torch.exp(-churn * gained / 2)
    w_next = decay * w + torch.sqrt(1 - decay**2) * z
    torch.testing.assert_close(ours, t_next * x1 + (1 - t_next) * w_next)


@pytest.mark.parametrize("churn", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("solver", ONE_STEP)
def test_churn_keeps_mean_and_variance_at_any_strength(churn, solver):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(40_000, generator=generator, dtype=torch.float64)
    draw = lambda: torch.randn(40_000, generator=generator, dtype=torch.float64)  # noqa: E731
    velocity = Gaussian(STRAIGHT, "velocity")
    states = list(trajectory(velocity, x0, time_grid(200), solver, churn=churn, fresh_noise=draw))
    for t, x in ((0.5, states[100]), (1.0, states[200])):
        deviation = math.hypot(t * SPREAD, 1 - t)
        assert abs(x.mean().item() - t * MEAN) < 0.01 + 4 * deviation / 200
        # The error of Euler's step grows with the noise that it is asked to make up for.
        assert abs(x.std().item() / deviation - 1) < (0.02 + 0.02 * churn if solver == "euler" else 0.02)
    # It does renew the noise: the sample forgets where it started.
    correlation = torch.corrcoef(torch.stack([x0, states[-1]]))[0, 1].item()
    assert (correlation > 0.999) if churn == 0 else (correlation < 0.5)


def two_points(x, t):
    """The velocity of the straight path to -1 and 1, of weights 0.3 and 0.7."""
    sigma = (1 - t).clamp(min=1e-4)
    data = torch.tanh(x * t / sigma**2 + math.atanh(0.4))
    return (data - x) / sigma


def test_ddpm_is_ddim_that_went_twice_as_far_and_was_noised_again():
    """As Gao et al. 2024 state it, on a mixture: DDIM to l + 2d, then noise back to l + d, has DDPM's distribution."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda: torch.randn(100_000, generator=generator, dtype=torch.float64)  # noqa: E731
    grid = time_grid(40, "log_snr")
    start = normal()

    ours = list(trajectory(two_points, start, grid, "euler", churn=1.0, fresh_noise=normal))

    x = start
    for t, t_next in pairwise(grid):
        x1 = x + (1 - t) * two_points(x, t)
        # The posterior of DDPM's forward process, in the coordinates of the straight path.
        shrink = torch.exp(STRAIGHT.log_snr(t) - STRAIGHT.log_snr(t_next)) if t_next < 1 else torch.zeros(())
        residual = (x - t * x1) / (1 - t)
        x = t_next * x1 + (1 - t_next) * (shrink.sqrt() * residual + (1 - shrink).sqrt() * normal())
    quantiles = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    middle = ours[20]
    assert middle.std() > 0.3
    for one, other in ((ours[-1], x), (ours[-1].sign(), x.sign())):
        # The weights of the points end as they should: both are near them, on the right side as often.
        assert abs((one > 0).double().mean() - (other > 0).double().mean()) < 0.01
        assert abs((one > 0).double().mean() - 0.7) < 0.02
        torch.testing.assert_close(
            one.quantile(quantiles[quantiles < 0.28]), other.quantile(quantiles[quantiles < 0.28]), atol=0.02, rtol=0
        )


def test_the_first_churned_step_forgets_all_noise_and_the_last_adds_none():
    z = torch.randn(100).double()
    x0, x1 = torch.randn(100).double(), torch.randn(100).double()
    known = lambda x, t: (x1 - x) / (1 - t)  # noqa: E731
    step = churned(euler, 1.0, lambda: z)
    zero, one, near = (torch.tensor(t, dtype=torch.float64) for t in (0.0, 1.0, 0.1))
    torch.testing.assert_close(step(known, x0, zero, near), 0.1 * x1 + 0.9 * z)
    torch.testing.assert_close(step(known, near * x1 + (1 - near) * x0, near, one), x1)
