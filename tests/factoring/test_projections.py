"""What holds for every split of every kind of layer, whatever its shape."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rowcol_edge.errors import PlanError
from rowcol_edge.factoring import splits
from rowcol_edge.factoring.apply import _left, _through
from rowcol_edge.factoring.channels import Slot
from rowcol_edge.factoring.costs import Form, LayerInfo, Split
from rowcol_edge.factoring.graph import trace
from rowcol_edge.factoring.layers import SUPPORTED, describe, survey
from rowcol_edge.factoring.projections import _spatial_svd, project
from rowcol_edge.factoring.spaces import LayerSpaces, blended, collect, directions
from tests import weighing

_MODES = ("zeros", "reflect", "replicate", "circular")


@st.composite
def layers(draw: st.DrawFn) -> tuple[Any, np.ndarray]:
    """A layer in double precision, and inputs for it that are not centred."""
    kind = draw(st.sampled_from(sorted(SUPPORTED.values())))
    inputs, outputs, bias = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 10**6)))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    if kind == "linear":
        return nn.Linear(inputs, outputs, bias=bias).double(), generator.normal(2, 1, (4, 3, inputs))
    axes = int(kind[-2])

    def sides(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(axes))

    options: dict[str, Any] = {"kernel_size": sides(1, 3), "stride": sides(1, 3), "dilation": sides(1, 2)}
    options["padding"] = sides(0, 1)
    if kind.startswith("convtranspose"):
        larger = [max(pair) for pair in zip(options["stride"], options["dilation"], strict=True)]
        options["output_padding"] = tuple(draw(st.integers(0, most - 1)) for most in larger)
    else:
        options["padding_mode"] = draw(st.sampled_from(_MODES))
        if options["stride"] == (1,) * axes and draw(st.booleans()):
            options["padding"] = draw(st.sampled_from(["same", "valid"]))
    make = next(make for make, name in SUPPORTED.items() if name == kind)
    return make(inputs, outputs, bias=bias, **options).double(), generator.normal(2, 1, (3, inputs, *(7, 6)[:axes]))


def measured(layer: nn.Module, x: np.ndarray) -> tuple[LayerSpaces, LayerSpaces]:
    """Spaces of what a layer takes and of what it gives."""
    model = nn.Sequential(layer)
    every = 10**6
    taken = weighing.taken(model, [{"input": x}], ["0"], max_positions=every)["0"]
    return taken, collect(model, [{"input": x}], ["0"], max_positions=every)["0"]


def outputs(module: nn.Module, x: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = module(torch.from_numpy(x))
    return result


def described(layer: nn.Module, x: np.ndarray) -> LayerInfo:
    model = nn.Sequential(layer)
    return survey(model, trace(model, {"input": torch.from_numpy(x)}))["0"]


def exact(info: LayerInfo) -> list[Split]:
    """Every split that the layer can take, at the ranks of the spaces' own size or of the weight."""
    found = [Split(Form.COLUMN, info.out_features), Split(Form.ROW, info.in_features)]
    if info.largest(Form.BOTH)[0]:
        found.append(Split(Form.BOTH, info.out_features, info.in_features))
    spatial = {across: info.largest(Form.SPATIAL, across_first=across)[0] for across in (False, True)}
    return found + [Split(Form.SPATIAL, rank, across_first=across) for across, rank in spatial.items() if rank]


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@settings(max_examples=60, deadline=None)
@given(layers())
def test_full_rank_reproduces_the_layer(case: tuple[Any, np.ndarray]) -> None:
    layer, x = case
    taken, given_ = measured(layer, x)
    fresh = 3 * x[..., ::-1].copy() - 1  # not the calibration data
    before = outputs(layer, fresh)
    for split in exact(describe("0", layer)):
        made = project(layer, split, inputs=taken, outputs=given_)
        after = outputs(made, fresh)
        assert after.shape == before.shape
        # the latent's scales are floored at 1e-3 of the largest, the spatial root at 1e-4: that much is rounded away
        assert float((after - before).norm()) <= 1e-9 * float(before.norm()) + 1e-9, split


