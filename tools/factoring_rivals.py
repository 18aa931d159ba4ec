"""Ways to factor a model without training it, as plans and spaces: ours, and what others do, at the same cost.

A way is what its directions are (of the weights, of the outputs, of what the model makes of the outputs) and how the
layers share the cost. Those of others keep `W x ≈ U Vᵀ W x`, so `rowcol_edge.factoring.apply` applies every one.

`svd`: U of the weight itself (Eckart–Young, 1936). `whitened`: SVD of W Σ^½ with Σ = E[x xᵀ] (SVD-LLM, Wang et al.,
2024), whose U are the eigenvectors of W Σ Wᵀ, so that no inverse and no Cholesky root is needed. `covariance`: the
same, centred, with the mean in the bias. `ours`: `rowcol_edge.factoring.sensitivity`; without a qualifier with narrowed
channels and the second pass, as `rowcol-edge factor` makes it.

`uniform`: the same share of its cost for every layer. `by energy`: what is cut off, as a share of the layer's own, adds
up to the least over all layers (the sort of allocation that BALF uses). Ours: predicted loss at the model's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from rowcol_edge.factoring import balance, ranks, splits
from rowcol_edge.factoring.costs import Form, LayerInfo, Split
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan
from rowcol_edge.factoring.spaces import LayerSpaces
from rowcol_edge.factoring.study import Study

Spaces = Mapping[str, LayerSpaces]
COSTS: dict[str, ranks.Cost] = {"parameters": ranks.parameters, "macs": ranks.macs}
_STEPS = 40  # bisections of the share of a uniform plan


@dataclass(frozen=True, slots=True)
class Way:
    """``spaces`` makes its directions of (study, plain spaces, weighed spaces)."""

    name: str
    spaces: Callable[[Study, Spaces, Spaces], Spaces]
    uniform: bool
    ours: bool = False  # with splits of the row space and of both
    whole: bool = False  # with narrowed channels and the second pass too


def of_weights(study: Study, plain: Spaces, weighed: Spaces) -> Spaces:
    """Directions of the weights; the mean is the bias, so nothing is moved into it."""
    found = {}
    for name in plain:
        layer = study.folded.get_submodule(name)
        matrix = splits.matrix(layer)
        basis, values, _ = np.linalg.svd(matrix, full_matrices=len(matrix) > matrix.shape[1])
        eigenvalues = np.zeros(len(matrix))
        eigenvalues[: len(values)] = values**2
        found[name] = replace(plain[name], eigenvalues=eigenvalues, basis=basis, mean=_bias(layer, len(matrix)))
    return found


def of_outputs(study: Study, plain: Spaces, weighed: Spaces) -> Spaces:
    """Directions of the outputs without bias, not centred."""
    found = {}
    for name, space in plain.items():
        bias = _bias(study.folded.get_submodule(name), len(space.mean))
        mean = space.mean - bias
        moment = space.covariance + np.outer(mean, mean)
        values, vectors = np.linalg.eigh(moment)
        found[name] = replace(
            space, eigenvalues=np.maximum(values[::-1], 0.0), basis=np.ascontiguousarray(vectors[:, ::-1]), mean=bias
        )
    return found


WAYS = (
    Way("svd, uniform", of_weights, uniform=True),
    Way("whitened, uniform", of_outputs, uniform=True),
    Way("covariance, uniform", lambda study, plain, weighed: plain, uniform=True),
    Way("covariance, by energy", lambda study, plain, weighed: plain, uniform=False),
    Way("ours, project only", lambda study, plain, weighed: weighed, uniform=False, ours=True),
    Way("ours", lambda study, plain, weighed: weighed, uniform=False, ours=True, whole=True),
)


def plan(way: Way, study: Study, spaces: Spaces, axis: str, share: float) -> FactorPlan:
    """A plan that saves all but ``share`` of what the layers that can be factored cost; `OverBudgetError` if there is
    none.

    ``study`` is a weighed one where the way is ours. Narrowed channels save in other layers too, which count alike.
    """
    infos = {name: study.infos[name] for name in spaces}
    cost = COSTS[axis]
    total = sum(cost(info, None) for info in infos.values())
    if way.uniform:
        return _uniform(infos, spaces, cost, share * total)

    def made(factor: float = 1.0) -> FactorPlan:
        return ranks.plan_by_cost(
            study.infos if way.whole else infos, spaces, cost, total=total, limit=share * total,
            made_by=f"{axis}<={share:g}", allocator=study.allocator(1, 1.0, factor) if way.whole else None,
            inputs=study.input_spaces if way.ours else None,
        )  # fmt: skip

    return replace(balance.nearer(study, made), refit=True) if way.whole else made()


def _uniform(infos: Mapping[str, LayerInfo], spaces: Spaces, cost: ranks.Cost, limit: float) -> FactorPlan:
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _cost(_layers(infos, cost, middle), infos, cost) <= limit else (low, middle)
    layers = _layers(infos, cost, low)
    least = _cost(layers, infos, cost)
    if least > limit:
        raise ranks.OverBudgetError("a uniform share", least)
    return ranks.refresh(FactorPlan(layers, made_by=f"uniform {low:.4f}"), infos, spaces)


def _layers(infos: Mapping[str, LayerInfo], cost: ranks.Cost, share: float) -> tuple[LayerPlan, ...]:
    """Each layer at the largest rank within the share, at least 1; dense where a rank saves nothing."""
    found = []
    for name, info in infos.items():
        ladder = [Split(Form.COLUMN, rank) for rank in range(1, info.out_features + 1)]
        fitting = [split for split in ladder if cost(info, split) <= share * cost(info, None)]
        split = fitting[-1] if fitting else ladder[0]
        pays = cost(info, split) < cost(info, None)
        found.append(LayerPlan(name, "project", rank=split.rank) if pays else LayerPlan(name))
    return tuple(found)


def _cost(layers: tuple[LayerPlan, ...], infos: Mapping[str, LayerInfo], cost: ranks.Cost) -> float:
    return sum(cost(infos[layer.name], layer.how if layer.form == "project" else None) for layer in layers)


def _bias(layer: object, size: int) -> np.ndarray:
    bias = getattr(layer, "bias", None)
    return np.zeros(size) if bias is None else bias.detach().double().cpu().numpy()
