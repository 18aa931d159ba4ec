"""``manifest.json``: what a bundle holds, for which board, and what was measured when it was built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ..errors import BundleError, DataError, did_you_mean
from .fields import Fields, describe, parse_json

SCHEMA = 3
READABLE = (2, 3)
"""Version of the manifest's format, and those that are read. History:

1 – first one: arms, golden inputs and outputs, sha256 and size of every file.
2 – an arm says how it was checked and which layers kept their precision; ``frames``; further precisions.
3 – ``activation_bytes`` of an arm (None in what was read from a 2).
"""

CONTRACTS = ("classify", "segment", "anomaly_map", "detect", "embed")
VARIANTS = ("factored", "dense")
PRECISIONS = ("fp32", "fp16", "int8", "int8-io", "int8-dynamic", "int8-weights", "int4-weights")
"""``int8`` has its ranges from calibration, ``int8-io`` takes and gives int8 as well, ``int8-dynamic`` finds the ranges
of activations at each inference; in ``int8-weights`` and ``int4-weights`` only stored weights are narrow."""
RUN, GRAPH_CHECKED = "run", "graph-checked, not run"
CHECKS = (RUN, GRAPH_CHECKED)
"""How the build knows that an arm works: it ran on the runtime and kind of device it is for, or only its graph was
checked, and another runtime or the CPU stood in for it."""
DTYPES = (
    "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool",
)  # fmt: skip
MANIFEST_NAME = "manifest.json"
PROFILES_FOLDER = "profiles"
PLAN_NAME = "plan.toml"
"""The factor plan, in bundles that have factored arms."""

_QUALITY_NUMBERS = ("drop_pp", "ci_low_pp", "ci_high_pp")
_QUALITY_COUNTS = ("flips", "flips_bad")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output. ``shape`` holds None where the size is free (a dynamic batch); ``dtype`` is numpy's name."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the bundle; ``path`` is relative to the bundle and POSIX."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ArmEntry:
    """A variant of the model at a precision.

    ``weight_types`` counts the bytes of the stored weights by numpy dtype. ``tolerance`` is the relative error
    ``‖a-b‖₂/‖b‖₂`` that another machine may show against the golden outputs. ``quality`` holds, by split
    (``selection``, ``test``), what was measured at the build. ``threshold`` is the decision threshold on the positive
    label's probability (classify, segment) or on the score (anomaly_map, detect). ``checked`` is one of ``CHECKS``.
    ``kept_float`` names layers that stay in higher precision, because quantizing them hurt. ``activation_bytes`` is
    the most that activations of one inference take if the file's operators run one by one; None where it does not tell.
    """

    name: str
    variant: str
    precision: str
    artifact: str
    parameters: int
    size_bytes: int
    weight_types: dict[str, int]
    tolerance: float
    quality: dict[str, Any] = field(default_factory=dict)
    threshold: float | None = None
    plan_digest: str | None = None
    checked: str = RUN
    kept_float: tuple[str, ...] = ()
    activation_bytes: int | None = None

    def owns(self, path: str) -> bool:
        """Is a file of the bundle part of this arm: its artifact, or weights beside it (``x.bin``, ``x.onnx.data``)?"""
        return path == self.artifact or path.startswith(f"{self.artifact.rpartition('.')[0]}.")


@dataclass(frozen=True, slots=True)
class RuntimeEntry:
    """The runtime the artifacts were compiled for, and the oldest version of it that is promised to open them.

    ``opset`` and ``ir_version`` are those of the ONNX file that is opened, or that an engine is built from; None where
    no ONNX is read. ``properties`` are settings in the runtime's own words.
    """

    name: str
    oldest: str
    opset: int | None
    ir_version: int | None
    threads: int
    install: str
    providers: tuple[str, ...] = ()
    properties: dict[str, str] = field(default_factory=dict)

    @property
    def install_line(self) -> str:
        """``install`` as one line for a shell, without its comments."""
        return " && ".join(line for line in self.install.splitlines() if not line.startswith("#"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The whole manifest. ``files`` lists every file of the bundle but the manifest itself and what lies in profiles/.

    ``golden_inputs`` (an ``.npz``) holds one array an input, its samples stacked along the first axis;
    ``golden_outputs`` gives each arm the ``.npz`` with the outputs that its artifact gave for them at the build.
    With ``frames`` the artifacts take camera frames, uint8 (N, height, width, channels): ``preprocess`` then only says
    how a picture becomes a frame of that size, its scale, mean and std are part of the graph.
    """

    schema: int = SCHEMA
    name: str
    target: dict[str, Any]
    runtime: RuntimeEntry
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocess: dict[str, Any] | None
    frames: bool = False
    contract: str
    labels: tuple[str, ...] = ()
    positive: str | None = None
    metric: str | None = None
    default_arm: str
    arms: tuple[ArmEntry, ...]
    golden_inputs: str = "golden/inputs.npz"
    golden_outputs: dict[str, str]
    files: tuple[FileEntry, ...] = ()
    tool_versions: dict[str, str] = field(default_factory=dict)
    created: str
    build: dict[str, Any] = field(default_factory=dict)

    def arm(self, name: str | None = None) -> ArmEntry:
        """The arm of that name (None: the default one); BundleError with the nearest names if there is none."""
        wanted = self.default_arm if name is None else name
        for arm in self.arms:
            if arm.name == wanted:
                return arm
        names = [arm.name for arm in self.arms]
        raise BundleError(
            "arm",
            expected=f"one of {', '.join(names)}",
            got=repr(wanted),
            hint=did_you_mean(wanted, names),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        try:
            return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        except (TypeError, ValueError) as e:
            raise BundleError(
                "manifest", expected="values JSON can hold (finite numbers, text, lists, objects)", got=str(e)
            ) from e

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        return cls.from_dict(parse_json(text, "manifest"))

    @classmethod
    def from_dict(cls, values: object) -> Manifest:
        """Strict: BundleError names the first key that is unknown, missing or of the wrong kind."""
        fields = Fields(values, "manifest")
        # before anything else, so that another format is refused by its version and not by some key
        schema = fields.integer("schema")
        check_schema(schema)
        manifest = cls(
            schema=SCHEMA,
            name=fields.text("name"),
            target=fields.table("target"),
            runtime=runtime_entry(fields.child("runtime")),
            inputs=tuple(_tensor(f) for f in fields.children("inputs")),
            outputs=tuple(_tensor(f) for f in fields.children("outputs")),
            preprocess=fields.optional_table("preprocess"),
            frames=fields.flag("frames"),
            contract=fields.text("contract", CONTRACTS),
            labels=fields.texts("labels"),
            positive=fields.optional_text("positive"),
            metric=fields.optional_text("metric"),
            default_arm=fields.text("default_arm"),
            arms=tuple(_arm(f, schema) for f in fields.children("arms")),
            golden_inputs=_path(fields, "golden_inputs"),
            golden_outputs=_paths(fields, "golden_outputs"),
            files=tuple(_file(f) for f in fields.children("files")),
            tool_versions=fields.text_table("tool_versions"),
            created=fields.text("created"),
            build=fields.table("build"),
        )
        fields.done()
        _check(manifest)
        return manifest


def check_schema(schema: int) -> None:
    """BundleError for a manifest that this version does not read."""
    if schema not in READABLE:
        hint = "use the rowcol-edge-device.pyz inside the bundle" if schema > SCHEMA else "build the bundle again"
        expected = " or ".join(map(str, READABLE))
        raise BundleError("manifest.schema", expected=expected, got=str(schema), hint=hint)


def safe_path(text: str) -> bool:
    """Is this a relative POSIX path that stays inside its folder on every system?"""
    path = PurePosixPath(text)
    return (
        bool(path.parts)
        and str(path) == text
        and not path.is_absolute()
        and not {".", ".."} & set(path.parts)
        and not any(c in '\\:*?"<>|' or ord(c) < 32 or ord(c) == 127 for c in text)
    )


def _path(fields: Fields, key: str) -> str:
    path = fields.text(key)
    if not safe_path(path):
        raise fields.fail(key, "a relative path inside the bundle", repr(path))
    return path


def _paths(fields: Fields, key: str) -> dict[str, str]:
    table = fields.child(key)
    paths = {name: _path(table, name) for name in fields.table(key)}
    table.done()
    return paths


def _tensor(fields: Fields) -> TensorSpec:
    shape = []
    for i, size in enumerate(fields.items("shape")):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 0):
            raise fields.fail(f"shape[{i}]", "a size ≥ 0, or null where it is free", describe(size))
        shape.append(size)
    spec = TensorSpec(name=fields.text("name"), shape=tuple(shape), dtype=fields.text("dtype", DTYPES))
    fields.done()
    return spec


