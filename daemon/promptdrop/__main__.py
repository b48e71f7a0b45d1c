"""`python -m promptdrop` is the command `promptdrop`."""

import sys

from promptdrop.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
