"""Sentences about functions: the first line of each docstring of the installed scipy, by subpackage.

Real text that is there wherever scipy is, and that is nobody's secret; nothing of scipy is imported, its files are
parsed. A good embedding puts sentences of one subpackage next to each other, which is what the metric counts. Another
release of scipy has other sentences, so figures belong to a release (these were made with 1.17).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rowcol_edge.errors import DataError, MissingDependencyError
from rowcol_edge.user_code import import_file

HERE = Path(__file__).resolve().parent
BATCH = 32
TOKENS = 48
SUBJECTS = ("interpolate", "linalg", "ndimage", "optimize", "signal", "sparse", "spatial", "stats")
#: sentences of each subject
SPLITS = {"calibration": 16, "selection": 25, "test": 25}
SHORTEST = 25  # characters

Feeds = dict[str, np.ndarray]


@functools.cache
def sentences() -> dict[str, tuple[str, ...]]:
    """By subject, in the order of a digest: always the same, and not that of the files. None has two subjects."""
    spec = importlib.util.find_spec("scipy")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError("sentences to embed", package="scipy")
    root = Path(next(iter(spec.submodule_search_locations)))
    found = {subject: _sentences(root / subject) for subject in SUBJECTS}
    every = [text for texts in found.values() for text in texts]
    shared = {text for text in every if every.count(text) > 1}
    return {
        subject: tuple(sorted(texts - shared, key=lambda text: hashlib.sha256(text.encode()).hexdigest()))
        for subject, texts in found.items()
    }


def _sentences(folder: Path) -> set[str]:
    texts = set()
    for file in sorted(folder.rglob("*.py")):
        if "tests" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first = (ast.get_docstring(node) or "").strip().split("\n\n")[0]
                texts.add(" ".join(first.split()))
    return {text for text in texts if len(text) >= SHORTEST}


def texts(split: str) -> tuple[list[str], np.ndarray]:
    """Sentences of a split, subjects taking turns, and the place of each one's subject."""
    if split not in SPLITS:
        raise DataError("split", expected=f"one of {tuple(SPLITS)}", got=repr(split))
    start = sum(count for name, count in SPLITS.items() if list(SPLITS).index(name) < list(SPLITS).index(split))
    for subject, known in sentences().items():
        if len(known) < sum(SPLITS.values()):
            expected = f"{sum(SPLITS.values())} sentences"
            raise DataError(f"scipy.{subject}", expected=expected, got=str(len(known)), hint="another release of scipy")
    rows = [
        (sentences()[subject][place], label)
        for place in range(start, start + SPLITS[split])
        for label, subject in enumerate(SUBJECTS)
    ]
    return [text for text, _ in rows], np.array([label for _, label in rows], np.int64)


def tokens(some: list[str]) -> Feeds:
    """Token ids and mask, (N, 48) int64 each."""
    try:
        from tokenizers import Tokenizer
    except ImportError as e:
        raise MissingDependencyError("tokenizing text", package="tokenizers") from e
    tokenizer = Tokenizer.from_file(str(import_file(HERE / "model.py", DataError).folder() / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    encoded = tokenizer.encode_batch(some)
    return {
        "input_ids": np.array([one.ids for one in encoded], np.int64),
        "attention_mask": np.array([one.attention_mask for one in encoded], np.int64),
    }


def images(split: str) -> Iterator[tuple[Feeds, int]]:
    """(feeds of one sentence, label) pairs."""
    some, labels = texts(split)
    for text, label in zip(some, labels, strict=True):
        yield tokens([text]), int(label)


def batches(split: str) -> Iterator[tuple[Feeds, np.ndarray]]:
    """(feeds, labels int64 (N,)) with N ≤ 32."""
    some, labels = texts(split)
    feeds = tokens(some)
    for start in range(0, len(labels), BATCH):
        part = slice(start, start + BATCH)
        yield {name: array[part] for name, array in feeds.items()}, labels[part]


def calibration() -> Iterator[tuple[Feeds, np.ndarray]]:
    return batches("calibration")


def selection() -> Iterator[tuple[Feeds, np.ndarray]]:
    return batches("selection")


def test() -> Iterator[tuple[Feeds, np.ndarray]]:
    return batches("test")