@settings(max_examples=40, deadline=None)
@given(layers())
def test_error_falls_with_the_rank(case: tuple[Any, np.ndarray]) -> None:
    """Of a row split that of its input, which is what it projects, the zeros at the border counted; it is the predicted
    one."""
    layer, x = case
    taken, _ = measured(layer, x)
    features = taken.mean.size
    noise = 1e-11 * (taken.variance + float(taken.mean @ taken.mean))
    axis = -1 if isinstance(layer, nn.Linear) else 1
    share = splits.coverage(layer, x.shape[2:], outputs(layer, x).shape[2:])
    errors = []
    for rank in range(1, features + 1):
        reduce = project(layer, Split(Form.ROW, rank), inputs=taken)[0]
        with torch.no_grad():
            latent = reduce(torch.from_numpy(x)).movedim(axis, -1).numpy()
        wide = np.moveaxis(x, axis, -1)
        basis = taken.basis[:, :rank]
        latent = latent / np.linalg.norm(splits.matrix(reduce), axis=1)  # the scales that it is given
        back = taken.mean + (latent - taken.mean @ basis) @ basis.T
        border = taken.mean - basis @ (basis.T @ taken.mean)  # what taps that read a zero get too much
        errors.append(float(np.square(back - wide).sum(-1).mean() + (1 - share) / share * border @ border))
        assert errors[-1] == pytest.approx(float(taken.eigenvalues[rank:].sum()), rel=1e-6, abs=noise)
    assert all(later <= earlier * (1 + 1e-9) + noise for earlier, later in itertools.pairwise(errors))


def lost(layer: nn.Module, made: nn.Module, x: np.ndarray) -> np.ndarray:
    """(positions, features): what a layer gives more than what stands in for it."""
    axis = -1 if isinstance(layer, nn.Linear) else 1
    difference = (outputs(layer, x) - outputs(made, x)).movedim(axis, -1).numpy()
    return difference.reshape(-1, difference.shape[-1])


def squared(rows: np.ndarray) -> float:
    """Their mean squared length."""
    return float(np.square(rows).sum(-1).mean())


@st.composite
def tilings(draw: st.DrawFn) -> tuple[Any, np.ndarray, float, tuple[float, float]]:
    """A layer whose kernel reads each input once, inputs, how many of its inputs (a transposed one: what share of one)
    an output comes from, and the least and most that its weight makes of a squared length. Every other layer keeps
    lengths up to a factor."""
    kind = draw(st.sampled_from(sorted(SUPPORTED.values())))
    inputs, features = draw(st.integers(1, 5)), draw(st.integers(1, 20))
    even, bias = draw(st.booleans()), draw(st.booleans())
    seed = draw(st.integers(0, 10**6))
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    if kind == "linear":
        layer: Any = nn.Linear(inputs, features, bias=bias).double()
        kernel: tuple[int, ...] = ()
    else:
        kernel = tuple(draw(st.integers(1, 3)) for _ in range(int(kind[-2])))
        make: Any = next(make for make, name in SUPPORTED.items() if name == kind)
        layer = make(inputs, features, kernel, stride=kernel, bias=bias).double()
    taps, transposed = int(np.prod(kernel)), kind.startswith("convtranspose")
    matrix = layer.weight.detach().flatten(1).T if transposed else layer.weight.detach().flatten(1)
    left, scales, right = torch.linalg.svd(matrix, full_matrices=False)
    if even:
        scales = torch.full_like(scales, float(scales[0]))
        made = left @ right * scales[0]
        with torch.no_grad():
            layer.weight.copy_((made.T if transposed else made).reshape(layer.weight.shape))
    least = float(scales[-1]) ** 2 if matrix.shape[0] >= matrix.shape[1] else 0.0
    shape = tuple(side * count for side, count in zip(kernel, (4, 3), strict=False))
    x = generator.normal(2, 1, (3, *shape, inputs)) @ generator.normal(size=(inputs, inputs))
    x = np.ascontiguousarray(np.moveaxis(x, -1, 1)) if kernel else x
    return layer, x, 1.0 / taps if transposed else float(taps), (least, float(scales[0]) ** 2)


