"""``python -m rowcol_edge.device verify|run|profile BUNDLE``."""

from __future__ import annotations

import sys

from .main import main

sys.exit(main(sys.argv[1:]))
