"""Figures about algorithms and finished runs: the commands `sluice analyze`."""
