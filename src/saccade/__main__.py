"""`python -m saccade`: the command line."""

import sys

from saccade.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
