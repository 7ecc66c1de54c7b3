"""MNIST's images: the four files, grey levels as numbers, and pictures."""
