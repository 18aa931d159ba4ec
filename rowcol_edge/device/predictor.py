"""The runner: preprocess, infer, decode."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import BundleError, DataError, MissingDependencyError
from .bundle import Bundle
from .decode import Prediction, decoder, first
from .manifest import ArmEntry, TensorSpec
from .npz import read_npz
from .preprocess import Frames, Preprocess
from .runtimes import Runtime, RuntimeOptions, Session, load_runtime
from .runtimes.base import fits
from .system import another_machine, saturates_only_here


class Predictor:
    """An arm of a bundle, ready to run.

        with Predictor("bundle") as predictor:
            predictor.predict("part.png").label

    ``bundle`` is an open :class:`Bundle` (which stays open) or the path of one (which is opened, checked and closed
    again). ``arm`` None is the bundle's default; ``threads`` None is what the target asks for, 0 the runtime's choice.
    Not for use by several threads at a time.
    """

    def __init__(self, bundle: Bundle | str | Path, arm: str | None = None, threads: int | None = None) -> None:
        self._owned = not isinstance(bundle, Bundle)
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        try:
            manifest = self.bundle.manifest
            self.arm = self.bundle.arm(arm)
            recipe = Frames if manifest.frames else Preprocess
            self.preprocess = None if manifest.preprocess is None else recipe.from_dict(manifest.preprocess)
            self._decode = decoder(manifest.contract, manifest.labels, manifest.positive, self.arm.threshold)
            self._session = open_arm(self.bundle, self.arm, threads=threads)
            self._frame = self._camera()
        except BaseException:
            if self._owned:
                self.bundle.close()
            raise

    def predict(self, source: Any) -> Prediction:
        """Answer for one sample.

        ``source``: the path of an image, ``.npy``, raw frame or ``.npz`` (a feed by input name); a Pillow image; a
        uint8 frame (H, W) or (H, W, C); a float array as the model takes it, with or without the batch axis of 1; a
        dict of feeds.
        A model with several inputs takes feeds only. DataError: a source that does not fit.
        """
        if self._frame is not None and isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.ndim < 4:
            name, frame = self._frame
            return self._decode(self._session.infer({name: frame(source)[None]})[0])
        return self.decode(self._session.run(self.feeds(source)))

    def feeds(self, source: Any) -> Mapping[str, np.ndarray]:
        """What :meth:`predict` gives to the model for a source."""
        if not isinstance(source, np.ndarray):
            if isinstance(source, Mapping):
                return source
            if isinstance(source, (str, Path)) and Path(source).suffix == ".npz":
                return read_npz(Path(source), DataError)
        spec = self._only_input
        tensor = self._tensor(source, spec)
        if tensor.ndim == len(spec.shape) - 1:
            tensor = tensor[None]
        return {spec.name: tensor if tensor.dtype is self._only_dtype else tensor.astype(self._only_dtype)}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The raw outputs for feeds, any batch that the model takes."""
        return self._session.run(feeds)

    def decode(self, outputs: Mapping[str, np.ndarray]) -> Prediction:
        """Raw outputs of one sample → the answer."""
        return self._decode(first(outputs))

    def close(self) -> None:
        self._session.close()
        if self._owned:
            self.bundle.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _camera(self) -> tuple[str, Callable[[np.ndarray], np.ndarray]] | None:
        """The input that takes camera frames, and what makes tensors that fit it: no call has to check them again."""
        inputs = self._session.inputs
        if self.preprocess is None or len(inputs) != 1 or inputs[0].dtype != self.preprocess.dtype:
            return None
        shape = (1, *self.preprocess.shape)
        return (inputs[0].name, self.preprocess.frame) if fits(shape, inputs[0].shape) else None

    @cached_property
    def _only_input(self) -> TensorSpec:
        if len(self._session.inputs) != 1:
            names = ", ".join(spec.name for spec in self._session.inputs)
            raise DataError(
                "input", expected=f"a dict or .npz with arrays named {names}", got="a single array or picture"
            )
        spec = self._session.inputs[0]
        if spec.shape and spec.shape[0] not in (None, 1):
            hint = f"collect {spec.shape[0]} samples and call run"
            raise DataError(
                "predict", expected="a model that takes one sample", got=f"a fixed batch of {spec.shape[0]}", hint=hint
            )
        return spec

    @cached_property
    def _only_dtype(self) -> np.dtype[Any]:
        return np.dtype(self._only_input.dtype)

    def _tensor(self, source: Any, spec: TensorSpec) -> np.ndarray:
        if isinstance(source, np.ndarray):
            as_it_is = self._frame is None or source.ndim == 4
            if source.dtype != np.uint8 or (spec.dtype == "uint8" and as_it_is):
                return source
            return self._recipe("a uint8 frame").frame(source)
        if isinstance(source, (str, Path)):
            path = Path(source)
            if self.preprocess is None and path.suffix == ".npy":
                return _npy(path)
            return self._recipe(str(path)).file(path)
        image = sys.modules.get("PIL.Image")  # whoever hands over a Pillow image has imported it
        if image is not None and isinstance(source, image.Image):
            return self._recipe("a Pillow image").image(source)
        raise DataError(
            "source", expected="a path, a Pillow image, a numpy array or a dict of feeds", got=type(source).__name__
        )

    def _recipe(self, what: str) -> Preprocess:
        if self.preprocess is None:
            raise DataError(
                what,
                expected="a float array or feeds (.npy, .npz)",
                got="a picture, and this bundle has no preprocessing for one",
            )
        return self.preprocess