def _file(fields: Fields) -> FileEntry:
    entry = FileEntry(path=_path(fields, "path"), sha256=fields.text("sha256"), size_bytes=fields.integer("size_bytes"))
    if len(entry.sha256) != 64 or set(entry.sha256) - set("0123456789abcdef"):
        raise fields.fail("sha256", "64 lower-case hex digits", repr(entry.sha256))
    fields.done()
    return entry


def runtime_entry(fields: Fields) -> RuntimeEntry:
    """What the key ``runtime`` of a manifest holds."""
    entry = RuntimeEntry(
        name=fields.text("name"),
        oldest=fields.text("oldest"),
        opset=fields.optional_integer("opset", 1),
        ir_version=fields.optional_integer("ir_version", 1),
        threads=fields.integer("threads"),
        install=fields.text("install"),
        providers=fields.texts("providers"),
        properties=fields.text_table("properties"),
    )
    fields.done()
    return entry


def _arm(fields: Fields, schema: int) -> ArmEntry:
    weight_types = fields.child("weight_types")
    arm = ArmEntry(
        name=fields.text("name"),
        variant=fields.text("variant", VARIANTS),
        precision=fields.text("precision", PRECISIONS),
        artifact=_path(fields, "artifact"),
        parameters=fields.integer("parameters"),
        size_bytes=fields.integer("size_bytes"),
        weight_types={name: weight_types.integer(name) for name in fields.table("weight_types")},
        tolerance=fields.number("tolerance"),
        quality=_quality(fields),
        threshold=fields.optional_number("threshold"),
        plan_digest=fields.optional_text("plan_digest"),
        checked=fields.text("checked", CHECKS),
        kept_float=fields.texts("kept_float"),
        activation_bytes=fields.optional_integer("activation_bytes") if schema > 2 else None,
    )
    fields.done()
    if arm.name != f"{arm.variant}@{arm.precision}":
        raise fields.fail("name", f"{arm.variant}@{arm.precision} (variant@precision)", repr(arm.name))
    if arm.tolerance < 0:
        raise fields.fail("tolerance", "a relative error ≥ 0", str(arm.tolerance))
    return arm


