"""Whether gradients and calibration data are enough to say what a plan loses on other inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from rowcol_edge.factoring.plan import FactorPlan
from rowcol_edge.factoring.study import Study

_NAMED = 3
_JUDGED = 4  # different samples, of which one judges (see `study`)


def noted(study: Study, plan: FactorPlan) -> FactorPlan:
    """The plan with what is too thin for it as its note; without a predicted loss where that would count shares of
    variance as one."""
    note = ". ".join(filter(None, (_without_gradients(study, plan), told(study, plan))))
    unknown = any(study.spaces[layer.name].losses is None for layer in plan.projected)
    return replace(plan, note=note, loss=None, gap=None) if unknown else replace(plan, note=note)


def weighed(study: Study) -> bool:
    """Whether gradients said of any layer or channel that varies what it is worth; true where there is none to be made
    smaller."""
    if not study.spaces and all(each.fixed for each in study.channels):
        return True
    alive = (space for space in study.spaces.values() if not space.constant)
    return bool(study.channel_spaces) or any(space.dual is not None for space in alive)


def _without_gradients(study: Study, plan: FactorPlan) -> str:
    if not weighed(study):
        why = study.without_gradients or "all are zero, as behind a saturated or zero head"
        return (
            f"no gradient says what the model's output makes of its layers ({why}): they are weighed by the variance "
            "of what they give, channels stay, no loss is predicted, and to integers no second pass fits anything. "
            "Hand over the model up to its logits, without what stops gradients"
        )
    blind = [layer.name for layer in plan.projected if study.spaces[layer.name].dual is None]
    if not blind:
        return ""
    return f"no gradient reaches {_list(blind)}: weighed by the variance of its output; no loss is predicted"


def told(study: Study, plan: FactorPlan) -> str:
    """What is too thin for this plan in words, ``""`` if nothing is: no sample is left to judge directions on, the
    model gives the same for all, or layers that it changes were measured at fewer rows than they have directions.
    Samples that are there again tell nothing new and do not count."""
    if not plan.changes:
        return ""
    said = []
    if study.different < _JUDGED:
        few = f"different samples ({study.different} of {study.given})" if study.different < study.given else "samples"
        said.append(
            f"fewer than {_JUDGED} {few} leave none to judge what directions are worth that they do not come from"
        )
    elif not study.varies:
        said.append("the model's output is the same for all samples, so they do not show what it depends on")
    thin = sorted(_thin(study, plan), key=lambda each: each[1] / each[2])
    if thin:
        named = _list([f"{name} ({rows} of {size})" for name, rows, size in thin])
        said.append(f"fewer rows (samples × positions) than directions in {len(thin)} layer(s): {named}")
    return f"too few calibration data: {'; '.join(said)}. New inputs may lose far more than predicted" if said else ""


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _thin(study: Study, plan: FactorPlan) -> list[tuple[str, int, int]]:
    """Layers with the rows that they were measured at and the directions that these cannot fill. A layer gives as many
    as it has inputs, or outputs if those are fewer; what it takes is looked at where a row split could be made."""
    found = []
    for layer in plan.layers:
        if layer.form == "dense" or layer.name not in study.spaces:
            continue
        info = study.infos[layer.name]
        measured = [(study.spaces[layer.name].samples, min(info.fan_in, info.out_features))]
        if layer.name in study.input_spaces:
            measured.append((study.input_spaces[layer.name].samples, info.in_features))
        rows, size = min(measured, key=lambda each: each[0] / each[1])
        new = math.ceil(rows * study.different / study.given)
        if new < size:
            found.append((layer.name, new, size))
    return found
