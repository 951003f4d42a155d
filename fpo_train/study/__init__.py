"""Penalties over seeds from the same starts, and what can be told apart: `study` runs and tests, `figures` draws."""
