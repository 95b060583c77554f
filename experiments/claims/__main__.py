"""Command line of the claims."""

import argparse
import sys

from experiments.claims.page import write_page
from mtp_jax.validate import ConfigError


def main(args: list[str] | None = None) -> None:
    """Write the page. A file that is not one of results ends the process with status 2, as in `mtp-jax`."""
    parser = argparse.ArgumentParser(
        "python -m experiments.claims", description="The claims of the paper, with verdicts, evidence and figures."
    )
    parser.add_argument("results", nargs="+", help="results files of `mtp-jax sweep`")
    parser.add_argument("--out", required=True, help="the directory of the page; files of the same names are replaced")
    options = parser.parse_args(args)
    try:
        print(f"Wrote {write_page(options.results, options.out)}")
    except ConfigError as error:
        print(f"experiments.claims: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
