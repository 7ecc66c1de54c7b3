"""A check for samples that are copies of training images."""

import torch
from torch import Tensor

from flowmatch_mnist.evaluation.estimates import Measurement, median, share
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.devices import full_float32

MAX_COMPARED = 1000
"""The largest number of samples, and of held-out images, to compare with the training images. This takes the most time."""

CHUNK = 1000
"""Number of images in one computation of distances."""


class Copies:
    """Detects copies of training images. The distance to the nearest training image is compared with that of held-out images.

    Args:
        held_out: images uint8 (M, H, W).
        training: images uint8 (N, H, W).
        device: the device that computes the distances.
    """

    def __init__(self, held_out: Tensor, training: Tensor, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.training = self._flat(training)
        self.distances = self._nearest(held_out)

    def measure(self, images: Tensor) -> list[Measurement]:
        """Return the median distance to the nearest training image, and the share of near copies.

        A near copy is nearer to a training image than 99% of the held-out images are.
        """
        distances = self._nearest(images)
        limit = torch.quantile(self.distances, 0.01)
        return [
            Measurement("distance to nearest training image", median(distances), median(self.distances)),
            Measurement("near copies", share(distances < limit), share(self.distances < limit)),
        ]

    @full_float32()
    def _nearest(self, images: Tensor) -> Tensor:
        """Return the distances of random images to their nearest training images: (at most `MAX_COMPARED`,), on the CPU."""
        order = torch.randperm(len(images), generator=streams.generator("cpu", "near copies"))
        some = self._flat(images[order[:MAX_COMPARED]])
        return torch.cat([torch.cdist(chunk, self.training).amin(1) for chunk in some.split(CHUNK)]).cpu()

    def _flat(self, images: Tensor) -> Tensor:
        """Return images as points (N, H W). Their distance is the root mean square difference of the pixels, 0 to 1."""
        return images.flatten(1).to(self.device).float() / (255 * images[0].numel() ** 0.5)
