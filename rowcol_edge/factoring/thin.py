"""Whether calibration data are enough to say what a plan loses on other inputs."""

from __future__ import annotations

from rowcol_edge.factoring.plan import FactorPlan
from rowcol_edge.factoring.study import Study

_NAMED = 3


def told(study: Study, plan: FactorPlan) -> str:
    """What is too thin for this plan in words, ``""`` if nothing is: no sample is left to judge directions on, or
    layers that it changes were measured at fewer rows than they have directions."""
    if not plan.changes:
        return ""
    said = []
    if not study.judges:
        said.append("fewer than 4 samples leave none to judge what directions are worth that they do not come from")
    thin = sorted(_thin(study, plan), key=lambda each: each[1] / each[2])
    if thin:
        named = ", ".join(f"{name} ({rows} of {size})" for name, rows, size in thin[:_NAMED])
        more = f" and {len(thin) - _NAMED} more" if len(thin) > _NAMED else ""
        said.append(f"fewer rows (samples × positions) than directions in {len(thin)} layer(s): {named}{more}")
    return f"too few calibration data: {'; '.join(said)}. New inputs may lose far more than predicted" if said else ""


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
        if rows < size:
            found.append((layer.name, rows, size))
    return found
