"""The linearised Laplace approximation: guide, curvature, covariance, choice of the width."""
