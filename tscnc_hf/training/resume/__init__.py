"""A Trainer that loses nothing: whole checkpoints, exact resume."""
