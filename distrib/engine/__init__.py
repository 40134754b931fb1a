"""The training step, evaluation, and the state that both work on. Nothing here reads the whole configuration."""
