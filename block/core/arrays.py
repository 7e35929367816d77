"""The types of arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int = int | np.int64
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