@settings(max_examples=80, deadline=None)
@given(tilings())
def test_row_error_is_the_predicted_one_of_the_inputs_as_the_weight_stretches_it(
    case: tuple[Any, np.ndarray, float, tuple[float, float]],
) -> None:
    """What is beyond the kept directions of each input passes through the weight, between its least and its largest
    singular value; where they are one, the error is predicted exactly and falls with the rank."""
    layer, x, share, (least, most) = case
    taken, given_ = measured(layer, x)
    noise = 1e-11 * (given_.variance + float(given_.mean @ given_.mean))
    errors = []
    for rank in range(1, taken.mean.size + 1):
        made = project(layer, Split(Form.ROW, rank), inputs=taken)
        errors.append(squared(lost(layer, made, x)))
        predicted = share * float(taken.eigenvalues[rank:].sum())
        assert least * predicted * (1 - 1e-6) - noise <= errors[-1] <= most * predicted * (1 + 1e-6) + noise
    assert errors[-1] <= noise
    if least == most:
        assert all(later <= earlier * (1 + 1e-9) + noise for earlier, later in itertools.pairwise(errors))


@settings(max_examples=60, deadline=None)
@given(layers(), st.data())
def test_tucker_error_is_that_of_its_columns_and_what_they_keep_of_that_of_its_rows(
    case: tuple[Any, np.ndarray], data: st.DataObject
) -> None:
    """The two are at right angles, as nothing of the second is beyond the kept directions of the output: together no
    more than the errors of both splits alone, and no less than that of the column split, which is the predicted one."""
    layer, x = case
    taken, given_ = measured(layer, x)
    if not describe("0", layer).takes(Form.BOTH):
        return
    rank = data.draw(st.integers(1, given_.mean.size))
    width = data.draw(st.integers(1, taken.mean.size))
    both = project(layer, Split(Form.BOTH, rank, width), inputs=taken, outputs=given_)
    of_rows = lost(layer, project(layer, Split(Form.ROW, width), inputs=taken), x)
    of_columns = float(given_.eigenvalues[rank:].sum())
    error = squared(lost(layer, both, x))
    noise = 1e-10 * (given_.variance + float(given_.mean @ given_.mean) + squared(of_rows))
    assert error == pytest.approx(of_columns + squared(of_rows @ given_.basis[:, :rank]), rel=1e-6, abs=noise)
    assert of_columns - noise <= error <= of_columns + squared(of_rows) + noise


@pytest.mark.parametrize("across", [False, True])
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_spatial_error_falls_with_the_rank_and_is_the_predicted_one_on_white_inputs(
    across: bool, seed: int, weighed: bool
) -> None:
    """Inputs without a neighbour that says the same, whose second moment is known: the identity."""
    torch.manual_seed(seed)
    layer = nn.Conv2d(4, 5, (2, 3)).double()
    x = np.random.default_rng(seed).normal(size=(200, 4, 12, 12))
    taken = LayerSpaces("0", np.ones(4), np.eye(4), np.zeros(4), 1)
    root = np.random.default_rng(seed).normal(size=(5, 5)) if weighed else np.eye(5)
    given_ = LayerSpaces("0", np.ones(5), np.linalg.inv(root).T, np.zeros(5), 1, dual=root)
    energies = np.square(_spatial_svd(layer, taken, given_, across)[1])
    predicted = [*np.cumsum(energies[::-1])[::-1], 0.0]
    before = outputs(layer, x)
    errors = []
    for rank in range(1, len(predicted)):
        made = project(layer, Split(Form.SPATIAL, rank, across_first=across), inputs=taken, outputs=given_)
        rows = (outputs(made, x) - before).movedim(1, -1).numpy() @ root
        errors.append(float(np.square(rows).sum(-1).mean()))
    whole = float(np.square(before.movedim(1, -1).numpy() @ root).sum(-1).mean())
    np.testing.assert_allclose(errors, predicted[1:], rtol=0.1, atol=1e-6 * whole)
    assert all(more >= less - 1e-9 * whole for more, less in itertools.pairwise(errors))
    assert errors[-1] < 1e-9 * whole


