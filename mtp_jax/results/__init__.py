"""From the results files of sweeps to a page: comparisons, claims and figures. Nothing here needs JAX."""
