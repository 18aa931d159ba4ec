"""On which execution providers the nodes of a model run: a provider may be there and take none of them.

onnxruntime 1.24 and newer tell, where the session's configuration asks for it. With an older one, such as a Jetson's,
it stands in the profile of a run, so one is made on zeros before the profile is closed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..manifest import TensorSpec

_TELL = "get_provider_graph_assignment_info"


@contextmanager
def recording(settings: Any) -> Iterator[None]:
    """Inside it, a session is made with the settings and asked by `used`."""
    if hasattr(ort.InferenceSession, _TELL):
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        yield
        return
    with tempfile.TemporaryDirectory(prefix="rowcol-placement-") as folder:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / "profile")
        yield


def used(session: Any, inputs: tuple[TensorSpec, ...]) -> set[str]:
    """Names of the providers that took nodes; after it the session no longer writes a profile."""
    if hasattr(ort.InferenceSession, _TELL):
        return {part.ep_name for part in getattr(session, _TELL)()}
    zeros = {spec.name: np.zeros([1 if size is None else size for size in spec.shape], spec.dtype) for spec in inputs}
    try:
        session.run(None, zeros)
    finally:
        profile = Path(session.end_profiling())
    events = json.loads(profile.read_text(encoding="utf-8"))
    return {event["args"]["provider"] for event in events if "provider" in event.get("args", {})}