@settings(max_examples=15, deadline=None)
@given(layers())
def test_costs_are_those_of_the_layers_that_are_made(case: tuple[Any, np.ndarray]) -> None:
    layer, x = case
    taken, given_ = measured(layer, x)
    info = described(layer, x)
    for full in exact(info):
        split = Split(full.form, max(1, full.rank - 1), full.taken, full.across_first)
        made = project(layer, split, inputs=taken, outputs=given_)
        assert info.split_parameters(split) == sum(parameter.numel() for parameter in made.parameters())
        parts = survey(made, trace(made, {"input": torch.from_numpy(x)})).values()
        assert info.split_macs(split) == sum(part.macs for part in parts), split
        assert info.split_macs(split) == counted(made, x), split


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("options", [{"padding": 1, "stride": 2}, {"padding": "same"}, {"dilation": 2}])
def test_what_was_split_is_told_again(across: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 8, 3, **options), np.random.default_rng(0).normal(size=(2, 8, 9, 8)).astype(np.float32)
    taken, given_ = measured(layer, x)
    for split in (Split(Form.ROW, 2), Split(Form.BOTH, 2, 2), Split(Form.SPATIAL, 3, across_first=across)):
        made = project(layer, split, inputs=taken, outputs=given_)
        parts = survey(made, trace(made, {"input": torch.from_numpy(x)})).values()
        assert all(part.skip.startswith("already factored: rank") for part in parts), split
    apart = nn.Sequential(
        nn.Conv2d(8, 2, (3, 1), padding=(0, 1)), nn.Conv2d(2, 8, (1, 3))
    )  # pads where the other reads
    parts = survey(apart, trace(apart, {"input": torch.from_numpy(x)})).values()
    assert not any(part.skip.startswith("already factored") for part in parts)


def counted(module: nn.Module, x: np.ndarray) -> int:
    """Multiply-accumulates of one sample by torch's own hooks: the weight at each output, or input if transposed."""
    total = 0

    def hook(layer: Any, args: tuple[torch.Tensor], result: torch.Tensor) -> None:
        nonlocal total
        transposed = getattr(layer, "transposed", False)
        linear = isinstance(layer, nn.Linear)
        values = args[0] if transposed else result
        features = values.shape[-1] if linear else values.shape[1]
        total += layer.weight.numel() * values.numel() // features // len(x)

    handles = [part.register_forward_hook(hook) for part in module.children()]
    outputs(module, x)
    for handle in handles:
        handle.remove()
    return total


# ---------------------------------------------------------------- the border


def test_directions_that_hold_the_mean_too_are_exact_at_every_pixel() -> None:
    generator = np.random.default_rng(0)
    mean, direction = generator.normal(3, 1, 6), generator.normal(size=6)
    x = mean[:, None, None] + direction[:, None, None] * generator.normal(size=(8, 1, 7, 6))
    torch.manual_seed(0)
    for layer, ranks in (
        (nn.Conv2d(6, 5, 3, padding=1), 2),
        (nn.ConvTranspose2d(6, 5, 3, stride=2), 2),
        (nn.Conv2d(6, 5, 3), 1),  # about the mean one is enough
        (nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), 1),
    ):
        taken, given_ = measured(layer.double(), x)
        before = outputs(layer, x)
        for split in (Split(Form.ROW, ranks), Split(Form.BOTH, 5, ranks)):
            after = outputs(project(layer, split, inputs=taken, outputs=given_), x)
            assert float((after - before).abs().max()) < 1e-9  # corners, edges and the inside alike


