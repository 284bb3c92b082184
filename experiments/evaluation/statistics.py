"""The two statistics that results are given in."""

import math

import numpy as np
from scipy.special import stdtrit  # not scipy.stats, which takes most of a second to import


def mean_and_interval(values) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval, t(0.975, n - 1) s / sqrt(n); NaN half width for n = 1."""
    values = np.asarray(values, float)
    if values.size < 2:
        return float(values.mean()), math.nan
    half = stdtrit(values.size - 1, 0.975) * values.std(ddof=1) / math.sqrt(values.size)
    return float(values.mean()), float(half)


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counting half (Mann and Whitney, 1947).

    Args:
      scores: `[n]` numbers.
      positive: bool `[n]`, with both kinds in it.
    """
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # equal scores share the mean of their ranks, from 1
    count, rest = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * rest))
