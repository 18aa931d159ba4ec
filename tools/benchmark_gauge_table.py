"""What `benchmark_gauge` measured, summed up for a terminal and for the README."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def means(found: dict[str, Any], key: str) -> dict[tuple[str, str], float]:
    """Geometric means over a sample's plans, by arm and runtime."""
    values: dict[tuple[str, str], list[float]] = {}
    for plan in found["plans"]:
        for row in plan["rows"]:
            values.setdefault((row["arm"], row["runtime"]), []).append(row[key])
    return {place: float(np.exp(np.mean(np.log(each)))) for place, each in values.items()}


def alone(found: dict[str, Any], arm: str, beside: str) -> float:
    """The KL of factored layers by themselves in the gauges of one arm as a share of that in another's: the geometric
    mean over all layers of all plans."""
    logs = []
    for plan in found["plans"]:
        one, other = (next(row["alone"] for row in plan["rows"] if row["arm"] == name) for name in (arm, beside))
        logs += [math.log(max(one[layer], 1e-12) / max(other[layer], 1e-12)) for layer in one]
    return math.exp(sum(logs) / len(logs))


def table(name: str, found: dict[str, Any]) -> str:
    """A row an arm; of each runtime KL in millinats and the relative error, geometric means over the plans, and the KL
    of layers alone beside that of the first arm."""
    kls, errors = means(found, "kl"), means(found, "error")
    runtimes, names = (list(dict.fromkeys(place[index] for place in kls)) for index in (1, 0))
    lines = [
        f"{name}: " + ", ".join(f"{plan['parameters']:,} parameters, {plan['splits']}" for plan in found["plans"]),
        f"{'':24}" + "".join(f"{runtime + ': KL, error':>28}" for runtime in runtimes) + "   layers alone",
    ]
    for arm in names:
        cells = [f"{1000 * kls[arm, each]:16.3f} {100 * errors[arm, each]:9.2f} %" for each in runtimes]
        lines.append(f"{arm:24}" + "".join(cells) + f"{alone(found, arm, names[0]):15.2f}")
    return "\n".join(lines)
