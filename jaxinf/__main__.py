"""`python -m jaxinf` is the command `jaxinf`."""

import sys

from jaxinf.cli import main

if __name__ == "__main__":
    sys.exit(main())
