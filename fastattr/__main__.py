"""`python -m fastattr` is the command line."""

import sys

from fastattr.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
