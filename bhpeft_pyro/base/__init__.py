"""The ground that every part of the package stands on: no models and no Pyro programs."""
