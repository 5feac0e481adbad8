"""Reads run folders; starts without torch."""
