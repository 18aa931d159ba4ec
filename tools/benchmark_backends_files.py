"""The files that `benchmark_backends.py` measures: ours from bundles, the others' from their own quantizers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import rowcol_edge
from benchmark_models import Model
from benchmark_peers import PEERS, Peer
from rowcol_edge import config, evaluation, job
from rowcol_edge.backends import load_backend
from rowcol_edge.cache import Cache
from rowcol_edge.datasets import Feeds, load
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.digests import sha256_file
from rowcol_edge.device.manifest import TensorSpec
from rowcol_edge.device.runtimes import RuntimeOptions, load_runtime
from rowcol_edge.errors import RowcolError
from rowcol_edge.evaluation import Judged
from rowcol_edge.export.parity import torch_run
from rowcol_edge.targets import RuntimeSpec, Target

_PEER_SECONDS = 900.0
_FIDELITY_SAMPLES = 16
_MAKER = Path(__file__).with_name("benchmark_peers.py").resolve()

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class File:
    """An artifact and what is known of it before it is measured; with an ``error`` there is none.

    ``peer`` is true of what another maker's quantizer made of the dense model. ``inputs`` is an ``.npz`` with real
    inputs by the artifact's own names, ``batch`` how many rows of each it takes.
    """

    name: str
    peer: bool
    precision: str
    error: str = ""
    path: str = ""
    inputs: str = ""
    batch: dict[str, int] = field(default_factory=dict)
    sha256: str = ""
    size_bytes: int = 0
    parameters: int = 0
    selection_drop_pp: float | None = None
    quality: dict[str, Any] = field(default_factory=dict)
    fidelity: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def files(model: Model, target: Target, spec: RuntimeSpec, work: Path, progress: job.Progress) -> list[File]:
    """Every file of a model for a runtime; what is there from an earlier run is kept."""
    judge = Judge(model, target, spec, progress)
    found: list[File] = []
    precisions = [p for p in spec.precisions if p in load_backend(spec.name).precisions]
    for precision in precisions:
        found += _ours(model, target, spec, precision, work / "bundles" / model.name / precision, judge)
    dense = next((file.parameters for file in found if file.name == "dense@fp32"), 0)
    for peer in PEERS.values():
        if peer.runtime == spec.name:
            progress(f"{peer.name} of {model.name}", 0, 1)
            found.append(_peer(model, peer, work / "peers" / model.name, judge, dense))
    return found


class Judge:
    """Quality on the test split where there are labels, and how near outputs are to the dense PyTorch model's.

    Other makers' tools rename inputs and outputs: they are told apart by name, else by shape and order.
    """

    def __init__(self, model: Model, target: Target, spec: RuntimeSpec, progress: job.Progress) -> None:
        self.options = config.make({**model.options, "target": target.name, "runtime": spec.name})
        self.job = job.prepare(self.options, progress=progress, cache=Cache.of_user())
        self.runtime = RuntimeOptions(target.threads, spec.providers, spec.properties)
        self.name = spec.name
        self.progress = progress
        original = torch_run(self.job.model.module)
        # without labels nothing is chosen, and a split of its own is read just for this
        unseen = self.job.test or load(_beside(self.options.calib), "test", self.job.model.inputs)
        assert unseen is not None
        self.samples: Feeds = unseen.spread(_FIDELITY_SAMPLES)
        self.expected = original(self.samples)
        self.reference: Judged | None = None
        self.test: Judged | None = None
        if self.job.metric is not None and self.job.selection is not None and self.job.test is not None:
            predicted = evaluation.predict(original, self.job.selection, self.job, progress, source="original")
            self.reference = evaluation.judge_selection(predicted, self.job)
            predicted = evaluation.predict(original, self.job.test, self.job, progress, source="original")
            self.test = evaluation.judge(predicted, self.job, self.reference.threshold)

    def fidelity(self, path: Path) -> dict[str, float]:
        """Of the last output, which of MiniLM's two is the embedding: mean cosine and relative error."""
        name, expected = list(self.expected.items())[-1]
        with self._opened(path) as run:
            got = run(self.samples)[name]
        a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (expected, got))
        cosine = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
        error = np.linalg.norm(a - b) / np.linalg.norm(a)
        return {"cosine": float(cosine.mean()), "relative_error": float(error), "n": len(a)}

    def quality(self, path: Path, label: str) -> dict[str, Any]:
        """As the manifest says it of an arm: the threshold from the selection split, the value on the test split."""
        if self.reference is None or self.job.selection is None or self.job.test is None:
            return {}
        with self._opened(path) as run:
            predicted = evaluation.predict(run, self.job.selection, self.job, self.progress, f"judge {label}")
            selection = evaluation.judge_selection(predicted, self.job, self.reference)
            predicted = evaluation.predict(run, self.job.test, self.job, self.progress, f"judge {label}")
        return evaluation.quality_record(
            self.job, evaluation.judge(predicted, self.job, selection.threshold), self.test
        )

    def feeds(self, path: Path) -> Feeds:
        """Real inputs by the artifact's own names."""
        return _fed(self._inputs(path), self.samples)

    def _inputs(self, path: Path) -> tuple[TensorSpec, ...]:
        with load_runtime(self.name).open(path, self.runtime) as session:
            return session.inputs

    @contextmanager
    def _opened(self, path: Path) -> Iterator[evaluation.Run]:
        shapes = [(name, array.shape[1:]) for name, array in self.expected.items()]
        inputs = self._inputs(path)
        with evaluation.opened(path, self.name, self.runtime) as run:
            yield lambda feeds: dict(_matched(shapes, run(_fed(inputs, feeds))))


