"""Matrix products of numpy arrays by torch's threads.

numpy's linear algebra has threads of its own, which wait busily for a while after each product, and so do torch's: in a
loop that multiplies with both, each takes the processors from the other.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def product(*factors: NDArray[np.floating[Any]]) -> NDArray[Any]:
    """Of matrices or stacks of them, of one type, from left to right."""
    return np.asarray(reduce(torch.matmul, map(torch.from_numpy, factors)).numpy())
