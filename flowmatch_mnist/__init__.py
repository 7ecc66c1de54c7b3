"""Flow matching on MNIST: train a class-conditional velocity field, and draw digits by label.

In a notebook, or anywhere:

    from flowmatch_mnist import draw

    digits = draw([3, 1, 4, 1, 5])  # with the trained weights in the package; a notebook shows them
    digits.values  # uint8 (5, 28, 28)

`train.py` trains a network; see README.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowmatch_mnist.sampling.generate import Flow, Sampler, Samples
    from flowmatch_mnist.sampling.weights import draw, load

__all__ = ["Flow", "Sampler", "Samples", "draw", "load"]


def __getattr__(name: str) -> Any:
    # Import names at their first use, so `sample.py` can report a wrong command line before the slow import of PyTorch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.sampling.{'weights' if name in ('draw', 'load') else 'generate'}"), name)
