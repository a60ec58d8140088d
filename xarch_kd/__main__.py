"""`python -m xarch_kd` is `xarch-kd`."""

import sys

from xarch_kd.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
