"""The data modules, which draw the noise of each batch."""