def runtime_options(bundle: Bundle, threads: int | None = None) -> RuntimeOptions:
    """The options the manifest asks for; ``threads`` None keeps its number. A machine of another kind than the target
    stands in for it and calculates what the target would."""
    entry, target = bundle.manifest.runtime, bundle.manifest.target
    used = entry.threads if threads is None else threads
    stands_in = bool(another_machine(target, platform.machine()))
    exact_sums = stands_in and saturates_only_here(target)
    return RuntimeOptions(
        used, entry.providers, entry.properties, install_line=entry.install_line, exact_sums=exact_sums
    )


def open_arm(bundle: Bundle, arm: ArmEntry, *, threads: int | None = None) -> Session:
    """Load the runtime, open an arm's artifact, and check that its inputs and outputs are those of the manifest."""
    if threads is not None and threads < 0:
        raise DataError("threads", expected="0 (the runtime's choice) or more", got=str(threads))
    session = load_checked(bundle).open(bundle.artifact(arm), runtime_options(bundle, threads))
    for kind, found, listed in (
        ("inputs", session.inputs, bundle.manifest.inputs),
        ("outputs", session.outputs, bundle.manifest.outputs),
    ):
        # sizes are left to the run: a runtime may name fewer of them than the manifest
        if [(spec.name, spec.dtype) for spec in found] != [(spec.name, spec.dtype) for spec in listed]:
            session.close()
            raise BundleError(f"{arm.name}: {kind}", expected=_specs_text(listed), got=_specs_text(found))
    return session


def load_checked(bundle: Bundle) -> Runtime:
    """Load the bundle's runtime.

    BundleError: it is older than the oldest one the bundle was made for. MissingDependencyError: it is not installed;
    the line is the bundle's own, since what pip finds under the runtime's name may be the wrong build for the board.
    """
    entry = bundle.manifest.runtime
    try:
        runtime = load_runtime(entry.name)
    except MissingDependencyError as e:
        raise MissingDependencyError(e.what, package=e.package, install=entry.install_line) from e
    if not runtime.fulfils(entry.oldest):
        raise BundleError(
            f"package {runtime.package}",
            expected=f"{entry.oldest} or newer",
            got=runtime.version(),
            hint=f"install it with: {entry.install_line}",
        )
    return runtime


def _specs_text(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in specs)


def _npy(path: Path) -> np.ndarray:
    try:
        array: Any = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError) as e:
        raise DataError(str(path), expected="an array file (never pickled)", got=str(e)) from e
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError(str(path), expected="an .npy array", got="an .npz archive under that name")
    return array
