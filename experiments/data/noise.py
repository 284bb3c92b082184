"""Symmetric label noise: a share of the labels replaced by classes drawn uniformly.

Two meanings of "noise rate r" are in use, and they differ by the factor 1 - 1/C in the share of wrong labels:

    flip     exactly round(r n) labels are wrong; P(observed | true) = (1 - r) I + r / (C - 1) (1 1^T - I)
    redraw   each label is redrawn with probability r from all C classes, the true one included;
             P(observed | true) = (1 - r) I + r / C 1 1^T, so r (1 - 1/C) of the labels are wrong on average

`flip` is the default: noise 0.4 means that 40 % of the labels are wrong, the same number for every seed. `redraw` is
the corruption matrix of Chen et al., 2022, Auxiliary Learning with Joint Task and Data Scheduling, ICML. Not for
class-dependent noise.
"""

import math
import numbers
from typing import NamedTuple

import numpy as np

from experiments.data.cutting import generator

KINDS = ("flip", "redraw")


class NoisyLabels(NamedTuple):
    """Labels after corruption.

    Attributes:
      label: [n] int32, what training sees.
      corrupted: [n] bool, where `label` differs from the true label; a redrawn label that came out right is not.
    """

    label: np.ndarray
    corrupted: np.ndarray


def symmetric_noise(labels: np.ndarray, rate: float, num_classes: int, seed: int, *, kind: str = "flip") -> NoisyLabels:
    """Replaces labels by uniformly drawn ones; `kind` says what `rate` counts (see the module's docstring).

    Args:
      labels: [n] integers in [0, num_classes), left as they are.
      rate: r in [0, 1]: the share of wrong labels (`flip`) or of redrawn labels (`redraw`).
      num_classes: C.
      seed: non-negative integer; the result depends on nothing else.
      kind: "flip" or "redraw".

    Returns:
      `NoisyLabels(label, corrupted)`.

    Raises:
      ValueError: a rate that is NaN or outside [0, 1], a label out of range, an unknown kind, or one class only.
    """
    _check(rate, num_classes, kind, "symmetric_noise")
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"symmetric_noise: labels must be integers [n], got {labels.dtype} {labels.shape}.")
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(
            f"symmetric_noise: labels must lie in [0, {num_classes}), got {labels.min()} to {labels.max()}."
        )
    true = labels.astype(np.int32)
    # A child stream: a split drawn from the same seed must not decide which labels are wrong.
    rng = generator(seed, "symmetric_noise").spawn(1)[0]
    if kind == "flip":
        chosen = rng.permutation(true.size)[: round(rate * true.size)]
        shift = rng.integers(1, num_classes, chosen.size, dtype=np.int32)
        noisy = true.copy()
        noisy[chosen] = (true[chosen] + shift) % np.int32(num_classes)
    else:
        redrawn = rng.random(true.size) < rate
        noisy = np.where(redrawn, rng.integers(0, num_classes, true.size, dtype=np.int32), true)
    return NoisyLabels(noisy, noisy != true)


def transition_matrix(rate: float, num_classes: int, *, kind: str = "flip") -> np.ndarray:
    """P(observed = j | true = i), float64 [C, C] with rows that sum to 1, of `symmetric_noise`.

    Raises:
      ValueError: as `symmetric_noise`.
    """
    _check(rate, num_classes, kind, "transition_matrix")
    identity = np.eye(num_classes)
    if kind == "redraw":
        return (1.0 - rate) * identity + rate / num_classes
    return (1.0 - rate) * identity + rate / (num_classes - 1) * (1.0 - identity)


def _check(rate: float, num_classes: int, kind: str, where: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"{where}: kind must be one of {KINDS}, got {kind!r}.")
    real = isinstance(rate, numbers.Real) and not isinstance(rate, bool)
    if not real or math.isnan(rate) or not 0.0 <= rate <= 1.0:
        raise ValueError(f"{where}: rate must be a share in [0, 1], such as 0.4 for 40 %, got {rate!r}.")
    if num_classes < 2:
        raise ValueError(f"{where}: num_classes must be at least 2, got {num_classes}: there is no wrong label.")
