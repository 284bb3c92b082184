"""What repeated timings are summed up as."""

import numpy as np
from scipy.special import bdtr


def interval_of_median(values) -> tuple[float, float] | None:
    """The 95 % interval of the median that order statistics give, without assumptions; `None` below 6 values."""
    ordered = np.sort(np.asarray(values, float))
    places = [j for j in range(1, ordered.size // 2 + 1) if 2 * bdtr(j - 1, ordered.size, 0.5) <= 0.05]
    return (float(ordered[places[-1] - 1]), float(ordered[-places[-1]])) if places else None


def median_interval(values) -> dict:
    """`{"median", "low", "high", "turns"}`, plain values; `low` and `high` are `None` below 6 values."""
    low, high = interval_of_median(values) or (None, None)
    return {"median": float(np.median(values)), "low": low, "high": high, "turns": int(np.size(values))}
