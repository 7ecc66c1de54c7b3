"""Does a model draw its training images again?"""

import torch
from torch import Tensor

from flowmatch_mnist.evaluation.estimates import Measurement, median, share
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.devices import full_float32

AMONG = 1000
"""Of how many samples, and of how many held-out images, the distances to the training images are taken: that costs most."""

CHUNK = 1000
"""How many images have their distances taken at a time."""


class Copies:
    """Tells copies of training images: by how near images are to the nearest of them, beside how near held-out ones are.

    Args:
        held_out: images uint8 (M, H, W).
        training: images uint8 (N, H, W).
        device: where to measure.
    """

    def __init__(self, held_out: Tensor, training: Tensor, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.training = self._flat(training)
        self.distances = self._nearest(held_out)

    def measure(self, images: Tensor) -> list[Measurement]:
        """The distance to the nearest training image, and the share that is nearer than one in a hundred held-out ones is."""
        distances = self._nearest(images)
        limit = torch.quantile(self.distances, 0.01)
        return [
            Measurement("distance to nearest training image", median(distances), median(self.distances)),
            Measurement("near copies", share(distances < limit), share(self.distances < limit)),
        ]

    @full_float32()
    def _nearest(self, images: Tensor) -> Tensor:
        """The distance of each of some images to the nearest training image: (at most `AMONG`,), on the CPU."""
        order = torch.randperm(len(images), generator=streams.generator("cpu", "near copies"))
        some = self._flat(images[order[:AMONG]])
        return torch.cat([torch.cdist(chunk, self.training).amin(1) for chunk in some.split(CHUNK)]).cpu()

    def _flat(self, images: Tensor) -> Tensor:
        """Images as points whose distance is the root mean square of the pixels' differences, 0 to 1: (N, H W)."""
        return images.flatten(1).to(self.device).float() / (255 * images[0].numel() ** 0.5)
