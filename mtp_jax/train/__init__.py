"""Training: the step (pure), optimizer, warm start, the loop with its I/O, evaluation, costs and loggers."""
