"""Near-duplicates: the same part photographed twice, or one picture saved again, inside a split and across splits.

Two samples are near-duplicates if all three hold:

- the model's centred features point the same way, at least as much as those of known copies do;
- the inputs are as alike (`sketches`) as known copies are;
- they are nearer to each other than either is to others that merely look like it: squared distance at most
  `_RATIO` of that to the last of its `_NEAREST` neighbours (D. G. Lowe, "Distinctive image features from
  scale-invariant keypoints", 2004, section 7.1: 0.8 of the distance). Where those are all as alike as copies, as in a
  burst of one part, it is the most alike of those farther out that are not.

The known copies are made of the user's own samples: pictures moved by 1 % of a side and brightened, or blurred as by
saving them again, with noise; numbers with noise; tokens with one in fifty replaced. A threshold is what 95 % of them
reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .datasets import Feeds, Split, evenly
from .features import Observed, Observer
from .sketches import Likeness, Sketches, is_picture, sketch, stack

_NEAREST = 6
_MOST = 96  # neighbours that are compared one by one; of those farther out each that doubles the rank
_RATIO = 0.8**2
_COPIED = 32
_MISSED = 0.05  # share of the known copies that a threshold may miss
_MOVED = 0.01  # of a side
_NOISE = 0.02  # of the standard deviation, and the share of tokens that are replaced
_BLOCK = 1024

Floats = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What counts as a near-duplicate in these data, with this model."""

    cosine: float
    likeness: float
    ratio: float = _RATIO


@dataclass(frozen=True, slots=True)
class Pair:
    """Two near-duplicates, each by its split and its place in it."""

    first: str
    first_index: int
    second: str
    second_index: int
    cosine: float
    likeness: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def thresholds(observer: Observer, split: Split, known: Observed, likeness: Likeness, centre: Floats) -> Thresholds:
    """From copies of some of the split's samples."""
    rows = evenly(len(split), _COPIED)
    feeds = split.spread(_COPIED)
    originals, cosines, likes = _directions(known.features[rows], centre), [], []
    for copy in _copies(feeds):
        features = observer.batch(copy)[0]
        cosines.append((_directions(features, centre) * originals).sum(axis=1))
        likes.append(likeness.pairs(sketch(copy), known.sketches, np.arange(len(rows)), rows))
    # rounding must not keep a copy from equalling its original
    return Thresholds(*(float(min(np.quantile(np.concatenate(v), _MISSED), 1.0)) - 1e-4 for v in (cosines, likes)))


def find(observed: Sequence[Observed], limits: Thresholds, likeness: Likeness, centre: Floats) -> tuple[Pair, ...]:
    """Near-duplicates among all samples of all splits, the most alike first.

    Each sample is compared with its `_NEAREST` neighbours by features, in a burst with more; memory is a block of
    features times all.
    """
    features = np.concatenate([_directions(split.features, centre) for split in observed])
    sketches = stack([split.sketches for split in observed])
    compared, others = _compared(features, sketches, limits, likeness)
    if not compared:
        return ()
    rows, columns, cosines, alike = map(np.concatenate, zip(*compared, strict=True))
    near = np.minimum(others[rows], others[columns])
    same = (cosines >= limits.cosine) & (alike >= limits.likeness) & (1.0 - alike <= limits.ratio * near)
    places = [(split.name, i) for split in observed for i in range(len(split))]
    found = {}
    for row, column, cosine, score in zip(rows[same], columns[same], cosines[same], alike[same], strict=True):
        one, two = sorted((int(row), int(column)))
        found[one, two] = Pair(*places[one], *places[two], round(float(cosine), 4), round(float(score), 4))
    return tuple(sorted(found.values(), key=lambda pair: -pair.likeness))


