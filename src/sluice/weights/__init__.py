"""How the trainer's weights reach an engine."""
