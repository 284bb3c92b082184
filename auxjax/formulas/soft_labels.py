"""Soft labels inside the primary class: what methods that generate auxiliary labels have in common.

An auxiliary head has C blocks of psi sub-classes, one block for every primary class; sub-class j of class c is number
c psi + j. A generated label is a distribution over the psi sub-classes of the example's own primary class:

    y_i = masked_softmax(z_i, c_i)      y_ic = exp(z_ic) / sum_{c' in block(c_i)} exp(z_ic') inside the block, else 0

    focal loss    l(z, y) = -sum_c y_c (1 - p_c)^gamma log p_c,   p = softmax(z)

It is linear in y, so that a network's losses for all classes, `[n, C psi]`, say what any soft label would cost.

Not for: networks, or what makes a label useful.

Reference: Liu, Davison, Johns, 2019, Self-Supervised Generalisation with Meta Auxiliary Learning, NeurIPS, section 3.3
(masked softmax); Lin, Goyal, Girshick, He, Dollar, 2017, Focal Loss for Dense Object Detection, ICCV, equation 4.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from auxjax._internal.precision import accumulation_dtype


def block_of(values: jax.Array, labels: jax.Array, sub_classes: int) -> jax.Array:
    """The entries of each example's own primary class: `[n, C psi]` to `[n, psi]`.

    Args:
      values: `[n, C psi]`.
      labels: int `[n]`, primary classes in [0, C); others are taken as the nearest.
      sub_classes: psi.

    Raises:
      ValueError: shapes that do not fit.
      TypeError: labels that are not integers.
    """
    num_classes = _num_classes("block_of", values, labels, sub_classes)
    blocks = values.reshape(values.shape[0], num_classes, sub_classes)
    # Clipped: what stands in the place of a missing label must not become NaN, which 0 does not multiply away.
    return jnp.take_along_axis(blocks, labels[:, None, None], axis=1, mode="clip")[:, 0]


def in_block(block: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """The inverse of `block_of`: `[n, psi]` to `[n, C psi]`, zeros outside of the example's block."""
    chosen = jax.nn.one_hot(labels, num_classes, dtype=block.dtype)
    return (chosen[:, :, None] * block[:, None, :]).reshape(block.shape[0], -1)


def masked_softmax(logits: jax.Array, labels: jax.Array, sub_classes: int) -> jax.Array:
    """Softmax over the sub-classes of each example's primary class, exactly 0 elsewhere.

    The largest logit *of the block* is subtracted first, so that logits of any finite size give rows that sum to 1.
    (The published code adds 1e-8 of every other sub-class, and overflows beyond logits of 88 in float32.)

    Args:
      logits: `[n, C psi]`.
      labels: int `[n]`, primary classes in [0, C).
      sub_classes: psi, sub-classes per primary class.

    Returns:
      `[n, C psi]`, in float64 if the logits are, and in float32 otherwise.

    Raises:
      ValueError, TypeError: as `block_of`.
    """
    _num_classes("masked_softmax", logits, labels, sub_classes)
    block = block_of(logits.astype(accumulation_dtype(logits)), labels, sub_classes)
    return in_block(jax.nn.softmax(block, axis=-1), labels, logits.shape[-1] // sub_classes)


def focal_losses(logits: jax.Array, *, gamma: float = 2.0) -> jax.Array:
    """The focal loss of every class, as if it were the label: `-(1 - p_c)^gamma log p_c`.

    Args:
      logits: `[..., C]`.
      gamma: at least 0, which gives the cross-entropy; the literature's value is 2.

    Returns:
      `[..., C]`. The loss for a soft label y is `sum_c y_c` times this.
    """
    log_p = jax.nn.log_softmax(logits.astype(accumulation_dtype(logits)), axis=-1)
    if gamma == 0:
        return -log_p
    # 1 - p by expm1: with p near 1 the difference itself would round to 0, or below it.
    rest = -jnp.expm1(log_p)
    # Where p rounds to 1 the loss is 0, with all its derivatives in the logits. Those of the power are infinite there.
    sure = rest == 0
    return jnp.where(sure, jnp.zeros_like(rest), -(jnp.where(sure, jnp.ones_like(rest), rest) ** gamma) * log_p)


def mean_label(labels: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """`[n, C]` to `[C]`: how often each class is used by the labelled examples; zeros where there are none."""
    if mask is None:
        return jnp.mean(labels, axis=0)
    kept = jnp.where(mask[:, None], labels, jnp.zeros((), labels.dtype))
    return jnp.sum(kept, axis=0) / jnp.maximum(jnp.sum(mask, dtype=labels.dtype), jnp.ones((), labels.dtype))


def negative_entropy(usage: jax.Array, reduce: Callable = lambda tree: tree) -> jax.Array:
    """`sum_c u_c log u_c` of the mean label u, MAXL's regulariser: low where many classes are used.

    Args:
      usage: `[C]`, from `mean_label`.
      reduce: mean over replicas that see a part of the batch each. Applied to a copy that is not differentiated: the
        mean over replicas of this function's gradients is then the gradient for the whole batch.

    Returns:
      A scalar between `-log C` and 0.
    """
    whole = jax.lax.stop_gradient(reduce(usage))
    value = jnp.sum(whole * _log(whole))
    return value + jnp.sum((_log(whole) + 1.0) * (usage - jax.lax.stop_gradient(usage)))


def mean_entropy(labels: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The mean over labelled examples of each label's own entropy, in nats: 0 where all labels are hard."""
    return jnp.sum(mean_label(-labels * _log(labels), mask))


def _log(values: jax.Array) -> jax.Array:
    """log, and 0 at 0, where `p log p` is 0 as well."""
    positive = values > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, values, jnp.ones_like(values))), jnp.zeros_like(values))


def _num_classes(where: str, values, labels, sub_classes: int) -> int:
    """C, after a look at the shapes."""
    if jnp.ndim(values) != 2 or jnp.shape(labels) != jnp.shape(values)[:1]:
        raise ValueError(
            f"{where}: values {jnp.shape(values)} and labels {jnp.shape(labels)}; expected [n, classes x sub_classes] "
            "and [n]."
        )
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"{where}: labels are {jnp.result_type(labels)}; expected integers, the primary classes.")
    width = values.shape[1]
    if not isinstance(sub_classes, int) or sub_classes < 1 or width % sub_classes:
        raise ValueError(
            f"{where}: {width} auxiliary classes are not a whole number of blocks of sub_classes={sub_classes!r}; the "
            "network needs (primary classes) x sub_classes outputs."
        )
    return width // sub_classes
