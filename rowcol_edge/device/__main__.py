"""``python -m rowcol_edge.device verify|run|profile BUNDLE``."""

from __future__ import annotations

import sys

from .main import main, sigterm_as_ctrl_c

with sigterm_as_ctrl_c():
    sys.exit(main(sys.argv[1:]))
