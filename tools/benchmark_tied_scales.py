"""What int8 costs the two products of a tied weight with one scale a tensor, and with one a row.

    python tools/benchmark_tied_scales.py      # writes tools/results/tied_scales.json and prints a table

Both products share the weight's whole numbers. A scale a row is one of the second product's inputs, so that it has to
be multiplied into the activation that product reads, whose channels it makes less even. The layers are the FFNs of
`sample:fmnist-vit` and the pairs of 3×3 convolutions of `sample:elpv-resnet18`, tied in closed form. Ranges of
activations are taken on the pictures that ties are fitted to, errors ‖int8 − float‖ / ‖float‖ on selection pictures:
``first`` and ``second`` of one product whose weight and activation are int8, what stands in front of it in float;
``both`` of the second one behind the first. Biases of the second products are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import tied_twins
from benchmark_machine import machine
from rowcol_edge import job
from rowcol_edge.factoring.settle import in8bits
from rowcol_edge.factoring.tied_kernels import TiedKernels
from rowcol_edge.factoring.ties import TiedFeedForward
from train_common import ROOT, command, write_json
from twin_samples import SAMPLES, SETTINGS

RESULT = ROOT / "tools" / "results" / "tied_scales.json"
SCALES = ("tensor", "row")
_UNSEEN = 128


@dataclass(frozen=True)
class Pair:
    """``product(inner(product(x, W)), W′)``; the hidden channels lie on ``axis`` of what ``inner`` gives."""

    weight: Tensor
    product: Callable[[Tensor, Tensor], Tensor]
    inner: Callable[[Tensor], Tensor]
    axis: int


def pair_of(layer: TiedFeedForward | TiedKernels) -> Pair:
    if isinstance(layer, TiedFeedForward):
        return Pair(layer.weight, F.linear, lambda y: layer.activation(y + layer.hidden_bias), -1)
    return Pair(layer.weight, partial(F.conv2d, padding=layer.weight.shape[2] // 2), layer.inner, 1)


def errors(pair: Pair, seen: Tensor, unseen: Tensor, scales: str) -> dict[str, float]:
    """Of each product and of both; ranges are those of ``seen``."""
    weight, product = pair.weight, pair.product
    scale = weight.abs().amax(tuple(range(scales == "row", weight.dim())), keepdim=True) / 127
    numbers = (weight / scale).round()
    moved = (scale / scale.mean()).flatten()
    known, hidden = (pair.inner(product(x, weight)).movedim(pair.axis, -1) for x in (seen, unseen))

    def second(given: Tensor) -> Tensor:
        read = in8bits(given * moved, known * moved).movedim(-1, pair.axis)
        return product(read, numbers.transpose(0, 1) * scale.mean())

    first = product(in8bits(unseen, seen), numbers * scale)
    wanted = product(hidden.movedim(-1, pair.axis), weight.transpose(0, 1))
    return {
        "first": _relative(first, product(unseen, weight)),
        "second": _relative(second(hidden), wanted),
        "both": _relative(second(pair.inner(first).movedim(pair.axis, -1)), wanted),
    }


def _relative(made: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.vector_norm(made - wanted) / torch.linalg.vector_norm(wanted))


@torch.no_grad()
def measured(name: str) -> dict[str, dict[str, dict[str, float]]]:
    """Layer → scales → errors."""
    sample = SAMPLES[name](replace(SETTINGS[name], tested=_UNSEEN))
    network, _ = sample.network("tied", "trained")
    layers = {n: m for n, m in network.eval().named_modules() if isinstance(m, TiedFeedForward | TiedKernels)}
    seen, unseen = (
        tied_twins.inputs_of(network, layers, x) for x in (sample.fitted(), sample.split("selection")[0][:_UNSEEN])
    )
    return {
        n: {scales: errors(pair_of(layer), seen[n], unseen[n], scales) for scales in SCALES}
        for n, layer in layers.items()
    }


def table(samples: dict[str, Any]) -> str:
    """In Markdown: means over the layers."""
    lines = ["| sample | scale a | first | second | both |", "| ---|---|--:|--:|--: |"]
    for name, layers in samples.items():
        for scales in SCALES:
            means = (
                sum(layer[scales][what] for layer in layers.values()) / len(layers)
                for what in ("first", "second", "both")
            )
            lines.append(f"| {name} | {scales} | {' | '.join(f'{mean:.2%}' for mean in means)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", nargs="+", default=list(SAMPLES), choices=list(SAMPLES))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    result = {
        "command": command(), "machine": machine(), "tools": job.tool_versions(), "source": job.own_source(),
        "samples": {name: measured(name) for name in options.samples},
    }  # fmt: skip
    write_json(options.out, result)
    print(table(result["samples"]))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
