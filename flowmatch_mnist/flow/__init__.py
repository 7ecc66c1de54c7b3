"""The theory: from noise and data to a loss, from a field to a trajectory. It needs PyTorch alone."""
