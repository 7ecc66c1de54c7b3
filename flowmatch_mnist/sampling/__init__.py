"""A trained network at work: samples, likelihoods, exported files."""
