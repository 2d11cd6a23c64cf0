"""``python -m quietstar.cli``."""

import sys

from quietstar.cli.app import main

sys.exit(main())
