"""``rowcol-edge-device.pyz``: the device side in one file that any Python 3.10 or newer runs."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

DEVICE_ARCHIVE_NAME = "rowcol-edge-device.pyz"

_PACKAGE = Path(__file__).parent
_SHEBANG = b"#!/usr/bin/env python3\n"
_INIT = '"""The device side of rowcol_edge, packed for a board."""\n'
_MAIN = '''"""Runs the command line of the device side."""

import sys

if sys.version_info < (3, 10):
    sys.stderr.write("error: Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "\\n")
    sys.exit(2)

try:
    from rowcol_edge.device.main import main, sigterm_as_ctrl_c
except KeyboardInterrupt:  # main catches the later ones
    sys.stderr.write("error: interrupted\\n")
    sys.exit(130)

with sigterm_as_ctrl_c():
    sys.exit(main())
'''


def device_archive_bytes() -> bytes:
    """The archive's content; the same sources give the same bytes.

    It holds ``rowcol_edge.errors`` and ``rowcol_edge.device``, under an ``__init__`` of its own because the real one is
    the build side's.
    """
    sources = {"__main__.py": _MAIN, "rowcol_edge/__init__.py": _INIT}
    for path in [_PACKAGE / "errors.py", *(_PACKAGE / "device").rglob("*.py")]:
        sources[f"rowcol_edge/{path.relative_to(_PACKAGE).as_posix()}"] = path.read_text(encoding="utf-8")
    buffer = io.BytesIO(_SHEBANG)
    buffer.seek(0, io.SEEK_END)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, text in sorted(sources.items()):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, whatever the build machine is
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, text, zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()
