"""sluice: reinforcement-learning post-training for language models."""

import os

# OpenMP threads that spin while they wait make two threads slower than one as soon as the machine has a busy
# neighbour. libgomp reads this once, when torch loads it, so it has to be said before anything imports torch.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
