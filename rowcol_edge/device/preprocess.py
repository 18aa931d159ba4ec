"""From a picture, an array file or a raw camera frame to the tensor a model takes.

The recipe is data (`Preprocess`): it is stored in the bundle's manifest, and the training code, the build side and the
board all run this one implementation, so that they cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..errors import DataError, MissingDependencyError, did_you_mean

_MODES = {"L": 1, "RGB": 3}
_RESAMPLING = ("nearest", "bilinear", "bicubic")
_Recipe = TypeVar("_Recipe", bound="Preprocess")


@dataclass(frozen=True)
class Preprocess:
    """How one picture becomes one input of shape (channels, height, width), float32.

    ``value = (pixel * scale - mean[c]) / std[c]`` with pixels 0–255; the picture is resized to exactly
    ``height × width`` (aspect ratio is not kept: a fixed camera delivers a fixed frame).
    """

    mode: str = "RGB"
    height: int = 224
    width: int = 224
    resample: str = "bilinear"
    scale: float = 1.0 / 255.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    dtype: ClassVar[str] = "float32"
    """Of the input."""

    def __post_init__(self) -> None:
        self._check_types()
        if self.mode not in _MODES:
            raise DataError("preprocess.mode", expected=f"one of {sorted(_MODES)}", got=repr(self.mode))
        if self.resample not in _RESAMPLING:
            raise DataError("preprocess.resample", expected=f"one of {_RESAMPLING}", got=repr(self.resample))
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != self.channels:
                raise DataError(
                    f"preprocess.{name}",
                    expected=f"{self.channels} value(s) for mode {self.mode}",
                    got=f"{len(values)}",
                    hint=f"one a channel, such as {name}={'/'.join(['0.5'] * self.channels)}",
                )
        if min(self.std) <= 0 or self.height < 1 or self.width < 1:
            raise DataError("preprocess", expected="positive std, height and width", got=repr(self))

    def _check_types(self) -> None:
        for name in ("height", "width"):
            value: Any = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise DataError(f"preprocess.{name}", expected="a whole number of pixels", got=repr(value))
        groups: tuple[tuple[str, tuple[Any, ...]], ...] = (
            ("scale", (self.scale,)),
            ("mean", self.mean),
            ("std", self.std),
        )
        for name, values in groups:
            for number in values:
                if not isinstance(number, (int, float)) or isinstance(number, bool) or not isfinite(number):
                    raise DataError(f"preprocess.{name}", expected="finite numbers", got=repr(number))

    @property
    def channels(self) -> int:
        return _MODES[self.mode]

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, self.height, self.width)

    @cached_property
    def frame_shape(self) -> tuple[int, int, int]:
        return (self.height, self.width, self.channels)

    @cached_property
    def steps(self) -> tuple[np.ndarray, np.ndarray]:
        """(factor, offset), each (C, 1, 1) float32: pixel * factor + offset is the formula above."""
        std = np.array(self.std)[:, None, None]
        return (self.scale / std).astype(np.float32), (-np.array(self.mean)[:, None, None] / std).astype(np.float32)

    @classmethod
    def from_dict(cls: type[_Recipe], values: Mapping[str, Any]) -> _Recipe:
        known = {k: values[k] for k in cls.__dataclass_fields__ if k in values}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise DataError(
                "preprocess",
                expected=f"keys out of {', '.join(sorted(cls.__dataclass_fields__))}",
                got=", ".join(unknown),
                hint=did_you_mean(unknown[0], cls.__dataclass_fields__),
            )
        for name in ("mean", "std"):
            if name in known:
                if not isinstance(known[name], (list, tuple)):
                    raise DataError(f"preprocess.{name}", expected="a list of numbers", got=repr(known[name]))
                known[name] = tuple(known[name])
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def pixels(self, frame: np.ndarray) -> np.ndarray:
        """uint8 frame, (H, W) or (H, W, C), already of the right size → (C, H, W) float32."""
        factor, offset = self.steps
        tensor = self._checked(frame).transpose(2, 0, 1).astype(np.float32, order="C")
        tensor *= factor  # in place, a step at a time: several times faster than one expression
        tensor += offset
        return tensor

    def _checked(self, frame: np.ndarray) -> np.ndarray:
        """(H, W, C)."""
        if frame.ndim == 2:
            frame = frame[:, :, None]
        if frame.shape != self.frame_shape or frame.dtype != np.uint8:
            raise DataError(
                "camera frame",
                expected=f"uint8 pixels, height × width × channels = {self.frame_shape}",
                got=f"{frame.dtype} {frame.shape}",
            )
        return frame

    def frame(self, frame: np.ndarray) -> np.ndarray:
        """uint8 frame, (H, W) or (H, W, C), of any size → (C, H, W) float32. Only another size or mode needs Pillow."""
        if frame.shape == self.frame_shape or frame.dtype != np.uint8 or frame.ndim not in (2, 3):
            return self.pixels(frame)
        if frame.ndim == 2 and (*frame.shape, 1) == self.frame_shape:
            return self.pixels(frame)
        if frame.ndim == 3 and frame.shape[2] == 1:
            frame = frame[:, :, 0]
        if frame.size == 0 or (frame.ndim == 3 and frame.shape[2] != 3):
            raise DataError("camera frame", expected="height × width, or height × width × 1 or 3", got=str(frame.shape))
        return self.image(_pillow(f"resizing a frame of {frame.shape}").fromarray(np.ascontiguousarray(frame)))

    def image(self, picture: Any) -> np.ndarray:
        """A Pillow image → (C, H, W) float32."""
        resampling = getattr(_pillow("reading images").Resampling, self.resample.upper())
        if picture.mode.startswith(("I", "F")):
            # Pillow clips these to 0–255 when it converts them, which turns most of a 16-bit picture white
            raise DataError(
                "image", expected="8 bits a channel", got=f"mode {picture.mode}", hint="scale it to 8 bits first"
            )
        picture = picture.convert(self.mode)
        if picture.size != (self.width, self.height):
            picture = picture.resize((self.width, self.height), resampling)
        return self.pixels(np.asarray(picture, dtype=np.uint8))

    def file(self, path: str | Path) -> np.ndarray:
        """An image file, a raw uint8 frame (``.raw``, ``.bin``), or a ``.npy``: a uint8 frame or the float tensor."""
        path = Path(path)
        if not path.is_file():
            raise DataError(str(path), expected="a readable file", got="no such file")
        if path.suffix == ".npy":
            return self._npy(path)
        if path.suffix in (".raw", ".bin"):
            return self._raw(path)
        pillow = _pillow("reading image files")
        # UnidentifiedImageError is an OSError; broken PNG and TIFF files also end in the other two
        unreadable = (OSError, SyntaxError, ValueError, pillow.DecompressionBombError)
        try:
            with pillow.open(path) as picture:
                return self.image(picture)
        except unreadable as e:
            raise DataError(str(path), expected="an image Pillow can decode", got=str(e)) from e
        except DataError as e:
            raise DataError(str(path), expected=e.expected, got=e.got, hint=e.hint) from e

    def _npy(self, path: Path) -> np.ndarray:
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as e:
            raise DataError(str(path), expected="an .npy array (never pickled)", got=str(e)) from e
        if not isinstance(array, np.ndarray):
            array.close()
            raise DataError(str(path), expected="an .npy array", got="an .npz archive under that name")
        if array.dtype == np.uint8:
            return self.frame(array)
        if array.shape != self.shape or array.dtype.kind != np.dtype(self.dtype).kind:
            floats = "" if self.dtype == "uint8" else f"float array of shape {self.shape}, or "
            raise DataError(str(path), expected=f"{floats}a uint8 frame", got=f"{array.dtype} {array.shape}")
        if not np.isfinite(array).all():
            raise DataError(str(path), expected="finite values", got="NaN or Inf")
        return np.ascontiguousarray(array, dtype=np.float32)

    def _raw(self, path: Path) -> np.ndarray:
        expected = self.height * self.width * self.channels
        size_bytes = path.stat().st_size
        if size_bytes != expected:
            raise DataError(
                str(path),
                expected=f"{expected} bytes (height {self.height} × width {self.width} × {self.channels} channel(s))",
                got=f"{size_bytes} bytes",
            )
        data = np.fromfile(path, dtype=np.uint8)
        return self.pixels(data.reshape(self.height, self.width, self.channels))


class Frames(Preprocess):
    """The same recipe for a model that normalises by itself: what becomes an input is the frame, (H, W, C) uint8."""

    dtype = "uint8"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.frame_shape

    def pixels(self, frame: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self._checked(frame))


def _pillow(what: str) -> Any:
    try:
        from PIL import Image
    except ImportError as e:
        raise MissingDependencyError(
            what, package="pillow", hint="or hand over a .npy or a raw frame of the right size"
        ) from e
    return Image
