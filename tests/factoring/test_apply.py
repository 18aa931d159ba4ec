"""The rewritten layer: exact at full rank, as wrong as predicted below, the original untouched."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rowcol_edge.errors import PlanError
from rowcol_edge.factoring.apply import apply
from rowcol_edge.factoring.graph import trace
from rowcol_edge.factoring.layers import survey
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan
from rowcol_edge.factoring.ranks import plan_by_energy
from rowcol_edge.factoring.spaces import LayerSpaces, collect

CONV = {"stride": 2, "padding": 2, "dilation": 2, "padding_mode": "reflect"}


def _layer(kind: str, bias: bool = True) -> tuple[nn.Sequential, np.ndarray]:
    generator = np.random.default_rng(0)
    if kind == "linear":
        return nn.Sequential(nn.Linear(7, 6, bias=bias)), generator.normal(2, 1, (9, 4, 7)).astype(np.float32)
    layer = nn.Conv2d(3, 6, 3, bias=bias, **CONV) if kind == "conv" else nn.Conv2d(3, 6, 2, bias=bias, padding="same")
    return nn.Sequential(layer), generator.normal(2, 1, (5, 3, 9, 8)).astype(np.float32)


def _project(model: nn.Module, x: np.ndarray, rank: int, **options: float) -> tuple[nn.Module, LayerSpaces]:
    spaces = collect(model, [{"input": x}], ["0"])
    return apply(model, FactorPlan((LayerPlan("0", "project", rank),)), spaces, **options), spaces["0"]


def _outputs(model: nn.Module, x: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(x)).double()


@pytest.mark.parametrize("kind", ["linear", "conv", "same"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_full_rank_reproduces_the_layer(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    model, x = _layer(kind, bias)
    factored, _ = _project(model, x, 6)
    fresh = x[:, ..., ::-1].copy() * 3  # not the calibration data
    before, after = _outputs(model, fresh), _outputs(factored, fresh)
    assert float((after - before).norm() / before.norm()) < 1e-5
    assert [name for name, _ in factored[0].named_children()] == ["reduce", "expand"]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["linear", "conv"]))
def test_error_is_the_predicted_tail(seed: int, kind: str) -> None:
    torch.manual_seed(seed)
    model, x = _layer(kind)
    model, x = model.double(), x.astype(np.float64)
    before = _outputs(model, x)
    errors = []
    for rank in range(1, 7):
        factored, spaces = _project(model, x, rank)
        channel = 1 if kind == "conv" else -1
        errors.append(float(((_outputs(factored, x) - before) ** 2).sum(dim=channel).mean()))
        predicted = float(spaces.eigenvalues[rank:].sum())
        assert errors[-1] == pytest.approx(predicted, rel=1e-3, abs=1e-12 * spaces.variance)
    assert all(later <= earlier * (1 + 1e-9) + 1e-20 for earlier, later in itertools.pairwise(errors))


def test_latents_share_their_unevenness_with_the_weights_behind() -> None:
    torch.manual_seed(0)
    model, x = _layer("linear")
    factored, spaces = _project(model.double(), x.astype(np.float64), 4)
    with torch.no_grad():
        variances = factored[0].reduce(torch.from_numpy(x).double()).flatten(0, 1).var(dim=0, correction=0).numpy()
        sizes = factored[0].expand.weight.square().sum(0).numpy()
    roots = np.sqrt(spaces.eigenvalues[:4])
    np.testing.assert_allclose(variances / variances[0], roots / roots[0])
    np.testing.assert_allclose(sizes / sizes[0], roots / roots[0])


def test_original_untouched_and_deterministic() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 8)).train()
    x = np.random.default_rng(0).normal(size=(6, 1, 8, 8)).astype(np.float32)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    infos = survey(model, trace(model, {"input": torch.from_numpy(x)}))
    spaces = collect(model, [{"input": x}], list(infos))
    plan = plan_by_energy(infos, spaces, 0.8)
    generator = torch.get_rng_state()
    factored = [apply(model, plan, collect(model, [{"input": x}], list(infos))) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), generator)
    assert plan.projected
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    pairs = zip(factored[0].state_dict().values(), factored[1].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    dense = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in factored[0].parameters()) == dense - plan.saved_parameters
    again = survey(factored[0], trace(factored[0], {"input": torch.from_numpy(x)}))
    for layer in plan.projected:
        assert again[f"{layer.name}.reduce"].skip.startswith("already factored")


def test_half_precision_and_frozen_weights() -> None:
    model, x = _layer("linear")
    model = model.to(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    factored, _ = _project(model, x, 6)
    assert {p.dtype for p in factored.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in factored.parameters())
    with torch.no_grad():
        before, after = (m(torch.from_numpy(x).bfloat16()).float() for m in (model, factored))
    assert float((after - before).norm() / before.norm()) < 0.02


@pytest.mark.parametrize("case", ["rank-deficient", "constant", "zero", "one sample"])
def test_ill_cases_stay_finite_and_right_on_the_data(case: str) -> None:
    torch.manual_seed(0)
    model, x = _layer("linear")
    x = x.reshape(-1, 7)
    if case == "rank-deficient":
        x = x[:, :1] * np.ones((1, 7), np.float32)
    elif case == "constant":
        x = np.ones_like(x)
    elif case == "one sample":
        x = x[:1]
    else:
        nn.init.zeros_(model[0].weight)
        nn.init.zeros_(model[0].bias)
    factored, spaces = _project(model, x, 2)
    before, after = _outputs(model, x), _outputs(factored, x)
    assert torch.allclose(before, after, atol=1e-5)
    assert bool(torch.isfinite(_outputs(factored, x * 100)).all())
    assert spaces.constant == (case != "rank-deficient")


def test_encoder_layer_keeps_working() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    x = np.random.default_rng(0).normal(size=(4, 3, 8)).astype(np.float32)
    name = "layers.0.linear1"
    spaces = collect(model, [{"src": x}], [name])
    factored = apply(model, FactorPlan((LayerPlan(name, "project", 16),)), spaces)
    assert torch.allclose(_outputs(factored, x), _outputs(model, x), atol=1e-5)


def test_refusals() -> None:
    model = nn.Sequential(nn.Linear(7, 6), nn.Conv2d(4, 4, 1, groups=2))
    spaces = collect(nn.Sequential(model[0]), [{"input": np.ones((2, 7), np.float32)}], ["0"])
    for layer, message in [
        (LayerPlan("00", "project", 2), "unknown layer"),
        (LayerPlan("1", "project", 2), "grouped convolution"),
        (LayerPlan("0", "project", 7), "expected 1 to 6, got 7"),
    ]:
        with pytest.raises(PlanError, match=message):
            apply(model, FactorPlan((layer,)), spaces)
    plan = FactorPlan((LayerPlan("0", "project", 2),))
    with pytest.raises(PlanError, match="not collected"):
        apply(model, plan, {})
    with pytest.raises(PlanError, match="another layer"):
        apply(nn.Sequential(nn.Linear(7, 9)), plan, spaces)
