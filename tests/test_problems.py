"""What is shown of images: a column for each class, and some of the states from noise to image."""

import torch

from flowmatch_mnist.evaluation.problems import OtherImages
from flowmatch_mnist.images.pictures import grid
from flowmatch_mnist.sampling.generate import Samples


def shades(*levels):
    """Images of one grey level each, of any shape of levels."""
    return torch.tensor(levels, dtype=torch.uint8)[..., None, None].expand(*torch.tensor(levels).shape, 28, 28)


def test_a_strip_has_eleven_states_at_most_evenly_from_the_first_to_the_last():
    labels = torch.arange(20) % 10
    for steps, shown in ((20, range(0, 21, 2)), (10, range(11)), (4, range(5)), (13, [0, 1, 3, 4, 5, 6, 8, 9, 10, 12, 13])):
        states = shades(*[[10 * label + step for label in range(20)] for step in range(steps + 1)])
        pictures = OtherImages().pictures(Samples(states[-1], labels, steps, states))
        assert torch.equal(pictures["grid"], grid(states[-1], columns=10))
        expected = shades(*[10 * label + step for label in range(10) for step in shown])
        assert torch.equal(pictures["trajectory"], grid(expected, columns=len(shown)))
    assert set(OtherImages().pictures(Samples(states[-1], labels, 4))) == {"grid"}
