"""From the blocks of a session to its comparisons: which arms are set against which, and what may be said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .profile import NULL, Block, Comparison
from .stats import MIN_ROUNDS, NO_DIFFERENCE, NOT_COMPARABLE, ratio_interval, spread
from .system import EMULATED, PREDICTED

WIDE_SPREAD = 0.10
UNSETTLED_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Judgement:
    """All comparisons of a session, that of the null arm, and what to know before believing them."""

    comparisons: tuple[Comparison, ...]
    null: Comparison
    warnings: tuple[str, ...]


def judge(
    blocks: Mapping[str, Sequence[Block]],
    pairs: Sequence[tuple[str, str]],
    null_of: str,
    evidence: str,
    obstacle: str = "",
) -> Judgement:
    """Compare the pairs (arm, baseline) and the null arm with the arm it copies.

    ``obstacle`` is a reason why nothing of this session may be compared. Where the null arm's interval leaves out 1,
    the session shows differences that are not there: an effect no larger than the null's bound is then no finding.
    """
    null = compare(blocks, NULL, null_of, evidence, obstacle)
    compared = tuple(compare(blocks, arm, baseline, evidence, obstacle) for arm, baseline in pairs)
    warnings = _block_warnings(blocks)
    if null.verdict not in (NO_DIFFERENCE, NOT_COMPARABLE):
        bound = max(abs(math.log(value)) for value in (null.ci_low, null.ci_high) if value)
        compared = tuple(_downgrade(c, bound) for c in compared)
        warnings.insert(
            0,
            f"the null arm ({null_of} twice) came out {null.verdict}, ratio {null.ratio:.3f}: something disturbed this "
            f"session; effects up to {math.expm1(bound):.1%} count as none. End other work, then measure again",
        )
    return Judgement(compared, null, tuple(warnings))


def compare(
    blocks: Mapping[str, Sequence[Block]], arm: str, baseline: str, evidence: str, obstacle: str = ""
) -> Comparison:
    """One paired comparison; only rounds that hold both arms count."""
    left = {block.round: block.median_ns for block in blocks[arm]}
    right = {block.round: block.median_ns for block in blocks[baseline]}
    rounds = sorted(left.keys() & right.keys())
    reason = obstacle or _obstacle(evidence, len(rounds))
    if reason:
        return Comparison(arm, baseline, None, None, None, NOT_COMPARABLE, evidence, len(rounds), reason)
    found = ratio_interval([left[r] for r in rounds], [right[r] for r in rounds])
    return Comparison(arm, baseline, found.ratio, found.low, found.high, found.verdict, evidence, found.rounds)


def _obstacle(evidence: str, rounds: int) -> str:
    if evidence in (EMULATED, PREDICTED):
        return f"{evidence} times are no latency"
    return f"{rounds} rounds, an interval needs {MIN_ROUNDS}" if rounds < MIN_ROUNDS else ""


def _downgrade(comparison: Comparison, bound: float) -> Comparison:
    if comparison.verdict in (NO_DIFFERENCE, NOT_COMPARABLE) or comparison.ratio is None:
        return comparison
    if abs(math.log(comparison.ratio)) > bound:
        return comparison
    return replace(comparison, verdict=NO_DIFFERENCE, reason="not larger than what the null arm shows")


def _block_warnings(blocks: Mapping[str, Sequence[Block]]) -> list[str]:
    spreads = {arm: spread([block.median_ns for block in of_arm]) for arm, of_arm in blocks.items()}
    wide = ", ".join(f"{arm} {value:.0%}" for arm, value in spreads.items() if value > WIDE_SPREAD)
    shares = {arm: sum(not block.settled for block in of_arm) / len(of_arm) for arm, of_arm in blocks.items()}
    unsettled = ", ".join(f"{arm} {share:.0%}" for arm, share in shares.items() if share > UNSETTLED_SHARE)
    warnings = []
    if wide:
        warnings.append(
            f"processes of the same arm differ (10th to 90th percentile of block medians: {wide}): ratios are those of "
            "a typical round; look at the block medians for two speeds or a busy machine"
        )
    if unsettled:
        warnings.append(
            f"the warm-up met its bound before the median was stable (share of blocks: {unsettled}): "
            "allow more --seconds"
        )
    return warnings
