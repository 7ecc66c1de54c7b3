"""What each training cares for: the effective weight of its loss over the log-SNR.

python benchmarks/weightings.py [--out docs/weightings.png]

Draws them as Gao et al. 2024, "Diffusion Meets Flow Matching", do; each is scaled so that its greatest value shown is 1.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from flowmatch_mnist.flow.weighting import WEIGHTINGS
from flowmatch_mnist.support.errors import exit_on_error
from flowmatch_mnist.support.files import replacing

NAMES = {
    "flow_matching": "flow matching: exp(-l/2), also velocity on the cosine path",
    "sd3": "Stable Diffusion 3: flow matching at logit-normal times",
    "edm": "EDM",
    "ddpm": "DDPM: L_simple, linear betas",
}


def main() -> None:
    """Draw them all into one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/weightings.png"))
    out = parser.parse_args().out
    log_snr = torch.linspace(-6, 9, 500, dtype=torch.float64)
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, weight in WEIGHTINGS.items():
        w = weight(log_snr)
        axes.plot(log_snr.numpy(), (w / w.max()).numpy(), label=NAMES[name])
    axes.set_xlabel("log-SNR l: noise on the left, data on the right")
    axes.set_ylabel("weight of the noise's squared error, w(l)")
    axes.legend()
    with replacing(out) as temporary:
        figure.savefig(temporary)
    print(f"wrote {out}")


if __name__ == "__main__":
    with exit_on_error():
        main()
