"""Predictions: draws of the weights, and passes of the network under them."""
