from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge.errors import DataError, ModelError
from rowcol_edge.export.parity import compare, first_outside, torch_outputs, torch_run

B = [{"output": np.array([[3.0, 4.0], [0.0, 0.0]])}, {"output": np.array([[12.0, 0.0]])}]


def shifted(delta: float) -> list[dict[str, np.ndarray]]:
    """B with one number of its second batch changed."""
    return [B[0], {"output": B[1]["output"] + np.array([[0.0, delta]])}]


def test_the_error_is_pooled_over_samples_not_averaged_over_batches() -> None:
    found = compare("export", B, shifted(1.3), 0.2)
    assert found.relative_error == pytest.approx(1.3 / 13)  # ‖b‖₂ = √(9 + 16 + 144) = 13
    assert found.max_abs_error == pytest.approx(1.3)
    assert found.samples == 3
    assert found.ok
    assert not compare("export", B, shifted(1.3), 0.09).ok


def test_equal_outputs_have_no_error_even_where_they_are_zero_or_infinite() -> None:
    masked = [{"output": np.array([[0.0, -np.inf]])}]
    assert compare("export", masked, masked, 0.0).relative_error == 0.0
    zero = [{"output": np.zeros((2, 3))}]
    assert compare("export", zero, zero, 0.0).ok


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_outside_every_tolerance(bad: float) -> None:
    found = compare("compile int8", B, shifted(bad), 1e9)
    assert (found.relative_error, found.ok) == (math.inf, False)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["relative_error"] is None


def test_an_error_against_a_zero_reference_is_infinite() -> None:
    assert compare("x", [{"o": np.zeros((1, 2))}], [{"o": np.full((1, 2), 1e-9)}], 1.0).relative_error == math.inf


def test_an_output_with_small_numbers_cannot_hide_behind_a_large_one() -> None:
    reference = [{"large": np.full((1, 3, 3), 1e3), "small": np.full((1, 3, 3), 1e-3)}]
    got = [{"large": np.full((1, 3, 3), 1e3), "small": np.full((1, 3, 3), 2e-3)}]
    found = compare("export", reference, got, 0.1)
    assert found.relative_error == pytest.approx(1.0)
    assert found.top1_agreement is None


def test_top1_counts_samples_whose_largest_column_stays() -> None:
    reference = [{"output": np.array([[1.0, 2.0], [2.0, 1.0], [3.0, 1.0], [0.0, 5.0]])}]
    got = [{"output": np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 3.0], [0.0, 5.0]])}]
    assert compare("export", reference, got, 1.0).top1_agreement == 0.75


def test_half_precision_outputs_are_compared_in_double() -> None:
    reference = [{"output": np.full((1, 4), 60000.0, np.float16)}]
    got = [{"output": np.full((1, 4), -60000.0, np.float16)}]
    assert compare("fp16", reference, got, 1.0).relative_error == pytest.approx(2.0)


def test_the_first_stage_outside_is_named() -> None:
    stages = [compare(name, B, shifted(delta), 0.05) for name, delta in [("a", 0.0), ("b", 2.0), ("c", 9.0)]]
    found = first_outside(stages)
    assert found is not None
    assert found.stage == "b"
    assert first_outside(stages[:1]) is None


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (B[:1], "expected as many batches as the reference"),
        ([{"other": B[0]["output"]}, B[1]], "expected output, got other"),
        ([{"output": B[0]["output"][:1]}, B[1]], r"expected shape \(2, 2\), got \(1, 2\)"),
    ],
)
def test_outputs_of_another_form_are_bad_input(outputs: list[dict[str, np.ndarray]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        compare("export", B, outputs, 1.0)
    with pytest.raises(DataError, match="expected at least one batch"):
        compare("export", [], [], 1.0)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.drop(a) * self.scale, a - b


def test_torch_outputs_are_those_of_eval_mode_and_the_mode_is_put_back() -> None:
    model = Two()
    a, b = np.arange(4, dtype=np.float32).reshape(2, 2), np.ones((2, 2), np.float32)
    a.flags.writeable = False
    first, second = torch_outputs(model, [{"b": b, "a": a}, {"a": b, "b": a}])
    assert first["output_0"].tolist() == (a * 2).tolist()
    assert second["output_1"].tolist() == (b - a).tolist()
    assert model.training
    assert model.drop.training
    with pytest.raises(ModelError, match="forward of Two does not take these inputs"):
        torch_run(model)({"a": a, "b": b, "c": b})
