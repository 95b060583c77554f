"""Losses of a head: log-likelihood of a mixture of products, in tiles; against the target's law; load balancing."""
