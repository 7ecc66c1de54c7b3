"""Errors, files, streams of randomness, and the choices of command lines: what knows nothing of the rest."""