@pytest.mark.parametrize("form", [Form.ROW, Form.SPATIAL])
def test_the_bias_is_exact_inside_and_off_by_the_taps_outside_at_the_border(form: Form) -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(1, 3, (40, 6, 30, 30))
    layer = nn.Conv2d(6, 5, 3, padding=1).double()
    taken, _ = measured(layer, x)
    constant = np.broadcast_to(taken.mean[:, None, None], (1, 6, 7, 6)).copy()
    made = project(layer, Split(form, 2), inputs=taken)
    wrong = (outputs(made, constant) - outputs(layer, constant))[0]
    assert float(wrong[:, 1:-1, 1:-1].abs().max()) < 1e-12
    assert float(wrong[:, 0].abs().max()) > 1e-3
    if form is Form.ROW:  # what a corner has too much: the five taps that it does not reach
        taps = layer.weight.detach() - torch.einsum("orhw,ri->oihw", made[1].weight.detach(), made[0].weight[..., 0, 0])
        outside = taps[:, :, 0].sum(2) + taps[:, :, 1:, 0].sum(2)
        np.testing.assert_allclose(wrong[:, 0, 0], (outside.detach() @ torch.from_numpy(taken.mean)), atol=1e-9)


def test_the_border_counts_when_directions_are_chosen() -> None:
    """Small maps, where a projection about the mean alone is wrong at the border and one about zero spends a direction
    on the mean: ours loses no more than either, over all pixels."""
    generator = np.random.default_rng(0)
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 600, 3, padding=1).double()  # so many outputs look at every direction alike
    for size, level in ((4, 0.5), (4, 2.0), (12, 1.0), (12, 4.0)):
        scales = np.array([3.0, 2.0, 1.5, 1.0, 0.7, 0.5])[:, None, None]
        x = (
            level * np.array([0.1, 0.2, 0.5, 1, 1, 2])[:, None, None]
            + generator.normal(size=(60, 6, size, size)) * scales
        )
        ours, _ = measured(layer, x)
        inner = nn.Conv2d(6, 5, 1).double()
        centred, _ = measured(inner, x)
        second = (centred.basis * centred.eigenvalues) @ centred.basis.T + np.outer(centred.mean, centred.mean)
        values, vectors = np.linalg.eigh(second)
        zero = LayerSpaces("0", values[::-1], vectors[:, ::-1], np.zeros(6), 1)
        before = outputs(layer, x)
        for rank in (1, 2, 3, 4):
            found, naive, about_zero = (
                float((outputs(project(layer, Split(Form.ROW, rank), inputs=space), x) - before).square().mean())
                for space in (ours, centred, zero)
            )
            assert found <= 1.02 * min(naive, about_zero), (size, level, rank)


@settings(max_examples=40, deadline=None)
@given(layers())
def test_coverage_is_the_share_of_taps_that_read_an_input(case: tuple[Any, np.ndarray]) -> None:
    """Counted by the layer itself, with weights and inputs of one."""
    layer, x = case
    counting = copy.deepcopy(layer)
    with torch.no_grad():
        counting.weight.fill_(1.0)
        if counting.bias is not None:
            counting.bias.zero_()
    found = outputs(counting, np.ones_like(x))
    taps = 1 if isinstance(layer, nn.Linear) else int(np.prod(layer.kernel_size))
    wanted = float(found.mean()) / (taps * (x.shape[-1] if isinstance(layer, nn.Linear) else x.shape[1]))
    assert splits.coverage(layer, x.shape[2:], found.shape[2:]) == pytest.approx(wanted)


# ---------------------------------------------------------------- other models


@settings(max_examples=25, deadline=None)
@given(layers())
def test_the_original_stays_and_the_same_comes_out_again(case: tuple[Any, np.ndarray]) -> None:
    layer, x = case
    taken, given_ = measured(layer, x)
    state = copy.deepcopy(layer.state_dict())
    generator = torch.get_rng_state()
    for split in exact(describe("0", layer)):
        first, second = (project(layer, split, inputs=taken, outputs=given_).state_dict() for _ in range(2))
        assert list(first) == list(second)
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_half_precision_and_channels_last() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, stride=2, padding=1).to(torch.bfloat16).to(memory_format=torch.channels_last)
    layer.weight.requires_grad_(False)
    layer.eval()
    x = np.random.default_rng(0).normal(1, 1, (4, 6, 9, 8)).astype(np.float32)
    taken, given_ = measured(layer, x)
    inputs = torch.from_numpy(x).to(torch.bfloat16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        before = layer(inputs).float()
    for split in exact(describe("0", layer)):
        made = project(layer, split, inputs=taken, outputs=given_)
        assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in made.parameters())
        assert not any(part.training for part in made.modules())
        with torch.no_grad():
            after = made(inputs).float()
        assert float((after - before).norm() / before.norm()) < 0.03, split


