"""Seconds of telephone prompts in five languages, from Debian's packages asterisk-core-sounds-*-wav.

    apt-get install asterisk-core-sounds-en-wav asterisk-core-sounds-es-wav asterisk-core-sounds-fr-wav \\
        asterisk-core-sounds-it-wav asterisk-core-sounds-ru-wav

Real recordings, 8 kHz, 16 bit: some 560 prompts a language, half an hour of it. Each language has one speaker, so most
of this is as much about voices as about languages; English and Spanish have the same one, and only the language tells
them apart. A prompt of the same name (it says the same in each language) is in the same split for every language, so
that nothing is heard twice.
"""

from __future__ import annotations

import functools
import hashlib
import os
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rowcol_edge.errors import DataError

BATCH = 64
RATE = 8000
LANGUAGES = ("en_US_f_Allison", "es_MX_f_Allison", "fr_CA_f_June", "it_IT_m_Carlo", "ru_RU_f_IvrvoiceRU")
SOUNDS = Path("/usr/share/asterisk/sounds")  # ASTERISK_SOUNDS names another folder
#: of 100 prompt names
SHARES = {"train": 60, "calibration": 8, "selection": 16, "test": 16}
_LONGEST = 6  # seconds that one prompt gives at most: a few tell stories of more than a minute
QUIET = 0.01  # root mean square, of full scale, below which a second is none of speech


def split_of(name: str) -> str:
    """The split of a prompt, by a digest of its name."""
    place = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    raise AssertionError("the shares add up to 100")


@functools.cache
def prompts(split: str) -> tuple[tuple[np.ndarray, int], ...]:
    """(sound float32 (T,) from -1 to 1, label) pairs, languages taking turns in the order of the prompts' names."""
    if split not in SHARES:
        raise DataError("split", expected=f"one of {tuple(SHARES)}", got=repr(split))
    root = Path(os.environ.get("ASTERISK_SOUNDS", SOUNDS))
    found: list[tuple[str, int, Path]] = []
    for label, language in enumerate(LANGUAGES):
        folder = root / language
        if not folder.is_dir():
            hint = "apt-get install asterisk-core-sounds-{en,es,fr,it,ru}-wav (Debian), or set ASTERISK_SOUNDS"
            raise DataError(str(folder), expected="a folder of spoken prompts", got="no such folder", hint=hint)
        names = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.wav")}
        found += [(name, label, file) for name, file in names.items() if split_of(name) == split]
    read = ((_sound(file), label) for _, label, file in sorted(found) if file.parent.name != "silence")
    return tuple((sound, label) for sound, label in read if len(sound))


def _sound(path: Path) -> np.ndarray:
    with wave.open(str(path)) as stream:
        if (stream.getframerate(), stream.getnchannels(), stream.getsampwidth()) != (RATE, 1, 2):
            raise DataError(str(path), expected=f"{RATE} Hz, one channel, 16 bit", got=str(stream.getparams()))
        frames = stream.readframes(_LONGEST * RATE)
    return np.frombuffer(frames, "<i2").astype(np.float32) / 2**15


def seconds(sound: np.ndarray) -> Iterator[np.ndarray]:
    """The sound second by second, (1, 8000) each; a short rest is dropped, a short sound is padded with silence."""
    if len(sound) < RATE:
        sound = np.pad(sound, (0, RATE - len(sound)))
    for start in range(0, len(sound) - RATE + 1, RATE):
        part = sound[start : start + RATE]
        if loudness(part) >= QUIET:
            yield level(part)[None]


def loudness(part: np.ndarray) -> float:
    return float(np.sqrt(np.mean(part**2)))


def level(part: np.ndarray) -> np.ndarray:
    """The part with a root mean square of 1: how loud a language was recorded must not tell it."""
    return part / max(loudness(part), 1e-6)


def images(split: str) -> Iterator[tuple[np.ndarray, int]]:
    """(second of sound (1, 8000) float32, label) pairs."""
    for sound, label in prompts(split):
        for part in seconds(sound):
            yield part, label


def batches(split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs float32 (N, 1, 8000), labels int64 (N,)) with N ≤ 64."""
    inputs: list[np.ndarray] = []
    labels: list[int] = []
    for part, label in images(split):
        inputs.append(part)
        labels.append(label)
        if len(inputs) == BATCH:
            yield np.stack(inputs), np.asarray(labels, np.int64)
            inputs, labels = [], []
    if inputs:
        yield np.stack(inputs), np.asarray(labels, np.int64)


def train() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("train")


def calibration() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("calibration")


def selection() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("selection")


def test() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("test")
