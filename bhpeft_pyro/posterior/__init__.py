"""A fitted guide and everything needed to use it: one or a mixture, saved and loaded."""
