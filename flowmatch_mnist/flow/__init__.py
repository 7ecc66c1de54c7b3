"""The theory of flow matching: the loss for pairs of noise and data, and the trajectories of a velocity field.

It needs only PyTorch. Optimal transport also needs SciPy, and the solver `dopri5` also needs torchdiffeq.
"""