def _quality(fields: Fields) -> dict[str, Any]:
    quality = fields.child("quality")
    splits: dict[str, Any] = {}
    for split in ("selection", "test"):
        if not quality.has(split):
            continue
        measured = quality.child(split)
        values: dict[str, Any] = {
            "metric": measured.text("metric"),
            "value": measured.number("value"),
            "n": measured.integer("n"),
        }
        values.update({key: measured.optional_number(key) for key in _QUALITY_NUMBERS if measured.has(key)})
        values.update({key: measured.integer(key) for key in _QUALITY_COUNTS if measured.has(key)})
        measured.done()
        splits[split] = values
    quality.done()
    return splits


def _check(manifest: Manifest) -> None:
    """What no single key can tell: names that must agree with each other."""
    _check_names(manifest)
    _check_files(manifest)
    target = Fields(manifest.target, "manifest.target")
    target.text("name")
    target.text_table("match")
    if manifest.preprocess is not None:
        from .preprocess import Preprocess

        try:
            Preprocess.from_dict(manifest.preprocess)
        except DataError as e:
            raise BundleError(f"manifest.{e.what}", expected=e.expected, got=e.got, hint=e.hint) from e


def _check_names(manifest: Manifest) -> None:
    arms = [arm.name for arm in manifest.arms]
    for key, names in (
        ("inputs", [spec.name for spec in manifest.inputs]),
        ("outputs", [spec.name for spec in manifest.outputs]),
        ("arms", arms),
        ("labels", list(manifest.labels)),
    ):
        if len(set(names)) != len(names):
            raise BundleError(f"manifest.{key}", expected="names that differ", got=", ".join(names))
        if not names and key != "labels":
            raise BundleError(f"manifest.{key}", expected="at least one", got="none")
    if manifest.default_arm not in arms:
        raise BundleError("manifest.default_arm", expected=f"one of {', '.join(arms)}", got=repr(manifest.default_arm))
    if sorted(manifest.golden_outputs) != sorted(arms):
        got = ", ".join(sorted(manifest.golden_outputs)) or "none"
        raise BundleError("manifest.golden_outputs", expected=f"one for each of {', '.join(sorted(arms))}", got=got)
    if manifest.positive is not None and manifest.positive not in manifest.labels:
        raise BundleError(
            "manifest.positive", expected=f"one of labels {list(manifest.labels)}", got=repr(manifest.positive)
        )
    if manifest.contract == "classify" and manifest.positive is None:
        for arm in manifest.arms:
            if arm.threshold is not None:
                what = f"manifest.positive (arm {arm.name} has a threshold)"
                raise BundleError(what, expected="the label the threshold decides about", got="none")


def _check_files(manifest: Manifest) -> None:
    if not manifest.files:
        return  # a manifest that is still being built; Bundle.open refuses it
    paths: Mapping[str, FileEntry] = {entry.path: entry for entry in manifest.files}
    if len(paths) != len(manifest.files):
        raise BundleError("manifest.files", expected="each path once", got="a path that occurs twice")
    for path in paths:
        if path == MANIFEST_NAME or PurePosixPath(path).parts[0] == PROFILES_FOLDER:
            raise BundleError(
                "manifest.files", expected=f"neither {MANIFEST_NAME} nor files in {PROFILES_FOLDER}/", got=path
            )
    needed = [arm.artifact for arm in manifest.arms] + [manifest.golden_inputs, *manifest.golden_outputs.values()]
    for path in needed:
        if path not in paths:
            raise BundleError("manifest.files", expected=f"an entry for {path}", got="none")
