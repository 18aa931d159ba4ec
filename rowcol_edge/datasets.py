"""Real inputs as the user names them: a folder of images, an ``.npz``, a Python callable, or a sample's own split.

A `Split` can be gone through any number of times in the same order. Small splits are kept in memory after the first
pass, large ones are read again, so memory stays bounded by `_CACHE_BYTES` a split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import user_code
from .device.npz import read_npz
from .device.preprocess import Preprocess
from .errors import ConfigError, DataError, SplitError
from .samples import Sample

Feeds = dict[str, npt.NDArray[Any]]
Labels = npt.NDArray[np.int64]

BATCH = 32
_CACHE_BYTES = 2**30
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
_SOME = "a few hundred real inputs are right; a folder holds .png, .jpg … or a subfolder of them per class"
_LABEL_KEYS = ("labels", "label", "y")


@dataclass(slots=True)
class Split:
    """A named set of samples, checked once when it is made.

    Attributes:
        name: ``calibration``, ``selection`` or ``test``.
        reference: how the user named it.
        labels: (samples,) int64, or (samples, height, width) where each pixel has a class, or None.
        label_names: class names where the source knows them (a folder's subfolders).
        digest: sha256 over every sample and label, in order.
        sample_digests: one digest a sample, for finding samples that two splits share.
        specs: input name → shape of a sample and dtype.
    """

    name: str
    reference: str
    source: Callable[[], Iterable[tuple[Feeds, Labels | None]]]
    labels: Labels | None = None
    label_names: tuple[str, ...] = ()
    digest: str = ""
    sample_digests: tuple[bytes, ...] = ()
    specs: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    _cache: list[Feeds] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.sample_digests)

    @property
    def key(self) -> list[object]:
        """All that a result made from these samples depends on, as values that JSON can hold."""
        return [self.digest, sorted(self.specs.items())]

    def batches(self) -> Iterator[Feeds]:
        """Every batch in order, as ``{input name: (batch, …)}``."""
        if self._cache is not None:
            yield from self._cache
            return
        place = 0
        for feeds, _ in self.source():
            count = _length(feeds)
            # labels were collected in the first pass: they belong to these samples only as long as the order stays
            if count and (place >= len(self) or _digest(feeds, 0) != self.sample_digests[place]):
                raise DataError(
                    f"{self.name} data {self.reference}",
                    expected="the same samples in the same order each time they are read",
                    got=f"another sample at place {place}",
                    hint="do not shuffle in it, and seed what is random",
                )
            place += count
            yield feeds

    def only(self, places: Sequence[int]) -> Iterator[Feeds]:
        """The samples at these places, in the split's order and in its batches."""
        wanted, start = np.asarray(places), 0
        for feeds in self.batches():
            count = _length(feeds)
            here = wanted[(wanted >= start) & (wanted < start + count)] - start
            start += count
            if len(here):
                yield {name: array[here] for name, array in feeds.items()}

    def take(self, count: int) -> Feeds:
        """The first ``count`` samples as one batch."""
        parts: list[Feeds] = []
        have = 0
        for feeds in self.batches():
            parts.append(feeds)
            have += _length(feeds)
            if have >= count:
                break
        return {name: np.concatenate([p[name] for p in parts])[:count] for name in parts[0]}

    def spread(self, count: int, among: Sequence[int] | None = None) -> Feeds:
        """``count`` samples spread evenly over the split, or over the places ``among`` it, or all, as one batch.

        Data often come sorted by class: the first samples would be of one.
        """
        pool = np.arange(len(self)) if among is None else np.asarray(among)
        parts = list(self.only(pool[evenly(len(pool), count)].tolist()))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def example(self) -> Feeds:
        return self.take(1)


def evenly(size: int, count: int) -> npt.NDArray[np.intp]:
    """``count`` of the places below ``size``, first and last among them, or all; ascending."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).round().astype(np.intp))


def load(
    reference: str | None,
    name: str,
    inputs: Sequence[str],
    *,
    sample: Sample | None = None,
    preprocess: Preprocess | None = None,
    labels: Sequence[str] = (),
) -> Split | None:
    """The split called ``name``; None where neither a reference nor a sample provides one.

    Args:
        reference: a folder, an ``.npz`` or ``module:callable`` / ``file.py:callable``.
        name: calibration, selection or test.
        inputs: the names of the model's inputs, in order.
        sample: the embedded sample whose split is used where no reference is given.
        preprocess: how images become tensors (folders and uint8 arrays).
        labels: class names in the order of the model's outputs; a folder's subfolders must be among them.

    Raises:
        DataError: unreadable, empty, wrong shapes or types, NaN or Inf.
    """
    if reference is None:
        if sample is None or sample.data is None:
            return None
        return scan(Split(name, f"sample:{sample.name}", _callable_source(f"{sample.data}:{name}", inputs)))
    path = Path(reference)
    if path.is_dir():
        return scan(_folder(path, name, inputs, preprocess, labels))
    if path.suffix == ".npz":
        return scan(Split(name, reference, _npz_source(path, inputs, preprocess)))
    if ":" in reference:
        return scan(Split(name, reference, _callable_source(reference, inputs)))
    raise DataError(
        f"{name} data {reference!r}",
        expected="a folder of images, an .npz or module:callable",
        got="no such file or folder" if not path.exists() else f"a {path.suffix or 'file'}",
        hint="a relative path starts from the current folder",
    )


def array_names(reference: str) -> tuple[str, ...]:
    """The names that an ``.npz``, or the first batch of a callable, gives to its inputs; none where there are no names.

    Raises:
        DataError: it cannot be read.
    """
    if Path(reference).suffix == ".npz":
        return tuple(name for name in read_npz(Path(reference), DataError) if name not in _LABEL_KEYS)
    if Path(reference).is_dir() or ":" not in reference:
        return ()
    what = f"data {reference!r}"
    function = user_code.resolve(reference, DataError, "data")
    batch = user_code.call(lambda: next(iter(function()), None), DataError, what)
    inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch
    return tuple(inputs) if isinstance(inputs, Mapping) else ()


def scan(split: Split) -> Split:
    """Go through the split once: check every batch, collect labels and digests, keep it in memory if it is small."""
    total = hashlib.sha256()
    digests: list[bytes] = []
    labels: list[Labels] = []
    kept: list[Feeds] | None = []
    kept_bytes = 0
    for feeds, batch_labels in split.source():
        count = _check(split, feeds)
        if batch_labels is not None:
            labels.append(_check_labels(split, batch_labels, count))
        for i in range(count):
            digests.append(_digest(feeds, i))
            total.update(digests[-1])
        kept_bytes += sum(a.nbytes for a in feeds.values())
        kept = kept if kept is not None and kept_bytes <= _CACHE_BYTES else None
        if kept is not None:
            kept.append(feeds)
    if not digests:
        raise DataError(f"{split.name} data {split.reference}", expected="at least one sample", got="none", hint=_SOME)
    if labels and sum(map(len, labels)) != len(digests):
        raise DataError(
            f"{split.name} data {split.reference}", expected="labels for every batch or for none", got="some"
        )
    split.labels = np.concatenate(labels) if labels else None
    if split.labels is not None:
        total.update(split.labels.tobytes())
    split.digest, split.sample_digests, split._cache = total.hexdigest(), tuple(digests), kept
    return split


def _digest(feeds: Feeds, i: int) -> bytes:
    """Of one sample of a batch."""
    one = hashlib.sha256()
    for array in feeds.values():
        one.update(np.ascontiguousarray(array[i]).tobytes())
    return one.digest()


def check_disjoint(splits: Sequence[Split]) -> None:
    """Raises SplitError where two splits hold the same sample, bit for bit."""
    for i, first in enumerate(splits):
        for second in splits[i + 1 :]:
            shared = set(first.sample_digests) & set(second.sample_digests)
            if shared:
                raise SplitError(
                    f"the {first.name} and {second.name} splits",
                    expected="no sample in both",
                    got=f"{len(shared)} shared sample(s)",
                    hint="a choice judged on data it has seen is worth nothing: split the data again",
                )


def check_alike(splits: Sequence[Split]) -> None:
    """Raises DataError where two splits hold samples of another shape or type."""
    first, *others = splits
    for other in others:
        for name, spec in other.specs.items():
            if spec != first.specs[name]:
                raise DataError(
                    f"{other.name} data {other.reference}: input {name}",
                    expected=f"shape {first.specs[name][0]}, {first.specs[name][1]}, as the {first.name} data",
                    got=f"{spec[0]}, {spec[1]}",
                )


def check_preprocess(split: Split, preprocess: Preprocess) -> None:
    """Raises DataError where the board would make other tensors of a picture than the model was calibrated with."""
    if len(split.specs) != 1:
        return
    ((name, (shape, dtype)),) = split.specs.items()
    if shape != preprocess.shape and dtype != "uint8":  # a model of uint8 frames takes them as they come
        raise DataError(
            f"{split.name} data {split.reference}: input {name}",
            expected=f"samples of shape {preprocess.shape}, which the preprocess makes of a picture",
            got=str(shape),
            hint='say how pictures become such samples: --preprocess "mode=L,size=HEIGHTxWIDTH,…"',
        )


def class_names(references: Sequence[str | None]) -> tuple[str, ...]:
    """The subfolders that all image folders among the references share, in order; empty where there are none.

    Raises:
        DataError: the folders have other classes, so that an index would mean another class in each.
    """
    found = {r: _classes(Path(r)) for r in references if r is not None and Path(r).is_dir()}
    labelled = {r: names for r, names in found.items() if names}
    if len(set(labelled.values())) > 1:
        raise DataError(
            "the class folders of the splits",
            expected="the same in each",
            got="; ".join(f"{r}: {', '.join(names)}" for r, names in labelled.items()),
            hint="name the classes in the order of the model's outputs: --labels a,b,c",
        )
    return next(iter(labelled.values()), ())


def _classes(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _check(split: Split, feeds: Feeds) -> int:
    count = _length(feeds)
    for name, array in feeds.items():
        what = f"{split.name} data {split.reference}: input {name}"
        if len(array) != count:
            raise DataError(what, expected=f"{count} samples like the other inputs", got=str(len(array)))
        if array.dtype.kind not in "fiub":
            raise DataError(what, expected="numbers", got=str(array.dtype))
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(what, expected="finite values", got="NaN or Inf", hint="mend or leave out those samples")
        spec = (array.shape[1:], array.dtype.name)
        if split.specs.setdefault(name, spec) != spec:
            shape, dtype = split.specs[name]
            raise DataError(what, expected=f"samples of shape {shape}, {dtype}", got=f"{spec[0]}, {spec[1]}")
    return count


def _check_labels(split: Split, labels: npt.NDArray[Any], count: int) -> Labels:
    labels = np.asarray(labels)
    what = f"{split.name} data {split.reference}: labels"
    if not _is_labels(labels, count):
        raise DataError(what, expected=f"one per sample, shape ({count},), or per pixel", got=str(labels.shape))
    if labels.dtype.kind not in "iub":
        hint = "labels.argmax(1) turns one-hot labels, labels.astype(int) whole numbers stored as floats into indices"
        raise DataError(what, expected="whole numbers (class indices)", got=str(labels.dtype), hint=hint)
    if count and labels.min() < 0:
        raise DataError(what, expected="class indices from 0", got=str(labels.min()))
    return labels.astype(np.int64)


def _is_labels(labels: npt.NDArray[Any], count: int) -> bool:
    """One label a sample, or (height, width) of them."""
    return labels.ndim in (1, 3) and len(labels) == count


def _length(feeds: Mapping[str, npt.NDArray[Any]]) -> int:
    first = next(iter(feeds.values()))
    if first.ndim == 0:
        raise DataError("data", expected="arrays with a batch dimension", got="a scalar")
    return len(first)


def _as_feeds(value: Any, inputs: Sequence[str], what: str) -> Feeds:
    """A batch's inputs, as a dict by name, a tuple in order, or one array."""
    if isinstance(value, Mapping):
        if set(value) != set(inputs):
            hint = f"name the arrays as the model names its inputs; {', '.join(_LABEL_KEYS)} are taken as labels"
            raise DataError(what, expected=f"inputs {list(inputs)}", got=f"{sorted(value) or 'none'}", hint=hint)
        return {name: _as_array(value[name]) for name in inputs}
    if isinstance(value, (tuple, list)):
        if len(value) != len(inputs):
            raise DataError(what, expected=f"{len(inputs)} input(s) {list(inputs)}", got=str(len(value)))
        return {name: _as_array(v) for name, v in zip(inputs, value, strict=True)}
    if len(inputs) != 1:
        raise DataError(what, expected=f"a dict of the inputs {list(inputs)}", got="one array")
    return {inputs[0]: _as_array(value)}


def _as_array(value: Any) -> npt.NDArray[Any]:
    """Numbers as the model takes them: every float is float32, torch tensors are taken over."""
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _callable_source(reference: str, inputs: Sequence[str]) -> Callable[[], Iterator[tuple[Feeds, Labels | None]]]:
    """The callable yields batches: ``(inputs, labels)`` pairs, or inputs alone (an array or a dict)."""
    function = user_code.resolve(reference, DataError, "data")
    what = f"data {reference!r}"

    def source() -> Iterator[tuple[Feeds, Labels | None]]:
        batches = user_code.call(lambda: iter(function()), DataError, what)
        while (batch := user_code.call(lambda: next(batches, None), DataError, what)) is not None:
            if isinstance(batch, (tuple, list)) and len(batch) == 2:
                labels = None if batch[1] is None else np.asarray(batch[1])
                yield _as_feeds(batch[0], inputs, what), labels
            else:
                yield _as_feeds(batch, inputs, what), None

    return source


def _npz_source(
    path: Path, inputs: Sequence[str], preprocess: Preprocess | None
) -> Callable[[], Iterator[tuple[Feeds, Labels | None]]]:
    def source() -> Iterator[tuple[Feeds, Labels | None]]:
        arrays = read_npz(path, DataError)
        key = next((k for k in _LABEL_KEYS if k in arrays and k not in inputs), None)
        labels = arrays.pop(key) if key else None
        if len(inputs) == 1 and len(arrays) == 1:
            arrays = {inputs[0]: next(iter(arrays.values()))}
        feeds = _as_feeds(arrays, inputs, str(path))
        count = _length(feeds)
        if labels is not None and not _is_labels(labels, count):
            expected = f"one per sample, shape ({count},), or per pixel"
            raise DataError(f"{path}: labels", expected=expected, got=str(labels.shape))
        for start in range(0, count, BATCH):
            part = {name: _pixels(a[start : start + BATCH], preprocess) for name, a in feeds.items()}
            yield part, None if labels is None else labels[start : start + BATCH]

    return source


def _pixels(array: npt.NDArray[Any], preprocess: Preprocess | None) -> npt.NDArray[Any]:
    if array.dtype != np.uint8 or preprocess is None:
        return array
    return np.stack([preprocess.pixels(frame) for frame in array])


def _folder(
    path: Path, name: str, inputs: Sequence[str], preprocess: Preprocess | None, labels: Sequence[str]
) -> Split:
    if len(inputs) != 1:
        raise DataError(
            f"{name} data {path}", expected="a model with one input for a folder of images", got=f"{list(inputs)}"
        )
    if preprocess is None:
        raise ConfigError(
            "preprocess",
            expected="how an image becomes a tensor",
            got="nothing",
            hint='e.g. --preprocess "mode=RGB,size=224x224,mean=0.485/0.456/0.406,std=0.229/0.224/0.225"',
        )
    classes = _classes(path)
    strangers = [c for c in classes if labels and c not in labels]
    if strangers:
        raise DataError(
            f"{name} data {path}", expected=f"subfolders among the labels {list(labels)}", got=f"{strangers}"
        )
    loose = _images(path.iterdir())
    if classes and loose:
        raise DataError(
            f"{name} data {path}",
            expected="every image in the subfolder of its class",
            got=f"{len(loose)} beside the subfolders, {loose[0].name} for one",
        )
    members = {c: _images((path / c).rglob("*")) for c in classes}
    if empty := [c for c, found in members.items() if not found]:
        raise DataError(
            f"{name} data {path}",
            expected="images in every class",
            got=f"none in {', '.join(empty)}",
            hint="remove an empty folder and name all classes: --labels a,b,c",
        )
    order = list(labels) if labels else classes
    files = [(file, order.index(c)) for c in classes for file in members[c]] or [(file, -1) for file in loose]

    def source() -> Iterator[tuple[Feeds, Labels | None]]:
        for start in range(0, len(files), BATCH):
            part = files[start : start + BATCH]
            feeds = {inputs[0]: np.stack([preprocess.file(f) for f, _ in part])}
            yield feeds, np.array([c for _, c in part]) if classes else None

    return Split(name, str(path), source, label_names=tuple(order))


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(p for p in paths if p.suffix.lower() in _IMAGES and not p.name.startswith("."))
