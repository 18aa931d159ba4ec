"""The device side: opens, checks, runs and measures a bundle with numpy and one runtime, on Python 3.10 or newer.

    from rowcol_edge.device import Predictor

    with Predictor("bundle") as predictor:
        print(predictor.predict("part.png").label)

Names load on first use, so that importing one module of this package costs no more than that module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import Bundle as Bundle
    from .decode import Prediction as Prediction
    from .manifest import Manifest as Manifest
    from .predictor import Predictor as Predictor
    from .preprocess import Preprocess as Preprocess

_HOMES = {
    "Bundle": "bundle",
    "Manifest": "manifest",
    "Prediction": "decode",
    "Predictor": "predictor",
    "Preprocess": "preprocess",
}
__all__ = ["Bundle", "Manifest", "Prediction", "Predictor", "Preprocess"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
