"""What is installed here: packages by their metadata, runtimes by importing them in a process of their own.

Nothing heavy is imported into this process: a wheel made for another processor ends the process that imports it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata

PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
    "openvino": ("openvino",),
    "tflite": ("ai-edge-litert", "tflite-runtime"),
    "tensorrt": ("tensorrt",),
}
"""Packages that a runtime may come from; of several that are there, the first that loads is used."""

_LOADING = {
    "onnxruntime": "import onnxruntime as r; v = r.__version__; d = r.get_available_providers()",
    "openvino": "import openvino as r; v = r.get_version(); d = r.Core().available_devices",
    "tflite": (
        "try:\n import ai_edge_litert as r; from ai_edge_litert import interpreter\n"
        "except ImportError as e:\n"
        " try: import tflite_runtime as r; from tflite_runtime import interpreter\n"
        " except ModuleNotFoundError: raise e from None\n"
        "interpreter.Interpreter; v = r.__version__; d = ['CPU']"
    ),
    # the builder is what needs a GPU that works
    "tensorrt": "import tensorrt as r; r.Builder(r.Logger(r.Logger.ERROR)); v = r.__version__; d = ['cuda:0']",
    "numpy": "import numpy as r; r.zeros(8) @ r.ones(8); v = r.__version__; d = []",
    "pillow": "from PIL import Image as r, __version__ as v; d = []",
}
_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Loaded:
    """How an import went: version and module, the devices or providers it offers, or why it failed."""

    version: str = ""
    devices: tuple[str, ...] = ()
    failure: str = ""
    module: str = ""


def version(package: str) -> str:
    """Version of an installed package; empty if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def load(what: str) -> Loaded:
    """Import a runtime, ``numpy`` or ``pillow`` in a process of its own and ask what it offers."""
    code = f"{_LOADING[what]}\nimport json; print(); print(json.dumps([str(v), r.__name__, list(d)]))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Loaded(failure=f"importing it took longer than {_TIMEOUT_S} s")
    if done.returncode < 0:
        return Loaded(failure=f"importing it ends the process ({_signal(-done.returncode)})")
    lines = done.stdout.splitlines() if done.returncode == 0 else done.stderr.strip().splitlines()
    last = lines[-1] if lines else f"exit code {done.returncode}"
    if done.returncode:
        return Loaded(failure=last[:200])
    found, module, devices = json.loads(last)
    return Loaded(found, tuple(devices), module=module)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
