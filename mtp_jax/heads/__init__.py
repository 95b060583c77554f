"""Distributions over the next W tokens: one protocol, one file per family, one line in the registry."""
