"""``python -m patchkit`` is the command ``patchkit``."""

import sys

from patchkit.commands import main

sys.exit(main())
