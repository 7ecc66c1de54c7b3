"""Errors, files, devices, random streams and command-line choices. This folder imports nothing from the rest of the package."""
