"""`python -m openunlearn_nb` is `openunlearn`."""

import sys

from openunlearn_nb.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
