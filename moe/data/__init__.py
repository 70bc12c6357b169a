"""Where training text comes from, and what happens to it before a model reads it."""
