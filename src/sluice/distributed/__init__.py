"""Processes on the machines of a Ray cluster."""

import os
import secrets

# Read when ray is imported, or once later.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if os.path.exists(os.path.expanduser("~/.ray/auth_token")):  # then `ray start` asks for it too
    os.environ.setdefault("RAY_AUTH_MODE", "token")
elif "RAY_AUTH_TOKEN_PATH" not in os.environ:  # of a cluster of our own; else Ray leaves one in the user's home
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
