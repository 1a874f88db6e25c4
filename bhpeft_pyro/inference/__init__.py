"""Inference: the loss, steps and the loop over them, the width of `laplace`, and prediction."""
