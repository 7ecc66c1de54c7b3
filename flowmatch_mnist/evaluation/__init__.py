"""Measures of how close samples are to real data."""
