"""``python -m quietstar``."""

import sys

from quietstar.cli.app import main

sys.exit(main())
