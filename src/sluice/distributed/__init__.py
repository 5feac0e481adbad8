"""Processes on the machines of a Ray cluster."""

import os

# Read when ray is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if os.path.exists(os.path.expanduser("~/.ray/auth_token")):  # then `ray start` asks for it too
    os.environ.setdefault("RAY_AUTH_MODE", "token")