@pytest.mark.parametrize(
    ("layer", "split", "match"),
    [
        (nn.Linear(4, 3), Split(Form.BOTH, 2, 2), "both split"),
        (nn.Conv2d(4, 3, 1), Split(Form.BOTH, 2, 2), "both split"),
        (nn.Conv2d(4, 3, (3, 1)), Split(Form.SPATIAL, 2), "spatial split"),
        (nn.ConvTranspose2d(4, 3, (1, 3)), Split(Form.SPATIAL, 2), "spatial split"),
        (nn.ConvTranspose1d(4, 3, 3), Split(Form.SPATIAL, 2), "spatial split"),
        (nn.Linear(4, 3), Split(Form.ROW, 5), "1 to 4"),
        (nn.Linear(4, 3), Split(Form.COLUMN, 4), "1 to 3"),
        (nn.Conv2d(4, 3, 3), Split(Form.BOTH, 3, 5), "1 to 4"),
        (nn.Conv2d(4, 3, (2, 3)), Split(Form.SPATIAL, 9), "1 to 8"),
        (nn.Linear(4, 3), Split(Form.ROW, 2), "not collected"),
    ],
)
def test_what_cannot_be_is_refused_by_name(layer: Any, split: Split, match: str) -> None:
    spaces = None
    if match != "not collected":
        spaces = LayerSpaces("x", np.ones(4), np.eye(4), np.zeros(4), 1)
    given_ = LayerSpaces("x", np.ones(3), np.eye(3), np.zeros(3), 1)
    with pytest.raises(PlanError, match=match):
        project(layer, split, inputs=spaces, outputs=given_, name="x")


def test_impossible_splits_are_refused() -> None:
    for make in (
        lambda: Split(Form.ROW, 0),
        lambda: Split(Form.BOTH, 3),
        lambda: Split(Form.ROW, 3, 3),
        lambda: Split(Form.BOTH, 3, 0),
        lambda: Split(Form.COLUMN, 3, across_first=True),
    ):
        with pytest.raises(PlanError):
            make()
    info = LayerInfo("conv", "conv2d", 4, 3, (3, 3), positions=10)
    with pytest.raises(PlanError, match="sizes of its maps"):
        info.split_macs(Split(Form.ROW, 2))


@settings(max_examples=20, deadline=None)
@given(layers(), st.sampled_from([1e-40, 1e-20, 1.0, 1e20]))
def test_parts_are_of_one_size_whatever_their_spaces_are_worth(case: tuple[Any, np.ndarray], worth: float) -> None:
    layer, x = case
    taken, given_ = measured(layer, x)
    dual = given_.basis if given_.dual is None else given_.dual
    weighed = replace(
        given_, eigenvalues=given_.eigenvalues * worth, dual=dual * worth**0.5, basis=given_.basis / worth**0.5
    )
    for split in exact(described(layer, x)):
        plain = project(layer, split, inputs=taken, outputs=given_)
        made = project(layer, split, inputs=taken, outputs=weighed)
        sizes = [float(part.weight.detach().abs().max()) for part in made]
        assert min(sizes) > 0.2 * max(sizes) or min(sizes) == 0.0
        np.testing.assert_allclose(
            outputs(made, x).numpy(),
            outputs(plain, x).numpy(),
            rtol=1e-5,
            atol=1e-5 * float(outputs(plain, x).abs().max()),
        )


