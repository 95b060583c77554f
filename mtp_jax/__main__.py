"""`python -m mtp_jax`, the same as `mtp-jax`."""

from mtp_jax.cli import main

if __name__ == "__main__":
    main()
