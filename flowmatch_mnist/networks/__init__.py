"""Networks: their common interface, the UNet for digits, and the perceptron for points in the plane."""
