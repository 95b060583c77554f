"""Sweeps: what varies between runs, what is measured of each, going through them, and a page of what they found."""
