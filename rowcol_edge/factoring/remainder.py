"""What of a model stays as it is whatever the plan: where a budget cannot be met, the reason is mostly there."""

from __future__ import annotations

from dataclasses import dataclass

from rowcol_edge.factoring import thin
from rowcol_edge.factoring.layers import ALREADY_FACTORED, stored
from rowcol_edge.factoring.study import Study

_SHARE = 0.01  # of the model's parameters: less is no reason for anything
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Remainder:
    """Parameters of one module that no form makes fewer, and why."""

    name: str
    parameters: int
    reason: str

    def __str__(self) -> str:
        return f"{self.name or 'the model itself'} ({self.parameters:,} parameters): {self.reason}"


def remainders(study: Study) -> tuple[Remainder, ...]:
    """The largest first: layers that are not factored, and modules (embeddings, norms) that are no such layer."""
    found = []
    for name, info in study.infos.items():
        constant = "its output is constant on the calibration data"
        reason = info.skip or (constant if study.spaces[name].constant else "")
        if reason and not reason.startswith(ALREADY_FACTORED):  # those can still get fewer channels
            found.append(Remainder(name, stored(study.folded.get_submodule(name)), reason))
    seen = {id(part) for name in study.infos for part in study.folded.get_submodule(name).parameters()}
    for name, module in study.folded.named_modules():
        own = [part for part in module.parameters(recurse=False) if id(part) not in seen]
        seen |= {id(part) for part in own}
        if own:
            reason = f"{type(module).__name__} is not factored"
            found.append(Remainder(name, sum(part.numel() for part in own), reason))
    return tuple(sorted(found, key=lambda each: -each.parameters))


def told(study: Study) -> str:
    """The largest remainders in words, and why channels stay where nothing weighed them; ``""`` where neither is."""
    return "; ".join(filter(None, (_largest(study), "" if thin.weighed(study) else _blind(study))))


def _blind(study: Study) -> str:
    why = f" ({study.without_gradients})" if study.without_gradients else ""
    return f"channels stay: no gradient says what the model's output makes of them{why}"


def _largest(study: Study) -> str:
    large = [each for each in remainders(study) if each.parameters >= _SHARE * study.parameters]
    if not large:
        return ""
    more = f", and {len(large) - _NAMED} more" if len(large) > _NAMED else ""
    return f"left as they are: {'; '.join(map(str, large[:_NAMED]))}{more}"