@pytest.mark.parametrize(
    "split",
    [
        Split(Form.COLUMN, 5), Split(Form.COLUMN, 18), Split(Form.BOTH, 5, 2), Split(Form.SPATIAL, 4),
        Split(Form.SPATIAL, 4, across_first=True),
    ],
    ids=str,
)  # fmt: skip
def test_a_layer_of_fewer_directions_than_outputs_is_split_as_with_all_of_them(split: Split) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 40, 3)  # 18 inputs of each output
    x = np.random.default_rng(0).normal(1, 1, (30, 2, 9, 8)).astype(np.float32)
    taken, given_ = measured(layer, x)
    gradients = np.random.default_rng(1).normal(size=(90, 40))
    metric = gradients.T @ gradients
    spaces = []
    for rank in (40, 18):
        values, basis, dual = directions(given_.covariance, metric, rank=rank)
        assert basis.shape == dual.shape == (40, rank)
        kept = blended(metric).astype(np.float32) if rank < 40 else None
        spaces.append(LayerSpaces("0", values, basis, given_.mean, given_.samples, dual=dual, metric=kept))
    every, few = spaces
    np.testing.assert_allclose(few.worth, every.worth, rtol=1e-5, atol=1e-5 * float(np.trace(every.worth)) / 40)
    assert few.variance == pytest.approx(every.variance)
    wanted, got = (outputs(project(layer, split, inputs=taken, outputs=each), x).numpy() for each in spaces)
    np.testing.assert_allclose(got, wanted, atol=1e-4 * float(np.abs(wanted).max()))
    # and where the layer gives every other channel only
    slot = Slot("0", np.arange(40).reshape(1, 40, 1))
    left = [_left(each, [(np.eye(40)[None, ::2], slot)]) for each in spaces]
    for one, other in zip(*left, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(np.abs(one).max()))


def test_what_is_kept_has_as_many_directions_as_are_asked_for() -> None:
    """More than vary: a plan may ask for them."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))[0]
    values = np.zeros(40)
    values[:3] = 3.0, 2.0, 1.0
    spaces = LayerSpaces("0", values, basis, np.zeros(40), 99)
    slot = Slot("0", np.arange(40).reshape(1, 40, 1))
    for most in (1, 5, 30):
        left = _through(spaces, [(np.eye(40)[None, :32], slot)], most)
        assert left.basis.shape[1] == (32 if most > 16 else max(most, 3))
        assert int((left.eigenvalues > 1e-9).sum()) == 3
        assert (left.metric is None) is (most > 16)
        assert left.dual is not None
        np.testing.assert_allclose(left.dual.T @ left.basis, np.eye(left.basis.shape[1]), atol=1e-9)
        np.testing.assert_allclose(left.covariance, spaces.covariance[:32, :32], atol=1e-9)


@pytest.mark.parametrize("split", [Split(Form.COLUMN, 30), Split(Form.BOTH, 30, 2)], ids=str)
def test_a_plan_may_ask_for_more_directions_than_there_are(split: Split) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 40, 3)  # 18 inputs of each output
    x = np.random.default_rng(0).normal(1, 1, (30, 2, 9, 8)).astype(np.float32)
    taken, given_ = measured(layer, x)
    values, basis, dual = directions(given_.covariance, np.eye(40), rank=18)
    worth = blended(np.eye(40)).astype(np.float32)
    spaces = LayerSpaces("0", values, basis, given_.mean, given_.samples, dual=dual, metric=worth)
    made = project(layer, split, inputs=taken, outputs=spaces)
    assert made[-1].in_channels == 30
    np.testing.assert_allclose(outputs(made, x).numpy(), outputs(layer, x).numpy(), atol=1e-4)


def _known(spaces: LayerSpaces, rank: int, weighed: bool) -> LayerSpaces:
    """As they are measured, or in a metric with no more than ``rank`` directions, as a model's output weighs them."""
    if not weighed:
        return spaces
    half = np.random.default_rng(2).normal(size=(len(spaces.mean), 3))
    metric = half @ half.T
    values, basis, dual = directions(spaces.covariance, metric, rank=rank)
    worth = None if basis.shape[1] == len(basis) else blended(metric).astype(np.float32)
    return replace(spaces, eigenvalues=values, basis=basis, dual=dual, metric=worth)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("shown", ["grey", "constant", "zeros", "colour"])
