"""``python -m quantjax``, the command line."""

import sys

from quantjax.cli.command import main

sys.exit(main())
