"""rowcol_edge puts neural networks on embedded boards.

    import rowcol_edge

    built = rowcol_edge.build("sample:elpv-resnet18", target="raspberry-pi-5", budget="drop<=0.5pp")
    profile = rowcol_edge.profile(built[0].path)

Importing this package imports neither torch nor onnx; each name below loads what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import (
        build,
        compare,
        compare_profiles,
        data,
        doctor,
        factor,
        gate,
        inspect,
        profile,
        verify,
        write_report,
    )
    from .device.bundle import Bundle
    from .device.predictor import Predictor
    from .errors import RowcolError

__all__ = [
    "build", "compare", "compare_profiles", "data", "doctor", "factor", "gate", "inspect", "profile", "verify",
    "write_report",
    "Bundle", "Predictor", "RowcolError",
]  # fmt: skip

_WHERE = {
    "Bundle": "device.bundle",
    "Predictor": "device.predictor",
    "RowcolError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE.get(name, 'api')}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
