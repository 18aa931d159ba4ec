"""Forms beside ranks: what a layer could become, what is chosen of it, and that the plan makes just that."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rowcol_edge.datasets import Split as Data
from rowcol_edge.datasets import scan
from rowcol_edge.errors import PlanError
from rowcol_edge.factoring import ranks
from rowcol_edge.factoring.apply import factored
from rowcol_edge.factoring.costs import Form, LayerInfo, Split
from rowcol_edge.factoring.options import Options
from rowcol_edge.factoring.plan import ChannelPlan, FactorPlan, LayerPlan
from rowcol_edge.factoring.spaces import LayerSpaces
from rowcol_edge.factoring.study import Study, study
from tests.couplings import PICTURE, Residual, made

CONV = LayerInfo("conv", "conv2d", 24, 40, (3, 3), positions=49, maps=((7, 7), (7, 7)))


def space(size: int, seed: int, scale: float = 1.0) -> LayerSpaces:
    drawn = np.sort(np.random.default_rng(seed).exponential(size=size) ** 3)[::-1] * scale
    losses = np.concatenate([np.cumsum(drawn[::-1])[::-1], [0.0]])
    return LayerSpaces("conv", drawn, np.eye(size), np.zeros(size), 99, losses=losses)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), multiple=st.integers(1, 8), share=st.floats(0.2, 1.0),
    narrower=st.tuples(st.integers(8, 24), st.integers(8, 40)), count=st.sampled_from([None, 5]),
)  # fmt: skip
def test_options_fit_the_layer_and_save_enough(
    seed: int, multiple: int, share: float, narrower: tuple[int, int], count: int | None
) -> None:
    outputs, inputs = space(40, seed), space(24, seed + 1)
    options = Options({"conv": outputs}, {"conv": inputs}, multiple, share)
    info = replace(CONV, in_features=narrower[0], out_features=narrower[1])
    limit = int(info.break_even * share)
    found = options.of(info, count)
    assert found[0].split is None
    assert found[0].loss == 0.0
    for option in found[1:]:
        assert option.split is not None
        info.check(option.split)
        assert option.split.rank % multiple == 0
        assert info.split_parameters(option.split) <= info.split_parameters(Split(Form.COLUMN, limit))
        cut = {
            Form.COLUMN: ((outputs, option.split.rank),),
            Form.ROW: ((inputs, option.split.rank),),
            Form.BOTH: ((outputs, option.split.rank), (inputs, option.split.taken)),
        }[option.split.form]
        assert option.loss == sum(float(each.losses[rank]) for each, rank in cut)  # type: ignore[index]


def test_no_pair_of_ranks_beats_another_in_size_and_loss() -> None:
    options = Options({"conv": space(40, 1)}, {"conv": space(24, 2)})
    found = [(o.split, o.loss) for o in options.of(CONV) if o.split is not None and o.split.form is Form.BOTH]
    assert len(found) > 10
    for split, loss in found:
        assert not any(
            CONV.split_parameters(other) <= CONV.split_parameters(split) and lost < loss for other, lost in found
        )


def test_spaces_without_a_known_loss_give_columns_only() -> None:
    unweighed = replace(space(24, 2), losses=None)
    found = Options({"conv": space(40, 1)}, {"conv": unweighed}).of(CONV)
    assert {o.split.form for o in found if o.split is not None} == {Form.COLUMN}
    constant = replace(space(40, 1), eigenvalues=np.zeros(40))
    assert [o.split for o in Options({"conv": constant}, {}).of(CONV)] == [None]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 0.9))
def test_more_forms_keep_the_budget_and_the_bound_is_below_what_fewer_lose(seed: int, share: float) -> None:
    infos = {"conv": CONV, "other": replace(CONV, name="other", in_features=40)}
    outputs = {name: replace(space(40, seed + i), name=name) for i, name in enumerate(infos)}
    inputs = {"conv": space(24, seed + 2), "other": space(40, seed + 3)}
    total = sum(info.macs for info in infos.values())
    plans = []
    for rows in ({}, inputs):
        plan = ranks.plan_by_cost(infos, outputs, ranks.macs, total=total, limit=share * total, inputs=rows)
        assert sum(layer.macs_after for layer in plan.layers) <= share * total
        assert ranks.refresh(plan, infos, outputs, inputs=rows).layers == plan.layers
        plans.append(plan)
    few, more = plans
    assert few.loss is not None
    assert more.loss is not None
    assert more.gap is not None
    assert more.loss - more.gap <= few.loss + 1e-12  # the bound is below whatever fewer forms reach


@pytest.fixture(scope="module")
def known() -> Study:
    """Pictures whose channels are mixtures of three: the row spaces are smaller than the column spaces."""
    random = np.random.default_rng(0)
    mixed = np.einsum("nchw,cd->ndhw", random.normal(size=(200, 3, *PICTURE[1:])), random.normal(size=(3, PICTURE[0])))
    data = scan(Data("calibration", "random", lambda: iter([({"x": mixed}, None)])))
    return study(made(Residual), data, classify=True)


def test_kernels_have_row_spaces_and_a_small_budget_uses_them(known: Study) -> None:
    kernels = [n for n, info in known.infos.items() if not info.skip and np.prod(info.kernel) > 1]
    assert kernels
    assert set(known.input_spaces) == set(kernels)
    plan = ranks.plan_by_cost(
        known.infos, known.spaces, ranks.parameters, total=known.parameters, limit=0.35 * known.parameters,
        inputs=known.input_spaces,
    )  # fmt: skip
    assert any(layer.split in ("row", "both") for layer in plan.projected)
    model = factored(known, plan)
    assert sum(p.numel() for p in model.parameters()) == known.parameters - plan.saved_parameters
    for layer in plan.projected:
        assert len(list(model.get_submodule(layer.name))) == (3 if layer.split == "both" else 2)  # type: ignore[call-overload]


@pytest.mark.parametrize("split", ["column", "row", "both", "spatial"])
@pytest.mark.parametrize("narrowed", [False, True])
def test_full_ranks_lose_nothing_with_any_channels(known: Study, split: str, narrowed: bool) -> None:
    channels = (ChannelPlan("first", 5), ChannelPlan("stem", 9)) if narrowed else ()
    name = "second"
    wide = FactorPlan((), channels=channels)
    base = factored(known, wide)
    weight = base.get_submodule(name).weight
    outputs, inputs = weight.shape[:2]
    most = {"row": inputs, "spatial": 3 * min(weight.shape[:2])}.get(split, outputs)
    layer = LayerPlan(name, "project", most, split=split, taken=inputs if split == "both" else None)
    model = factored(known, replace(wide, layers=(layer,)))
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(4, *PICTURE)))
    with torch.inference_mode():
        torch.testing.assert_close(model(x), base(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LayerPlan("second", "project", 999, split="row"), "layer 'second': rank: expected 1 to"),
        (LayerPlan("second", "project", 3, split="both", taken=999), "layer 'second': taken: expected 1 to"),
        (LayerPlan("head", "project", 3, split="both", taken=3), "a convolution whose kernel is larger than 1"),
        (
            LayerPlan("head", "project", 3, split="spatial"),
            "a two-dimensional convolution whose kernel is larger than 1",
        ),
        (LayerPlan("head", "project", 3, split="row"), "spaces of its input were not collected"),
    ],
)
def test_a_split_that_cannot_be_is_refused_by_name(known: Study, layer: LayerPlan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ranks.refresh(FactorPlan((layer,)), known.infos, known.spaces, inputs=known.input_spaces)