def _fed(inputs: Sequence[TensorSpec], samples: Arrays) -> Feeds:
    """The samples by a file's own names, whole numbers in its own type: litert-torch narrows token ids to int32."""
    arrays = dict(_matched([(spec.name, spec.shape[1:]) for spec in inputs], samples))
    for spec in inputs:
        if arrays[spec.name].dtype.kind == "i":
            arrays[spec.name] = arrays[spec.name].astype(spec.dtype)
    return arrays


def _beside(callable_: str | None) -> str | None:
    """The callable ``test`` in the file of the calibration data."""
    return None if callable_ is None else f"{callable_.rpartition(':')[0]}:test"


def _matched(wanted: list[tuple[str, tuple[int | None, ...]]], arrays: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    """For each wanted name the array of that name, else the first one left that has the shape."""
    left = dict(arrays)
    for name, shape in wanted:
        fits = [n for n, array in left.items() if array.shape[1:] == tuple(shape)]
        yield name, left.pop(name if name in left else fits[0] if fits else next(iter(left)))


def _ours(model: Model, target: Target, spec: RuntimeSpec, precision: str, out: Path, judge: Judge) -> list[File]:
    try:
        built = rowcol_edge.build(
            **model.options, target=target.name, runtime=spec.name, precision=precision, zip=False, out=out,
            progress=judge.progress,
        )[0]  # fmt: skip
    except RowcolError as e:  # a precision that is not for this kind of network, or over the budget
        return [File(f"{v}@{precision}", False, precision, error=str(e)) for v in ("factored", "dense")]
    with Bundle.open(built.path) as bundle:
        manifest = bundle.manifest
        found = []
        for arm in manifest.arms:
            if arm.precision != precision:
                continue  # dense@fp32 comes with the bundle of fp32
            path = bundle.artifact(arm)
            found.append(
                File(
                    arm.name, False, precision,
                    path=str(path.resolve()),
                    inputs=str((bundle.root / manifest.golden_inputs).resolve()),
                    batch={s.name: (s.shape[0] or 1) if s.shape else 0 for s in manifest.inputs},
                    sha256=next(entry.sha256 for entry in manifest.files if entry.path == arm.artifact),
                    size_bytes=arm.size_bytes,
                    parameters=arm.parameters,
                    selection_drop_pp=arm.quality.get("selection", {}).get("drop_pp"),
                    quality=dict(arm.quality.get("test", {})),
                    fidelity=judge.fidelity(path),
                )
            )  # fmt: skip
    return found


def _peer(model: Model, peer: Peer, folder: Path, judge: Judge, parameters: int) -> File:
    """Have a peer's file made in a process of its own: it may crash, and then that is its cell."""
    spec = {
        "peer": peer.name, "model": judge.options.model, "weights": judge.options.weights,
        "digest": judge.job.model.digest, "data": judge.job.calibration.digest,
        "transformer": model.transformer, "tools": job.tool_versions(), "source": sha256_file(_MAKER)[0],
        "calibration": str((folder / "calibration.npz").resolve()),
        "out": str((folder / f"{peer.name.replace('.', '-')}{peer.suffix}").resolve()),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    told, out = folder / f"{peer.name}.json", Path(str(spec["out"]))
    known = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    if known.get("spec") != spec:
        told.unlink(missing_ok=True)
        out.unlink(missing_ok=True)
        parts = list(judge.job.calibration.batches())
        np.savez(
            Path(str(spec["calibration"])), **{name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        )
        known = {"spec": spec, "error": _made(spec, folder)}
    if known["error"]:
        file = File(peer.name, True, peer.precision, error=known["error"])
    elif "file" in known:
        file = File(**known["file"])
    else:
        file = _described(peer, out, judge, parameters)
    told.write_text(json.dumps({**known, "file": file.to_dict()} if not file.error else known), encoding="utf-8")
    return file


def _made(spec: Mapping[str, Any], folder: Path) -> str:
    """Why the peer failed; empty if it did not."""
    asked = folder / f"{spec['peer']}.spec.json"
    asked.write_text(json.dumps(spec), encoding="utf-8")
    command = [sys.executable, str(_MAKER), str(asked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PEER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {_PEER_SECONDS:.0f} s"
    if done.returncode == 0:
        return "" if Path(spec["out"]).is_file() else "it wrote no file"
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    return lines[-1][:200]


def _described(peer: Peer, path: Path, judge: Judge, parameters: int) -> File:
    try:
        feeds = judge.feeds(path)
        inputs = path.with_suffix(".inputs.npz")
        np.savez(inputs, **feeds)
        quality, fidelity = judge.quality(path, peer.name), judge.fidelity(path)
    except RowcolError as e:  # a file that its own runtime does not run
        return File(peer.name, True, peer.precision, error=str(e)[:200])
    own = [path, path.with_suffix(".bin")] if peer.suffix == ".xml" else [path]
    digests = [sha256_file(file)[0] for file in own]
    return File(
        peer.name, True, peer.precision,
        path=str(path), inputs=str(inputs), batch=dict.fromkeys(feeds, 1),
        sha256="".join(digests)[:64], size_bytes=sum(file.stat().st_size for file in own),
        parameters=parameters, quality=quality, fidelity=fidelity,
    )  # fmt: skip
