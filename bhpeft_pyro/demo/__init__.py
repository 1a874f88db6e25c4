"""A demonstration that needs no model hub: `python -m bhpeft_pyro.demo`."""