def _compared(
    features: Floats, sketches: Sketches, limits: Thresholds, likeness: Likeness
) -> tuple[list[tuple[Ints, Ints, Floats, Floats]], Floats]:
    """(sample, neighbour, cosine, likeness) in several parts, and how far each sample is from what is no copy of it."""
    count = len(features)
    asked, found, others = np.arange(count), [], np.full(count, np.inf)
    begin, end = 0, min(_NEAREST, count - 1)
    while len(asked) and begin < end:
        rows, columns, cosines = _neighbours(features, asked, begin, end)
        alike = likeness.pairs(sketches, sketches, rows, columns)
        found.append((rows, columns, cosines, alike))
        here = alike.reshape(len(asked), -1)
        unlike = here < limits.likeness
        known = unlike.any(axis=1)
        if begin:
            others[asked[known]] = 1.0 - np.where(unlike, here, -np.inf).max(axis=1)[known]
        elif end == _NEAREST:  # of fewer samples all are neighbours, and the last of them says nothing
            others = 1.0 - here.min(axis=1)
        asked, farther = asked[~known], min(2 * end, count - 1)
        begin, end = end if farther <= _MOST else max(end, farther - 1), farther
    return found, others


def _directions(features: Floats, centre: Floats) -> Floats:
    """Unit vectors from the centre; samples in the centre itself all point the same way."""
    moved = features.astype(np.float32) - centre
    sizes = np.linalg.norm(moved, axis=1, keepdims=True)
    still = sizes[:, 0] <= 1e-6 * (1.0 + float(np.linalg.norm(centre)))
    moved[still] = 1.0
    sizes[still] = moved.shape[1] ** 0.5
    directions: Floats = moved / sizes
    return directions


def _neighbours(directions: Floats, samples: Ints, begin: int, end: int) -> tuple[Ints, Ints, Floats]:
    """(sample, neighbour, cosine) of the samples' neighbours from rank ``begin`` up to ``end``, sample by sample."""
    columns, cosines = [], []
    for start in range(0, len(samples), _BLOCK):
        rows = samples[start : start + _BLOCK]
        block = directions[rows] @ directions.T
        block[np.arange(len(rows)), rows] = -np.inf
        chosen = np.argpartition(-block, (begin, end - 1), axis=1)[:, begin:end]
        columns.append(chosen.ravel())
        cosines.append(np.take_along_axis(block, chosen, axis=1).ravel())
    return np.repeat(samples, end - begin), np.concatenate(columns), np.concatenate(cosines)


def _copies(feeds: Feeds) -> Iterator[Feeds]:
    """Batches of altered samples, always the same ones."""
    for change in (_moved, _blurred):
        yield {name: _altered(array, change) for name, array in feeds.items()}


def _altered(array: Floats, change: Callable[[Floats], Floats]) -> Floats:
    rng = np.random.default_rng(0)
    altered: Floats
    if is_picture(array):
        changed = change(array.astype(np.float32))
        noise = rng.normal(0.0, _NOISE * array.std(), array.shape)
        altered = changed + noise if array.dtype.kind == "f" else np.clip(np.rint(changed + noise), 0, 255)
    elif array.dtype.kind == "f":
        altered = array + rng.normal(0.0, _NOISE, array.shape) * array.std(axis=0)
    else:  # replaced by what stands there in another sample
        altered = np.where(rng.random(array.shape) < _NOISE, np.roll(array, 1, axis=0), array)
    return altered.astype(array.dtype)


def _moved(pictures: Floats) -> Floats:
    """Moved down and to the right, brighter and with more contrast."""
    for axis in _sides(pictures):
        pictures = _shifted(pictures, axis, _MOVED)
    brighter: Floats = pictures * 1.1 + 0.1 * pictures.std()
    return brighter


def _blurred(pictures: Floats) -> Floats:
    """Averaged with its neighbourhood; what that is depends on the size, or small pictures would be wiped out."""
    for axis in _sides(pictures):
        pictures = pictures / 2 + _shifted(pictures, axis, _MOVED) / 4 + _shifted(pictures, axis, -_MOVED) / 4
    return pictures


def _shifted(pictures: Floats, axis: int, share: float) -> Floats:
    """Moved by a share of the side, between whole pixels by linear interpolation."""
    size = pictures.shape[axis]
    at = np.clip(np.arange(size) - share * size, 0, size - 1)
    low = np.floor(at).astype(int)
    weight = np.expand_dims((at - low).astype(np.float32), tuple({0, 1, 2, 3} - {axis}))
    before, after = np.take(pictures, low, axis=axis), np.take(pictures, np.minimum(low + 1, size - 1), axis=axis)
    moved: Floats = before * (1 - weight) + after * weight
    return moved


def _sides(pictures: Floats) -> tuple[int, int]:
    return (1, 2) if pictures.shape[-1] <= 4 < pictures.shape[1] else (2, 3)
