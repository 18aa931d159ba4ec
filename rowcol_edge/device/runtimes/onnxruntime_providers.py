"""Execution providers of ONNX Runtime and their options, from what a target says.

A target lists providers in the order they are tried, and gives one an option as the property ``PROVIDER.OPTION``, such
as ``TensorrtExecutionProvider.trt_fp16_enable = "1"``; every other property is a session configuration entry, or one of
the switches of :mod:`.memory`. Options are those of https://onnxruntime.ai/docs/execution-providers/. Where a target
says nothing else:

- TensorrtExecutionProvider keeps engines and timings in the folder of `engine_cache`: otherwise every process builds
  them. It names an engine after names and versions and never after weights, so each artifact gets a folder of its own;
  timings serve them all.
- XnnpackExecutionProvider has threads of its own; it gets those of the session, which then keeps one that does not
  spin, as its documentation recommends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...errors import BundleError, did_you_mean
from ..digests import sha256_file
from .base import RuntimeOptions
from .engine_cache import EngineCache, warn_unkept
from .memory import ARENA, OFF, ON, PATTERN

CPU = "CPUExecutionProvider"
_TENSORRT, _XNNPACK = "TensorrtExecutionProvider", "XnnpackExecutionProvider"
_SUFFIX = "ExecutionProvider"


@dataclass(frozen=True)
class Providers:
    """``options`` by provider, in order; ``entries`` of the session's configuration; ``threads`` of the session;
    ``switches`` of its memory."""

    options: dict[str, dict[str, str]]
    threads: int
    entries: dict[str, str] = field(default_factory=dict)
    switches: dict[str, bool] = field(default_factory=dict)

    @property
    def accelerators(self) -> list[str]:
        return [name for name in self.options if name != CPU]


def providers(options: RuntimeOptions, artifact: Path) -> Providers:
    """What to ask for, to open the artifact. BundleError: an option for a provider that is not listed, or a switch that
    is neither on nor off."""
    chosen: dict[str, dict[str, str]] = {name: {} for name in options.providers or (CPU,)}
    entries: dict[str, str] = {}
    switches: dict[str, bool] = {}
    for key, value in options.properties.items():
        name, _, option = key.partition(".")
        if key in (ARENA, PATTERN):
            if value not in (ON, OFF):
                raise BundleError(f"property {key}", expected=f"{ON} or {OFF}", got=repr(value))
            switches[key] = value == ON
        elif not name.endswith(_SUFFIX):
            entries[key] = value
        elif name in chosen and option:
            chosen[name][option] = value
        else:
            hint = did_you_mean(name, chosen) if option else "an option is written PROVIDER.OPTION"
            raise BundleError(f"property {key}", expected=f"an option of {', '.join(chosen)}", got=name, hint=hint)
    if CPU not in chosen:
        # nodes that the asked-for provider does not take would run on the CPU without a word
        entries.setdefault("session.disable_cpu_ep_fallback", "1")
    threads = options.threads
    if _TENSORRT in chosen:
        chosen[_TENSORRT] = _cached(artifact) | chosen[_TENSORRT]
    if _XNNPACK in chosen:
        if threads:
            chosen[_XNNPACK].setdefault("intra_op_num_threads", str(threads))
        entries.setdefault("session.intra_op.allow_spinning", "0")
        threads = 1
    return Providers(chosen, threads, entries, switches)


def _cached(artifact: Path) -> dict[str, str]:
    """Nothing, after a warning, where the folders cannot be made; the provider itself makes one level only."""
    try:
        engines = EngineCache().subfolder(f"onnxruntime/{sha256_file(artifact)[0][:16]}")
    except OSError as e:
        warn_unkept(e)
        return {}
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(engines),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(engines.parent),
    }