@pytest.mark.parametrize("outs", [64, 6], ids=["wide", "narrow"])
def test_the_ranks_of_the_weight_reproduce_the_layer_whatever_calibration_showed(
    outs: int, shown: str, weighed: bool
) -> None:
    """Also on inputs of another kind: pictures in grey leave two of three channels' directions without variance."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, outs, 3).double()
    random = np.random.default_rng(0)
    colour = random.normal(1, 1, (20, 3, 9, 8))
    x = {"grey": colour[:, :1].repeat(3, 1), "constant": np.ones_like(colour), "zeros": 0 * colour, "colour": colour}
    taken, given_ = measured(layer, x[shown])
    most, info = min(outs, 27), describe("0", layer)
    taken, given_ = _known(taken, 3, weighed), _known(given_, most, weighed)
    fresh = random.normal(-1, 2, (5, 3, 9, 8))
    before = outputs(layer, fresh)
    columns, rows = info.largest(Form.BOTH)
    assert (columns, rows) == (most, 3)
    for rank in {most, (most + outs) // 2, outs}:
        for split in (Split(Form.COLUMN, rank), Split(Form.ROW, rows), Split(Form.BOTH, rank, rows)):
            made = project(layer, split, inputs=taken, outputs=given_)
            off = float((outputs(made, fresh) - before).norm() / before.norm())
            assert off <= 1e-9, split


@pytest.mark.parametrize("form", [Form.COLUMN, Form.ROW, Form.BOTH, Form.SPATIAL])
def test_a_metric_of_nothing_weighs_all_directions_alike(form: Form) -> None:
    """What does not vary has none behind narrowed channels."""
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 12, 3).double()
    none = np.zeros((12, 12), np.float32)
    frame = np.eye(12)[:, :4]
    spaces = LayerSpaces("0", np.zeros(12), frame, np.zeros(12), 1, dual=frame, metric=none)
    rank = {Form.SPATIAL: 36}.get(form, 12)
    made = project(layer, Split(form, rank, 12 if form is Form.BOTH else None), inputs=spaces, outputs=spaces)
    x = np.random.default_rng(0).normal(size=(2, 12, 7, 8))
    np.testing.assert_allclose(outputs(made, x).numpy(), outputs(layer, x).numpy(), atol=1e-9)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_rounding_of_half_precision_takes_no_direction_of_the_weight(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 32, 3).to(kind)
    random = np.random.default_rng(0)
    grey = random.normal(size=(40, 1, 9, 9)).repeat(3, 1)
    with torch.no_grad():
        given_ = layer(torch.from_numpy(grey).to(kind)).double().permute(0, 2, 3, 1).reshape(-1, 32).numpy()
    values, vectors = np.linalg.eigh(np.cov(given_.T))
    spaces = LayerSpaces("0", np.maximum(values[::-1], 0.0), vectors[:, ::-1], given_.mean(0), len(given_))
    made, colour = project(layer, Split(Form.COLUMN, 27), outputs=spaces).double(), random.normal(size=(9, 3, 9, 9))
    wanted = outputs(copy.deepcopy(layer).double(), colour)
    assert float((outputs(made, colour) - wanted).norm() / wanted.norm()) < 4 * torch.finfo(kind).eps


@pytest.mark.parametrize("weighed", [False, True])
def test_a_matrix_with_more_inputs_than_outputs_is_whole_with_as_many_rows_as_it_reads(weighed: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 5).double()
    random = np.random.default_rng(0)
    taken, _ = measured(layer, random.normal(1, 1, (30, 2)) @ random.normal(size=(2, 40)))
    taken, fresh = _known(taken, 5, weighed), random.normal(size=(7, 40))
    made = project(layer, Split(Form.ROW, 7), inputs=taken)  # two that varied, and the five of the weight
    np.testing.assert_allclose(outputs(made, fresh).numpy(), outputs(layer, fresh).numpy(), atol=1e-9)
