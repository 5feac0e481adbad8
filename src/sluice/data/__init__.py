"""From data files to prompts, and from trajectories to batches."""
