"""The refit: weights that one run has learned, made ready for a run from scratch that holds them fixed.

    v_k = max(0, mean w_k) / mean w_primary          tasks, the primary one 1
    u_i = max(0, w_i) / mean_j max(0, w_j)           examples of the primary task, 1 on average

A method with an outer loss holds labels back for it, so that its own run never sees them in the inner loss. The refit
gives them back: learn the weights, then train with `fixed_weights` on all labels. `kept` makes a selection of weights
whose order is to be trusted and whose size is not: above Otsu's threshold or not.

These are functions on NumPy arrays, called once between two runs; they learn nothing and train nothing.

Reference: Otsu, 1979, A Threshold Selection Method from Gray-Level Histograms, IEEE Transactions on Systems, Man, and
Cybernetics 9 (the threshold).
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from auxjax._internal import checks


def relative_weights(weights: Mapping[str, ArrayLike], primary: str) -> dict[str, float]:
    """`{task: max(0, mean w_task) / mean w_primary}`: what a method's weights come to where the primary task counts 1.

    Args:
      weights: `{task: number or array}`, such as the lines of a log, whose mean counts; the primary task among them.
      primary: its name.

    Returns:
      Finite numbers >= 0, in the order of `weights`; 1 for the primary task.

    Raises:
      TypeError: `weights` is not a mapping.
      ValueError: no weight of the primary task, or none above 0; a weight that is not finite; an empty array.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"relative_weights(weights=): expected {{task: weight}}, got {type(weights).__name__}.")
    if primary not in weights:
        raise ValueError(f"relative_weights(primary={primary!r}): expected one of the tasks {sorted(weights)}.")
    means = {task: float(_finite("relative_weights", task, weight).mean()) for task, weight in weights.items()}
    if means[primary] <= 0:
        raise ValueError(
            f"relative_weights(weights[{primary!r}]=): expected a mean above 0 for the primary task, got "
            f"{means[primary]:g}."
        )
    return {task: max(0.0, mean / means[primary]) for task, mean in means.items()}


def example_weights(weights: ArrayLike, *, labelled: ArrayLike | None = None, further: int = 0) -> np.ndarray:
    """The table of `fixed_weights` for a task: its examples' weights with mean 1, then 1 for further examples.

    Args:
      weights: `[n]`, one per example; negative ones become 0.
      labelled: bool `[n]`, which examples show the label: the mean is theirs, and the others get 1, which no loss sees.
        All by default.
      further: examples behind them that had no weight, such as those of the outer loss.

    Returns:
      float64 `[n + further]`.

    Raises:
      ValueError: not one weight per example; a weight of a labelled example that is not finite, or none above 0.
    """
    checks.count("example_weights", 0, further=further)
    weights = np.asarray(weights, np.float64)
    shown = np.ones(weights.shape, bool) if labelled is None else np.asarray(labelled).astype(bool)
    if weights.ndim != 1 or shown.shape != weights.shape:
        raise ValueError(
            f"example_weights(weights=, labelled=): expected [n] and [n], got {list(weights.shape)} and "
            f"{list(shown.shape)}."
        )
    found = np.ones(weights.size + further)
    if shown.any():
        positive = np.maximum(_finite("example_weights", None, weights[shown]), 0)
        if not positive.any():
            raise ValueError("example_weights(weights=): expected a weight above 0, got none.")
        found[: weights.size][shown] = positive / positive.mean()
    return found


def otsu_threshold(weights: ArrayLike) -> float:
    """Otsu's threshold, over the numbers themselves, without a histogram.

    `t = argmax_t n_low(t) n_high(t) (mean_high(t) - mean_low(t))^2`, the split with the largest variance between the
    two classes `w <= t` and `w > t`.

    Args:
      weights: `[n]`, at least one number.

    Returns:
      The largest number of the lower class: those above it are the upper one. For equal numbers that number, above
      which there is none. Cost: a sort.

    Raises:
      ValueError: no numbers, or one that is not finite.
    """
    ordered = np.sort(_finite("otsu_threshold", None, weights).reshape(-1))
    count = ordered.size
    low = np.arange(1, count)  # of the lower class, one entry per split
    below = np.cumsum(ordered - ordered.mean())[:-1]  # the sum of the lower class; minus that, of the upper one
    between = low * (count - low) * (below / low + below / (count - low)) ** 2
    splits = np.flatnonzero(np.diff(ordered) > 0)  # between two equal numbers there is none
    return float(ordered[splits[np.argmax(between[splits])]] if splits.size else ordered[0])


def kept(weights: ArrayLike, *, spread: float = 0.05) -> np.ndarray:
    """Which of some weights stand out: those above Otsu's threshold; all of them where they are nearly equal.

    A weight of 0 or less is never kept.

    Args:
      weights: `[n]`, at least one number; those of examples, or of at least three tasks.
      spread: weights are nearly equal where `max - min <= spread * max`.

    Returns:
      bool `[n]`.

    Raises:
      ValueError: no numbers, or one that is not finite; a negative spread.
    """
    checks.number("kept", least=0, spread=spread)
    weights = _finite("kept", None, weights).reshape(-1)
    equal = np.ptp(weights) <= spread * weights.max()
    return weights > (0 if equal else max(0.0, otsu_threshold(weights)))


def kept_examples(weights: ArrayLike, *, spread: float = 0.05) -> np.ndarray:
    """Which of many examples are to be trusted: `kept` of `-log max(1 - w / max w, 1e-6)`, the nearness to the ceiling.

    Weights of examples come out of sigmoids, and crowd below their largest value. What separates the trusted examples
    from the others is there, and not half way down, where Otsu's threshold of the weights themselves lies.

    Args:
      weights: `[n]`, at least one number.
      spread: as for `kept`, of the weights themselves.

    Returns:
      bool `[n]`.

    Raises:
      ValueError: no numbers, or one that is not finite; a negative spread.
    """
    checks.number("kept_examples", least=0, spread=spread)
    weights = _finite("kept_examples", None, weights).reshape(-1)
    if np.ptp(weights) <= spread * weights.max():
        return kept(weights, spread=spread)
    positive = np.maximum(weights, 0)
    return kept(-np.log(np.maximum(1 - positive / positive.max(), 1e-6)), spread=0.0)


def _finite(where: str, task: str | None, weights: ArrayLike) -> np.ndarray:
    """The numbers in float64."""
    found = np.asarray(weights, np.float64)
    name = "weights" if task is None else f"weights[{task!r}]"
    if not found.size or not np.isfinite(found).all():
        bad = f"{np.sum(~np.isfinite(found))} of {found.size} that are not" if found.size else "none"
        raise ValueError(f"{where}({name}=): expected finite numbers, at least one, got {bad}.")
    return found
