"""WAMAL: MAXL with a learned weight for every example's generated label.

    inner   min_theta  L_0(theta) + w mean_i v_i(phi) l(theta; x_i, y~_i(phi)),       v_i = 2^(2 R s_i - R)

with s_i in (0, 1) from the generator, so that weights lie between 2^-R and 2^R and start near 1. The outer loss is
MAXL's.

Reference: the weight-aware variant of MAXL in the public code of RL-AUX (2025, arXiv 2510.22940), where R = 5.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks
from auxjax.formulas import soft_labels
from auxjax.formulas.losses import masked_mean
from auxjax.hypergrad import Amortised, Estimator
from auxjax.interface import Method
from auxjax.methods._maxl import make_method
from auxjax.methods._registry import register
from auxjax.methods.shared import generation


@register("generated tasks", needs={"outer_batch", "label_losses"})
def wamal(
    *,
    generator: generation.Generator,
    labels: Callable[[Any], jax.Array],
    sub_classes: int = 5,
    weight_range: float = 5.0,
    normalise: bool = False,
    auxiliary_weight: float = 1.0,
    entropy_weight: float = 0.2,
    sharpness_weight: float = 0.0,
    outer_optimizer: optax.GradientTransformation | None = None,
    form: str = "exact",
    look_ahead_steps: int = 1,
    epsilon: float = 0.01,
    hypergradient: Estimator | Amortised | None = None,
    reuse_batch: bool = False,
) -> Method:
    """Generates soft auxiliary labels and their weights.

    Args:
      generator: `Generator(init, apply)`, with `apply(meta, batch)` a pair: the logits `[n, C psi]` of the labels, and
        `[n]` numbers whose sigmoid is s.
      labels: `batch -> int [n]`, the primary classes.
      sub_classes: psi.
      weight_range: R.
      normalise: divide the weights by their mean over the batch, so that only their ratios are learned;
        inside `pmap` every replica then takes the whole batch.
      auxiliary_weight, entropy_weight, sharpness_weight, outer_optimizer, form, look_ahead_steps, epsilon,
        hypergradient, reuse_batch: as `maxl` has them.

    Returns:
      A `Method`, at the cost of `maxl`.

    Raises:
      ValueError, TypeError: as `maxl`.
    """
    shared = locals()
    own = {name: shared.pop(name) for name in ("weight_range", "normalise")}
    checks.number("wamal", least=0, weight_range=weight_range)
    method = make_method("wamal", partial(_labelling, labels, sub_classes, **own), **shared)
    return method._replace(whole_batch=normalise)  # the mean is the batch's


def _labelling(labels, sub_classes, outputs, batch, *, weight_range, normalise) -> generation.Labelling:
    if not (isinstance(outputs, tuple) and len(outputs) == 2 and jnp.shape(outputs[1]) == jnp.shape(outputs[0])[:1]):
        raise TypeError(
            "wamal(generator=): apply must return a pair, logits [n, classes x sub_classes] and scores [n]; it "
            f"returned {jax.tree.map(jnp.shape, outputs)}."
        )
    logits, scores = outputs
    made = soft_labels.masked_softmax(logits, labels(batch), sub_classes)
    weights = jnp.exp2((2.0 * jax.nn.sigmoid(scores.astype(made.dtype)) - 1.0) * weight_range)
    return generation.Labelling(made, weights / masked_mean(weights) if normalise else weights)
