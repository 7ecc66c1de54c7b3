"""How near samples are to real data."""
