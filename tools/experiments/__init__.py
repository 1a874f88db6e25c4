"""Measurements behind the package's claims, each a command of its own."""
