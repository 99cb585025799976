"""`python -m fa3_cute`: see fa3_cute/cli."""

import sys

from .cli import main

if __name__ == "__main__":  # the compile workers import this module again, under another name
    sys.exit(main())
