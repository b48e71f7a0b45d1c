"""The command `promptdrop`, which is `python -m promptdrop`, too."""

import sys

from promptdrop import signals

signals.note()  # before the imports, which take a while


def main() -> int:
    """Run one command and return its exit status."""
    from promptdrop.cli import main

    return main.main()


if __name__ == "__main__":
    sys.exit(main())
