"""Rewrite a model by a plan."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rowcol_edge.errors import PlanError
from rowcol_edge.factoring import splits
from rowcol_edge.factoring.layers import skip_reasons
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan, nearest
from rowcol_edge.factoring.spaces import LayerSpaces

_FLOOR = 1e-6  # latent scales are floored at this fraction of the largest eigenvalue


def apply(model: nn.Module, plan: FactorPlan, spaces: Mapping[str, LayerSpaces], *, alpha: float = 0.5) -> nn.Module:
    """A copy of ``model`` in which each ``project`` layer is ``nn.Sequential(reduce=…, expand=…)``.

    With ``U`` the leading ``r`` directions of the spaces' basis, ``V`` those of its dual, ``D = diag(λ^(α/2))``::

        reduce = D⁻¹ Vᵀ W      (no bias; a convolution keeps its kernel, stride, padding and dilation)
        expand = U D           (1×1 for a convolution, transposed or not; bias  U Vᵀ b + (I − U Vᵀ) E[y])

    the best rank-``r`` layer on the calibration inputs, centred: in mean square, or where the spaces are weighed (see
    `sensitivity`) at the model's output. ``alpha`` only moves scale between the two (the product is the same): 0 leaves
    the latent channels their own ranges, 1 makes them equal; 0.5 is a compromise that suits int8. Computed in float64,
    stored in the layer's own type on its own device.

    Args:
        model: the model ``spaces`` was collected from (batch norms folded), left as it is.

    Raises:
        PlanError: a layer that the model has not or that cannot be factored, a rank out of range, missing spaces.
    """
    if not 0.0 <= alpha <= 1.0:
        raise PlanError("alpha", expected="0 to 1", got=str(alpha))
    reasons = skip_reasons(model)
    for layer in plan.projected:
        _check(layer, reasons, spaces)
    result = copy.deepcopy(model)
    for layer in plan.projected:
        module = result.get_submodule(layer.name)
        assert isinstance(module, nn.Linear | _ConvNd)  # skip_reasons lists no other kind without a reason
        result.set_submodule(layer.name, _project(module, layer, spaces[layer.name], alpha))
    _leave_fused_paths(result, {layer.name for layer in plan.projected})
    return result


def _check(layer: LayerPlan, reasons: Mapping[str, str], spaces: Mapping[str, LayerSpaces]) -> None:
    if layer.name not in reasons:
        raise PlanError(f"the plan names unknown layer {layer.name!r}", hint=nearest(layer.name, reasons))
    if reasons[layer.name]:
        what = f"layer {layer.name!r} cannot be factored: {reasons[layer.name]}"
        raise PlanError(what, hint='set its form to "dense"')
    if layer.name not in spaces:
        raise PlanError(f"layer {layer.name!r}: its spaces were not collected")
    size = len(spaces[layer.name].mean)
    if layer.rank is None or not 1 <= layer.rank <= size:
        raise PlanError(f"layer {layer.name!r}: rank", expected=f"1 to {size}", got=str(layer.rank))


def _project(module: nn.Linear | _ConvNd, layer: LayerPlan, spaces: LayerSpaces, alpha: float) -> nn.Sequential:
    rank = layer.rank or 0
    weight = module.weight
    dense = splits.matrix(module)
    if len(spaces.mean) != dense.shape[0]:
        raise PlanError(
            f"layer {layer.name!r}: its spaces are of another model",
            expected=str(dense.shape[0]),
            got=str(len(spaces.mean)),
        )
    basis = spaces.basis[:, :rank]
    dual = basis if spaces.dual is None else spaces.dual[:, :rank]
    scale = _latent_scale(spaces.eigenvalues[:rank], alpha)
    bias = np.zeros(dense.shape[0]) if module.bias is None else module.bias.detach().double().cpu().numpy()
    bias = spaces.mean + basis @ (dual.T @ (bias - spaces.mean))
    reduce, expand = splits.column(module, rank)
    splits.fill(reduce, (dual.T @ dense) / scale[:, None], weight)
    splits.fill(expand, basis * scale, weight)
    assert expand.bias is not None
    splits.put(expand.bias, bias, weight)
    return nn.Sequential(OrderedDict(reduce=reduce, expand=expand)).train(module.training)


def _latent_scale(eigenvalues: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """λ^(α/2); an eigenvalue near zero would blow up what the calibration data never showed, so they are floored."""
    largest = float(eigenvalues[0])
    if largest <= 0.0:
        return np.ones_like(eigenvalues)
    return np.asarray(np.maximum(eigenvalues, _FLOOR * largest) ** (alpha / 2.0), dtype=np.float64)


def _leave_fused_paths(model: nn.Module, changed: set[str]) -> None:
    """``nn.TransformerEncoder(Layer)`` reads ``linear1.weight`` for a fused operator: not any more."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if any(layer.startswith(prefix) for layer in changed):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            elif isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
                module.enable_nested_tensor = False
