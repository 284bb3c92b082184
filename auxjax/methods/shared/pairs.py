"""Pairs of instances of a batch, for methods that generate new ones from them.

    p_i = f_i / s,      a_i = f_j(i) / s,      s^2 = mean over i of the mean square of f_i

with f the trunk's features and j(i) drawn at random: the next primary instance on a random cycle, or an instance of
another task. Divided by s, what is generated does not depend on the features' scale, which changes as the trunk learns.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from auxjax._internal.precision import accumulation_dtype
from auxjax.formulas.losses import masked_mean
from auxjax.interface import TaskLosses
from auxjax.methods.shared import evaluation

_PARTNERS = 0x9A185  # stream of the step's key that draws the partners; the model has the key itself


class Pairs(NamedTuple):
    """The pairs of a batch. Rows without a primary label are 0.

    Attributes:
      primary: `[n, d]`, p.
      partner: `[n, d]`, a; row i belongs to the primary instance i.
      labels: `[n, c]`, the primary labels, or `[n, 2 c]` with those of the partners where these have some; c may be 0.
      scale: scalar, s.
      mask: bool `[n]`, which instances have a primary label, or `None` for all.
    """

    primary: jax.Array
    partner: jax.Array
    labels: jax.Array
    scale: jax.Array
    mask: jax.Array | None


def pairs_of(
    method: str,
    out: TaskLosses,
    primary: str,
    batch,
    key: jax.Array,
    *,
    partner: str | None = None,
    labels: Callable | None = None,
    num_classes: int | None = None,
) -> Pairs:
    """Pairs every primary instance with another one, or with one of another task.

    Args:
      method: the method's name, for messages.
      out: losses of the batch, with features.
      primary: name of the primary task.
      batch: what `labels` is a function of.
      key: typed PRNG key of the step. The pairing is a function of it and of the masks.
      partner: task of the partners: its labelled instances in random order, again from the first where they are fewer.
        `None` for `cycle` through the primary instances.
      labels: `batch -> [n]` integers or floats, or `[n, c]` floats; `None` for none.
      num_classes: number of classes, for integer labels, which become one-hot vectors.

    Returns:
      `Pairs`, in at least float32, differentiable in the features.

    Raises:
      ValueError: features or labels that are missing or of another shape.
    """
    draw, mask = jax.random.fold_in(key, _PARTNERS), evaluation.mask_of(out, primary)
    features = _features_of(method, out, primary)
    count = features.shape[0]
    known = _encoded(method, labels, num_classes, batch, features, mask)
    if partner is None:
        rows = cycle(draw, count, mask)
        others, known = features[rows], jnp.concatenate([known, known[rows]], axis=1)
    else:
        others = _features_of(method, out, partner)
        order, length = _shuffled(draw, others.shape[0], evaluation.mask_of(out, partner))
        others = others[order[jnp.arange(count) % length]]
    if others.shape != features.shape:
        raise ValueError(
            f"{method}(partner={partner!r}): its features have width {others.shape[1]}, those of the primary task "
            f"{features.shape[1]}. Give both tasks features of one trunk."
        )
    # Under the root: its derivatives at 0 are finite.
    scale = jnp.sqrt(masked_mean(jnp.mean(features**2, axis=1), mask) + 1e-12)
    return Pairs(features / scale, others / scale, known, scale, mask)


def cycle(key: jax.Array, count: int, mask: jax.Array | None = None) -> jax.Array:
    """Int `[count]`: a partner for every row, the next one on a uniformly random cycle through the rows in `mask`.

    No row has itself (unless it is the only one), and every one is a partner once: unlike a permutation, which leaves
    one row in place on average. What rows outside of the mask get is of no use.
    """
    order, length = _shuffled(key, count, mask)
    following = jnp.roll(order, -1).at[length - 1].set(order[0])
    return jnp.zeros((count,), order.dtype).at[order].set(following)


def _shuffled(key, count, mask):
    """`(order, length)`: the rows in random order, those in the mask first, and how many these are (at least 1)."""
    ranks = jax.random.uniform(key, (count,))
    if mask is None:
        return jnp.argsort(ranks), count
    return jnp.argsort(jnp.where(mask, ranks, 2.0)), jnp.maximum(jnp.sum(mask), 1)


def _features_of(method, out, task):
    """A task's features; 0 where the task has no label, for what is there may be NaN."""
    features = evaluation.features_of(method, out, task)
    return _where(evaluation.mask_of(out, task), features.astype(accumulation_dtype(features)))


def _encoded(method, labels, num_classes, batch, features, mask):
    """The primary labels as rows of floats, `[n, c]`; 0 where there is none."""
    count = features.shape[0]
    if labels is None:
        return jnp.zeros((count, 0), features.dtype)
    found = jnp.asarray(labels(batch))
    got = f"{found.dtype}{list(found.shape)}"
    if jnp.issubdtype(found.dtype, jnp.integer) and found.ndim == 1:
        if num_classes is None:
            raise ValueError(f"{method}(labels=) returned integers: give num_classes=, for them to be one-hot vectors.")
        found = jax.nn.one_hot(found, num_classes, dtype=features.dtype)
    elif found.ndim == 1:
        found = found[:, None]
    if found.ndim != 2 or found.shape[0] != count or not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(
            f"{method}(labels=) returned {got}; expected integers or floats [{count}], or floats [{count}, c], a row "
            "for each example of the primary task."
        )
    return _where(mask, found.astype(features.dtype))


def _where(mask, rows):
    return rows if mask is None else jnp.where(mask[:, None], rows, jnp.zeros_like(rows))
