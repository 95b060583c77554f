"""Losses of a head: the tiled log-likelihood of a mixture of products, and load balancing."""
