"""`python -m promptdrop` is the command `promptdrop`."""

import sys

from promptdrop.cli.parser import main

if __name__ == "__main__":
    sys.exit(main())
