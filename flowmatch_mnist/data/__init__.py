"""The data modules. They also draw the noise of each batch."""
