"""Comparison with published implementations, called as they are; `make parity` runs it in an environment that has them."""
