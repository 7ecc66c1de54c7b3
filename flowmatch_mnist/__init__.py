"""Flow matching on MNIST: train a class-conditional velocity field, then draw digits by label."""
