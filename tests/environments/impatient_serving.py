"""The process of an environment that tells sooner that its event loop does not run."""

from sluice.environments import serving

serving.BLOCKED_S = 0.5
serve = serving.serve
