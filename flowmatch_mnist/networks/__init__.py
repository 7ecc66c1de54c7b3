"""Velocity fields: what a network offers, the UNet, and the perceptron of the plane."""
