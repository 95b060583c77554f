"""Questions that are asked of several runs: what varies, what is measured of each, and how they are gone through."""
