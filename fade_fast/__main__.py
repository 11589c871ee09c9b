"""`python -m fade_fast`: the command `fade`."""

import sys

from .cli.command import main

if __name__ == "__main__":
    sys.exit(main())
