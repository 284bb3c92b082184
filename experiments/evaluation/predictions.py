"""What a network says of a whole pool, in parts that fit in memory."""

import numpy as np

from experiments.data.pools import rows


def predict(apply, *arrays, chunk: int = 1000) -> np.ndarray:
    """`apply(*parts)`, a jitted function of batches, over arrays [n, ...] in parts of `chunk` rows, put together.

    The arrays may be NumPy's or lazy ones, see `data.pools`; only a part of them is in memory at a time.
    """
    total = arrays[0].shape[0]
    starts = range(0, total, chunk)
    parts = [np.asarray(apply(*(rows(array, at, min(at + chunk, total)) for array in arrays))) for at in starts]
    return np.concatenate(parts)
