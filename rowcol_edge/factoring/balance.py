"""How much widths should count beside ranks.

The predicted loss takes each layer and each set of channels for the only one, and what is cut deep for a small change
(see `sensitivity`): it is off by a factor that is another one for widths than for ranks, and for each network. So a
plan is made once more with widths that count more, and both models are tried on calibration samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from rowcol_edge.calling import evaluating
from rowcol_edge.errors import BudgetError
from rowcol_edge.factoring.apply import factored
from rowcol_edge.factoring.outcomes import Departure, Feeds, outcome
from rowcol_edge.factoring.plan import FactorPlan
from rowcol_edge.factoring.sensitivity import chunked
from rowcol_edge.factoring.spaces import Progress
from rowcol_edge.factoring.study import Study

FACTORS = (1.0, 1.5)
_NEARER = 0.85
"""Of the loss of the plan of factor 1: what is closer on so few samples, without the second pass, may be chance."""


def nearer(study: Study, make: Callable[[float], FactorPlan], progress: Progress | None = None) -> FactorPlan:
    """Of the two plans that ``make`` makes by factor, the one of factor 1 unless the other's model is clearly nearer to
    the original; `FactorPlan.made_by` of that says so.

    Without the second pass, which would take most of the time. Whatever ``make`` raises for factor 1.
    """
    study.tried.clear()
    first = make(FACTORS[0])
    if not first.channels:
        return first
    try:
        second = make(FACTORS[1])
    except BudgetError:  # of two limits the mixture is sought by a few steps, which may end elsewhere
        return first
    if second.digest == first.digest:
        return first
    batches = chunked(study.trial_samples)
    with evaluating(study.folded):
        references = [outcome(study.folded, batch) for batch in batches]
    if not references[0]:
        return first
    models, losses = [], []
    for done, plan in enumerate((first, second)):
        if progress is not None:
            progress("try plans", done, 2)
        models.append(factored(study, replace(plan, refit=False)))
        losses.append(_lost(study, models[-1], batches, references))
    if progress is not None:
        progress("try plans", 2, 2)
    closer = int(losses[1] < _NEARER * losses[0])
    study.tried[replace((first, second)[closer], refit=False).digest] = models[closer]
    if not closer:
        return first
    return replace(second, made_by=f"{second.made_by}, widths counted {FACTORS[1]:g} times")


def _lost(
    study: Study, model: nn.Module, batches: Sequence[Feeds], references: Sequence[Sequence[torch.Tensor]]
) -> float:
    departure = Departure(classify=study.classify)
    with evaluating(model):
        for batch, reference in zip(batches, references, strict=True):
            everywhere = torch.ones(min(len(array) for array in batch.values()), dtype=torch.bool)
            departure.add(reference, outcome(model, batch), everywhere)
    return math.inf if math.isnan(departure.value) else departure.value  # what gives no numbers is no nearer
