"""A fitted guide and what it takes to use it: one or a mixture, saved and loaded."""
