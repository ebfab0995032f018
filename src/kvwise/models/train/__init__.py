"""Trains the built-in model `builtin:recall`: `python -m kvwise.models.train`."""
