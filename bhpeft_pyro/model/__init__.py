"""The network with its random PEFT weights, its likelihoods, and both as a Pyro model."""
