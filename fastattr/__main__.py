"""`python -m fastattr` is the command line."""

import sys

from fastattr.cli import main

if __name__ == "__main__":
    sys.exit(main())
