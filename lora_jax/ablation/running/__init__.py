"""A grid runs: which arms train together, how, where, and what is told meanwhile."""
