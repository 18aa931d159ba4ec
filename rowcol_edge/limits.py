"""Limits on what a whole model may cost, and the plan of least predicted loss within all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from .budgets import Budgets
from .errors import BudgetError, ModelError
from .factoring import ranks, remainder
from .factoring.options import Cost, Options
from .factoring.plan import FactorPlan
from .factoring.study import Study

_HALVINGS, _ATTEMPTS = 4, 8
_NEAR = 0.998  # of a limit: what is left of it is worth no more attempts


@dataclass(frozen=True, slots=True)
class Limit:
    """``text`` is the budget in the user's words, ``kind`` what it counts (parameters or macs), ``cost`` that of a
    layer, ``dense`` that of the original and ``most`` what is allowed; ``bytes_each``: of a parameter, where the budget
    is one of bytes."""

    text: str
    kind: str
    cost: Cost
    dense: float
    most: float
    bytes_each: float | None = None

    def told(self, count: int) -> str:
        """So much of it, in what the budget is written in too."""
        text = f"{count:,} {self.kind}"
        return text if self.bytes_each is None else f"{text} ({count * self.bytes_each:,.0f} bytes)"


def check(study: Study, budgets: Budgets) -> None:
    """Raises ModelError where nothing of the model can be made smaller: it has no parameters, or a budget of parameters
    or MACs asks for less than it has and neither layers nor channels can be factored. Bytes depend on the precision."""
    if not study.parameters:
        raise ModelError("the model", expected="layers that can be factored", got="no parameters at all")
    if study.spaces or any(not each.fixed for each in study.channels):
        return
    for kind, dense in (("params", study.parameters), ("macs", study.macs)):
        budget = budgets.get(kind)
        if budget is not None and (not dense or budget.absolute(dense) < dense):
            raise ModelError(
                f"the model, for budget {budget.text}",
                expected="layers that can be factored",
                got=f"none: all of its {dense:,} {kind} stay",
                hint=remainder.told(study),
            )


def of_budgets(study: Study, budgets: Budgets, bytes_per_weight: float) -> tuple[Limit, ...]:
    """One limit on parameters (the tighter of ``params`` and ``size``) and one on MACs, as far as there are any."""
    counts = []
    for budget in budgets.entries:
        if budget.kind == "params":
            counts.append(of_parameters(study, max(1, int(budget.absolute(study.parameters))), budget.text))
        elif budget.kind == "size":
            most = max(1, int(budget.limit / bytes_per_weight))
            counts.append(replace(of_parameters(study, most, budget.text), bytes_each=bytes_per_weight))
    found = [min(counts, key=lambda limit: limit.most)] if counts else []
    macs = budgets.get("macs")
    if macs is not None:
        found.append(Limit(macs.text, "macs", ranks.macs, study.macs, macs.absolute(study.macs)))
    return tuple(found)


def of_parameters(study: Study, most: float, text: str) -> Limit:
    return Limit(text, "parameters", ranks.parameters, study.parameters, most)


def cheapest(study: Study, found: Sequence[Limit], multiple: int, model: str, factor: float = 1.0) -> FactorPlan:
    """The plan of least predicted loss within these limits, one or two.

    What widths lose counts ``factor`` times (see `factoring.balance`).

    With two, each cost counts as a share of its limit, and the mixture of both is sought at which neither is exceeded:
    the Lagrangian of two constraints, of whose multipliers only the ratio is left to choose (H. Everett, Generalized
    Lagrange multiplier method, 1963). Ranks are whole, so the mixture may be missed by a step: its limit is then
    tightened by what the plan exceeds. Beside it stands the plan that costs no more than each limit's own.

    Raises:
        BudgetError: which limit cannot be met, and by how much.
    """
    allocator = study.allocator(multiple, 1.0, factor)

    @cache  # the allocator knows a cost again
    def mixed(shares: tuple[float, ...]) -> Cost:
        counted = [(share, each) for share, each in zip(shares, found, strict=True) if share]
        return lambda info, split: sum([share * each.cost(info, split) / each.most for share, each in counted])

    def plan(shares: tuple[float, ...], limit: float = 1.0) -> FactorPlan:
        cost = mixed(shares)
        total = sum(share * each.dense / each.most for share, each in zip(shares, found, strict=True))
        return ranks.plan_by_cost(
            study.infos, study.spaces, cost, total=total, limit=limit, allowed=1.0, rank_multiple=multiple,
            made_by=", ".join(f"{each.kind}<={each.most:.0f}" for each in found), model=model,
            allocator=allocator, inputs=study.input_spaces,
        )  # fmt: skip

    def weighed(made: FactorPlan) -> float:
        more = 0.0 if allocator is None else allocator.lost({each.name: each.width for each in made.channels})
        return (made.loss or 0.0) + (factor - 1.0) * more

    def used(made: FactorPlan) -> list[float]:
        saved = {"parameters": made.saved_parameters, "macs": made.saved_macs}
        return [(each.dense - saved[each.kind]) / each.most for each in found]

    alone, missed = [], []
    for index, each in enumerate(found):
        try:
            alone.append(plan(tuple(float(place == index) for place in range(len(found)))))
        except ranks.OverBudgetError as e:
            missed.append((each, e.least * each.most))
            continue
        if max(used(alone[-1])) <= 1.0:
            return alone[-1]
    if missed:
        raise _missed(missed, multiple, remainder.told(study))
    options = Options(study.spaces, study.input_spaces, multiple) if allocator is None else allocator.options
    both = ranks.no_dearer(alone, study.infos, study.spaces, options, allocator=allocator, inputs=study.input_spaces)
    mixture, least = _mixed(plan, used, weighed)
    fitting = [made for made in (both, mixture) if made is not None and max(used(made)) <= 1.0]
    if fitting:
        return min(fitting, key=weighed)
    raise BudgetError(
        f"budgets {' and '.join(each.text for each in found)}",
        expected=" and ".join(f"at most {each.told(int(each.most))}" for each in found),
        got=f"{least:.3f} times one of them in the plan that comes nearest; each can be met without the other",
        hint=remainder.told(study),
    )


def _missed(missed: Sequence[tuple[Limit, float]], multiple: int, why: str) -> BudgetError:
    """Of limits that not even the smallest ranks meet, with what these cost."""
    reached = [(each, int(each.most), round(least)) for each, least in missed]
    hint = "allow at least " + " and ".join(each.told(least) for each, _, least in reached)
    smaller = f", or a target file of your own with a rank_multiple below {multiple}" if multiple > 1 else ""
    return BudgetError(
        f"budget{'s' if len(missed) > 1 else ''} {' and '.join(each.text for each, _ in missed)}",
        expected=" and ".join(f"at most {each.told(limit)}" for each, limit, _ in reached),
        got=" and ".join(f"{each.told(least)}, {least - limit:,} too many" for each, limit, least in reached)
        + ", at the smallest ranks",
        hint="; ".join(filter(None, (hint + smaller, why))),
    )


def _mixed(
    plan: Callable[..., FactorPlan],
    used: Callable[[FactorPlan], list[float]],
    weighed: Callable[[FactorPlan], float],
) -> tuple[FactorPlan | None, float]:
    """The best plan found within both limits, and what the last one tried uses of the limit that it misses most."""
    low, high = 0.0, 1.0  # shares of the first cost: with the low one it is too large, with the high one the other is
    limit, tight, loose, least = 1.0, 0.0, 1.0, 0.0  # with the tight one both hold
    best: FactorPlan | None = None
    for attempt in range(_ATTEMPTS):
        share = (low + high) / 2
        try:
            made = plan((share, 1.0 - share), limit)
        except ranks.OverBudgetError as e:
            least = e.least
            break
        first, second = used(made)
        least = max(first, second)
        if least > 1.0:
            low, high, loose = (share, high, limit) if first > second else (low, share, limit)
        elif limit == 1.0:
            return made, least
        else:
            best, tight = min(best or made, made, key=weighed), limit
            if least > _NEAR:
                break
        if best is not None:  # the step that was taken back may have been one of widths, and more than was needed
            limit = (tight + loose) / 2
        elif attempt >= _HALVINGS:
            limit /= least
    return best, least
