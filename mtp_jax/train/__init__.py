"""Training: state and step (pure), optimizer, the loop with its I/O, metrics and loggers."""
