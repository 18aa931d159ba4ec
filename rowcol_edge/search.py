"""Which plan: from a file, from an energy, from cost limits, or the smallest one whose quality holds.

Quality is judged on the selection split only. The plans that are tried form a ladder, from careful to bold; the search
bisects it, because a bolder plan is seldom better, and says in its trials what it tried. Where costs are limited too
and what bisection found is too dear, the plans within the limits are tried before the budgets are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
from torch import nn

from . import evaluation, limits
from .budgets import Budgets
from .datasets import evenly
from .errors import BudgetError
from .evaluation import Judged
from .factoring import balance, ranks
from .factoring.apply import factored
from .factoring.costs import LayerInfo, Split
from .factoring.plan import ChannelPlan, FactorPlan, LayerPlan
from .factoring.study import Study
from .job import Job, Progress
from .limits import Limit

#: an extra operator costs time too, so a layer must save more than the count says before it is worth factoring
BREAK_EVEN = 0.75
DEFAULT_ENERGY = 0.999
DEFAULT_LOSS = 1e-4
"""Predicted loss that is taken where nothing says how much may be lost: nats for a classifier, else half the squared
relative error of the outputs about their mean. What really follows may be several times as much, as layers add up."""
_MOST_CAREFUL, _BOLDEST, _PLANS = 0.97, 0.03, 31
_WITHIN = 8  # plans within the cost limits that are tried where the largest that keeps the drop is too dear
BYTES_PER_WEIGHT = {
    "fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int8-io": 1.0, "int8-dynamic": 1.0,
    "int8-weights": 1.0, "int4-weights": 0.5,
}  # fmt: skip

#: runs a module on the selection split
JudgeModule = Callable[[nn.Module, str], Judged]


@dataclass(frozen=True, slots=True)
class Trial:
    """One plan that was tried; ``value`` and ``drop`` are on the selection split, at fp32."""

    made_by: str
    parameters: int
    macs: int
    value: float | None
    drop: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Choice:
    """The plans from careful to bold, up to and including the chosen one (the last), and all trials.

    Of those before it only what was tried was made twice (see `factoring.balance`).
    """

    plans: tuple[FactorPlan, ...]
    trials: tuple[Trial, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Choice:
        """What `to_json` wrote, every digit of it."""
        values = json.loads(text)
        plans = (
            FactorPlan(
                **{
                    **p,
                    "layers": tuple(LayerPlan(**layer) for layer in p["layers"]),
                    "channels": tuple(ChannelPlan(**each) for each in p["channels"]),
                }
            )
            for p in values["plans"]
        )
        return cls(tuple(plans), tuple(Trial(**t) for t in values["trials"]))


def choose(
    study: Study,
    job: Job,
    multiple: int,
    precision: str,
    reference: Judged | None,
    judge: JudgeModule,
    progress: Progress,
) -> Choice:
    """The plan for this job.

    Raises:
        PlanError: a plan file that does not fit the model.
        BudgetError: limits that no plan of the ladder meets; says which and by how much.
    """
    options, name = job.options, job.model.name
    fixed: FactorPlan | None = None
    if options.plan is not None:
        plan = replace(FactorPlan.read(options.plan), recovered=0)  # no model of this run has been trained yet
        fixed = ranks.refresh(
            plan, study.infos, study.spaces, study.channels if plan.channels else (), study.input_spaces
        )
    elif options.energy is not None:
        fixed = ranks.plan_by_energy(study.infos, study.spaces, options.energy, rank_multiple=multiple, model=name)
    elif job.budgets.get("drop") is None:
        fixed = _by_cost(study, job.budgets, multiple, precision, name, progress)
    if fixed is not None:
        fixed = fixed if options.plan is not None else replace(fixed, refit=options.refit is not False)
        return Choice((fixed,), (_judged(study, job, fixed, reference, judge),))
    if reference is None:
        raise BudgetError("budget drop", expected="labelled selection data", got="none")
    return _by_quality(study, job, multiple, precision, reference, judge, progress)


def _judged(study: Study, job: Job, plan: FactorPlan, reference: Judged | None, judge: JudgeModule) -> Trial:
    """A plan that was not searched, judged where quality can be; BudgetError if it misses the drop."""
    if reference is None:
        return trial(study, plan, None, None)
    module = factored(study, plan)
    judged = judge(module, "judge the plan")
    study.keep(plan.digest, module)
    lost = evaluation.drop(job, reference, judged)
    budget = job.budgets.get("drop")
    if budget is not None and lost > budget.limit + 1e-9:
        raise BudgetError(
            f"budget {budget.text}",
            expected=f"a drop of at most {budget.limit:g} pp on the selection split",
            got=f"{lost:.2f} pp with this plan ({plan.made_by}), at fp32",
            hint="leave out --plan and --energy to have a plan searched that keeps the drop",
        )
    return trial(study, plan, judged.value, lost)


def smaller(
    study: Study,
    plan: FactorPlan,
    excess_bytes: float,
    precision: str,
    budgets: Budgets,
    progress: Progress | None = None,
) -> FactorPlan:
    """A plan whose compiled file is smaller by ``excess_bytes`` and that keeps the other limits; BudgetError where
    there is none."""
    count = study.parameters - plan.saved_parameters - int(1.05 * excess_bytes / BYTES_PER_WEIGHT[precision]) - 1
    found = limits.of_budgets(study, budgets, BYTES_PER_WEIGHT[precision])
    found = (limits.of_parameters(study, max(1, count), "size"), *(each for each in found if each.kind == "macs"))
    return replace(within(study, found, plan.rank_multiple, plan.model, progress), refit=plan.refit)


def within(
    study: Study, found: Sequence[Limit], multiple: int, model: str, progress: Progress | None = None
) -> FactorPlan:
    """The plan within limits, of two the nearer one; errors as `limits.cheapest`."""
    return balance.nearer(study, partial(limits.cheapest, study, found, multiple, model), progress)


def check_costs(study: Study, plan: FactorPlan, budgets: Budgets, hint: str) -> None:
    """Raises BudgetError, with this hint, where the plan exceeds a parameter or MAC limit; bytes are not looked at, as
    files say what those are."""
    counted = Budgets(tuple(each for each in budgets.entries if each.kind != "size"))
    for limit, got in _exceeded(study, plan, limits.of_budgets(study, counted, BYTES_PER_WEIGHT["fp32"])):
        raise BudgetError(
            f"budget {limit.text}",
            expected=f"at most {limit.most:,.0f} {limit.kind}",
            got=f"{got:,} ({got / limit.most:.2f} times the limit)",
            hint=hint,
        )


def _exceeded(study: Study, plan: FactorPlan, found: Sequence[Limit]) -> Iterator[tuple[Limit, int]]:
    """Each limit that the plan does not keep, and what it costs there."""
    cost = trial(study, plan, None, None)
    left = {"parameters": cost.parameters, "macs": cost.macs}
    return ((each, left[each.kind]) for each in found if left[each.kind] > each.most)


class Ladder:
    """Distinct plans from careful to bold, each of the least predicted loss at its cost: its share of the model's
    parameters where bytes are limited beside the quality (``kinds``: ``params`` or ``size``), of its MACs where those
    are, else the mean of both shares, as both bytes and time count. `nearer` makes the better of two for a cost.

    Attributes:
        plans: the first leaves every layer dense.
    """

    def __init__(self, study: Study, multiple: int, model: str, kinds: Collection[str] = ()) -> None:
        bytes_limited, macs_limited = not {"params", "size"}.isdisjoint(kinds), "macs" in kinds
        self._share_of_macs = 0.5 if bytes_limited == macs_limited else float(macs_limited)
        self._study, self._multiple, self._model = study, multiple, model
        self._allocator = cache(partial(study.allocator, multiple, BREAK_EVEN))  # one knows a cost again
        self._costs: list[float] = []
        plans: list[FactorPlan] = []
        for share in (1.0, *np.geomspace(_MOST_CAREFUL, _BOLDEST, _PLANS)):
            try:
                plan = self._plan(float(share))
            except ranks.OverBudgetError:
                break
            if not plans or self._saved(plan) > self._saved(plans[-1]):
                plans.append(plan)
                self._costs.append(float(share))
        self.plans = tuple(plans)

    def nearer(self, index: int, progress: Progress | None = None) -> FactorPlan:
        """The plan of that cost, or another of which the model is clearly nearer (see `factoring.balance`)."""
        return balance.nearer(self._study, partial(self._plan, self._costs[index]), progress)

    def _plan(self, share: float, factor: float = 1.0) -> FactorPlan:
        study = self._study
        return ranks.plan_by_cost(
            study.infos, study.spaces, self._cost, total=1.0, limit=share, rank_multiple=self._multiple,
            break_even=BREAK_EVEN, made_by=f"cost<={share:.3f}", model=self._model,
            allocator=self._allocator(factor), inputs=study.input_spaces,
        )  # fmt: skip

    def _cost(self, info: LayerInfo, split: Split | None) -> float:
        return self._shares(ranks.parameters(info, split), ranks.macs(info, split))

    def _saved(self, plan: FactorPlan) -> float:
        return self._shares(plan.saved_parameters, plan.saved_macs)

    def _shares(self, parameters: float, macs: float) -> float:
        of_macs = self._share_of_macs
        return (1.0 - of_macs) * parameters / self._study.parameters + of_macs * macs / max(1, self._study.macs)


def _by_quality(
    study: Study,
    job: Job,
    multiple: int,
    precision: str,
    reference: Judged,
    judge: JudgeModule,
    progress: Progress,
) -> Choice:
    budget = job.budgets.get("drop")
    assert budget is not None  # choose() comes here for no other reason
    kinds = [each.kind for each in job.budgets.entries]
    costs = limits.of_budgets(study, job.budgets, BYTES_PER_WEIGHT[precision])
    if costs:  # limits that no plan meets are refused before anything is tried
        limits.cheapest(study, costs, multiple, job.model.name)
    rungs, refit = Ladder(study, multiple, job.model.name, kinds), job.options.refit is not False
    plans = [replace(plan, refit=refit) for plan in rungs.plans]
    trials: list[Trial] = []
    tried: set[str] = set()

    def holds(plan: FactorPlan) -> bool:
        tried.add(plan.digest)
        module = factored(study, plan, progress)
        judged = judge(module, f"try {plan.made_by}")
        lost = evaluation.drop(job, reference, judged)
        trials.append(trial(study, plan, judged.value, lost))
        held = lost <= budget.limit + 1e-9
        if held:
            study.keep(plan.digest, module)
        return held

    def best_holds(index: int) -> bool:
        plans[index] = replace(rungs.nearer(index, progress), refit=refit)
        return holds(plans[index])

    chosen = boldest(best_holds, len(plans), lambda done, total: progress("search ranks", done, total))
    if not any(_exceeded(study, plans[chosen], costs)):
        return Choice(tuple(plans[: chosen + 1]), _by_size(trials))
    least = replace(within(study, costs, multiple, job.model.name, progress), refit=refit)
    fitting = [plan for plan in (least, *plans[chosen:]) if not any(_exceeded(study, plan, costs))][:_WITHIN]
    for count, plan in enumerate(fitting):
        progress("search ranks within the limits", count, len(fitting))
        if holds(plan):
            return Choice((plan,), _by_size(trials))
    missed = trials[-len(fitting) :]
    # a drop on some hundred samples does not rise evenly: what bisection found may not be the boldest that holds
    dear = [plan for plan in plans[chosen + 1 :] if plan.digest not in tried]
    dear = [dear[index] for index in evenly(len(dear), min(_WITHIN, len(dear)))]
    for count, plan in enumerate(reversed(dear)):
        progress("search for the nearest plan", count, len(dear))
        if holds(plan):
            raise _apart(study, plan, missed, job.budgets, costs)
    raise _apart(study, plans[chosen], missed, job.budgets, costs)


def _by_size(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """From careful to bold."""
    return tuple(sorted(trials, key=lambda tried: -tried.parameters))


def _apart(
    study: Study, kept: FactorPlan, missed: Sequence[Trial], budgets: Budgets, costs: Sequence[Limit]
) -> BudgetError:
    """Budgets each of which can be met: how far the best plans are from meeting all."""
    nearest = min(missed, key=lambda tried: tried.drop or 0.0)
    over = ", ".join(
        f"{got:,} {each.kind} ({got / each.most:.2f} times {each.text})" for each, got in _exceeded(study, kept, costs)
    )
    return BudgetError(
        f"budgets {budgets}",
        expected="one plan that keeps all of them",
        got=f"a drop of {nearest.drop:.2f} pp, the least of {len(missed)} plans within the cost limits; "
        f"the boldest plan found that keeps the drop has {over}",
        hint="allow a larger drop or a higher cost",
    )


def boldest(holds: Callable[[int], bool], count: int, progress: Callable[[int, int], None]) -> int:
    """Largest index below ``count`` that holds, by bisection; index 0 (nothing changed) holds by definition."""
    low, high = 0, count  # low holds, high does not
    steps = max(1, (count - 1).bit_length())
    done = 0
    while high - low > 1:
        progress(done, max(steps, done + 1))
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
        done += 1
    progress(max(steps, done), max(steps, done))
    return low


def _by_cost(
    study: Study, budgets: Budgets, multiple: int, precision: str, model: str, progress: Progress
) -> FactorPlan:
    """The most careful plan within the cost limits; without limits, one whose loss hardly shows."""
    found = limits.of_budgets(study, budgets, BYTES_PER_WEIGHT[precision])
    return within(study, found, multiple, model, progress) if found else _by_loss(study, multiple, model)


def _by_loss(study: Study, multiple: int, model: str) -> FactorPlan:
    """The boldest plan of a loss that hardly shows; by energy where no loss can be predicted."""
    if any(study.spaces[name].losses is None for name in study.spaces):
        return ranks.plan_by_energy(
            study.infos, study.spaces, DEFAULT_ENERGY, rank_multiple=multiple, break_even=BREAK_EVEN, model=model
        )
    fitting = [plan for plan in Ladder(study, multiple, model).plans if (plan.loss or 0.0) <= DEFAULT_LOSS]
    return replace(fitting[-1], made_by=f"loss<={DEFAULT_LOSS:g}")


def trial(study: Study, plan: FactorPlan, value: float | None, drop: float | None) -> Trial:
    """What a plan costs, with the quality it was seen to have."""
    return Trial(plan.made_by, study.parameters - plan.saved_parameters, study.macs - plan.saved_macs, value, drop)
