"""The uses of a trained network: samples, likelihoods, exported files."""
