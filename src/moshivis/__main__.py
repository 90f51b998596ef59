"""`python -m moshivis`: the command line."""

import sys

from moshivis.cli import main

if __name__ == "__main__":
    sys.exit(main())
