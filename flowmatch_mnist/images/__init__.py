"""MNIST's images: the four files, grey levels as real numbers, and pictures."""
