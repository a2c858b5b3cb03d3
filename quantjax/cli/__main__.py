"""``python -m quantjax.cli``."""

import sys

from quantjax.cli.command import main

sys.exit(main())
