"""What is to be measured where: one job for each bundle and board of its target."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..device.bundle import Bundle
from ..errors import ConfigError, did_you_mean
from .boards import Board
from .queueing import Job
from .remote import arguments


def profiles(
    bundles: Sequence[Path], boards: Sequence[Board], options: Mapping[str, Any], *, once: bool = False
) -> list[Job]:
    """Every bundle on every board of its target; with ``once`` on one of them, whichever is free first.

    ConfigError: a target without a board, a bundle twice, an arm or an option that is not known. BundleError: a bundle
    that is damaged.
    """
    given = {key: value for key, value in options.items() if value is not None}
    arguments(given)
    found: list[Job] = []
    for work in _told_apart([_work(path, given) for path in bundles]):
        target = work["target"]
        fitting = [board for board in boards if board.target == target]
        if not fitting:
            known = {board.target for board in boards}
            raise ConfigError(
                f"a board for {work['bundle']}", expected=f"target {target}",
                got=f"boards of {', '.join(sorted(known))}", hint=did_you_mean(target, known) or "add one to the file",
            )  # fmt: skip
        groups = [fitting] if once else [[board] for board in fitting]
        found += [_job(work, group) for group in groups]
    return found


def _work(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    with Bundle.open(path) as bundle:
        for name in filter(None, (*(options.get("arms") or ()), options.get("baseline"))):
            bundle.arm(name)
        return {
            "kind": "profile", "bundle": str(path.resolve()), "digest": bundle.digest, "name": bundle.manifest.name,
            "target": str(bundle.manifest.target.get("name", "")), "options": options,
        }  # fmt: skip


def _told_apart(works: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bundles of one name, as builds of other budgets are, get the first digits of their digests besides."""
    names, digests = Counter(work["name"] for work in works), Counter(work["digest"] for work in works)
    for work in works:
        if digests[work["digest"]] > 1:
            raise ConfigError("bundles", expected="each one once", got=f"{work['bundle']} twice")
    return [{**w, "name": f"{w['name']} {w['digest'][:8]}" if names[w["name"]] > 1 else w["name"]} for w in works]


def identity(*what: Any) -> str:
    """Letters and digits that stand for these JSON values."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _job(work: dict[str, Any], boards: Sequence[Board]) -> Job:
    """The machine of a ``local`` board is that of its tag's worker."""
    reached = [(b.name, b.on, b.python, b.folder, b.tag if b.local else "") for b in boards]
    key = identity(work["digest"], work["options"], reached)
    place = boards[0].name if len(boards) == 1 else work["target"]
    return Job(key, f"{work['name']} on {place}", work, tuple(board.name for board in boards))
