"""The memory of activations by the graph: what lives at the same time when a file's operators run one by one, in order.

An estimate of the graph, not of a runtime: one that fuses operators or works in place needs less, one that rounds up
its pieces, copies inputs or keeps scratch memory for its kernels more. Weights, and what follows from them alone, do
not count; inputs and outputs do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """An operator. Where it ``shares``, its outputs lie in the memory of its first input that is no constant, as those
    of a reshape do."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shares: bool = False


def peak_bytes(
    steps: Sequence[Step], size_bytes: Mapping[str, int | None], inputs: Iterable[str], outputs: Iterable[str]
) -> int | None:
    """The most bytes that live at one time; None where the size of one of them is not known.

    A value lives from the step that makes it to the last that reads it, an input from the beginning, an output to the
    end. What is neither an input nor made from one is a constant.
    """
    home = {name: name for name in inputs}
    born = dict.fromkeys(home, 0)
    last = dict(born)
    for i, step in enumerate(steps):
        read = [home[name] for name in step.inputs if name in home]
        last.update(dict.fromkeys(read, i))
        for name in step.outputs if read else ():
            home[name] = read[0] if step.shares else name
            if not step.shares:
                born[name] = last[name] = i
    last.update({home[name]: len(steps) for name in outputs if name in home})
    changes = [0] * (len(steps) + 2)
    for name, begin in born.items():
        size = size_bytes.get(name)
        if size is None:
            return None
        changes[begin] += size
        changes[last[name] + 1] -= size
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return peak
