"""Benchmarks: decoding, the loss, and the training step. Each returns the object that its command prints last.

What is compared runs in one process, interleaved, after compilation; figures are medians over repetitions, and a ratio
is the median of the ratios of each repetition, so that a machine whose speed drifts slows both sides.
"""
