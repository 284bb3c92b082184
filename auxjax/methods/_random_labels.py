"""Random auxiliary labels: a control. What a method that generates labels gains over these, it has learned.

    y~_i = one_hot(c_i psi + j_i),      j_i uniform on 0 .. psi - 1, drawn once for the whole run

Splitting every primary class at random leaves the auxiliary head the primary task plus noise: a second, regularised
classifier on the same features, which helps by itself.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax.formulas import soft_labels
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import generation


@register("generated tasks", needs={"ids", "label_losses"})
def random_labels(
    *,
    labels: Callable[[Any], jax.Array],
    ids: Callable[[Any], jax.Array],
    num_classes: int,
    sub_classes: int = 5,
    auxiliary_weight: float = 1.0,
) -> Method:
    """Trains on fixed random sub-classes.

    Args:
      labels: `batch -> int [n]`, the primary classes.
      ids: `batch -> int [n]`, a number of its own for every example, so that it always gets the same label.
      num_classes: C, primary classes.
      sub_classes: psi.
      auxiliary_weight: weight of the generated task.

    Returns:
      A `Method` without an outer level; its state is the key the labels are drawn with. Cost: one gradient.

    Raises:
      ValueError, TypeError: an impossible option; a model without an auxiliary head, or one of another width (when the
        state is made).
    """
    checks.number("random_labels", least=0, auxiliary_weight=auxiliary_weight)
    checks.count("random_labels", 1, num_classes=num_classes, sub_classes=sub_classes)
    checks.function("random_labels", "a function of the batch", labels=labels, ids=ids)

    def label(state, batch):
        dtype = accumulation_dtype(state.params)
        known, numbers = generation.primary_labels("random_labels", labels, batch), ids(batch)
        keys = jax.vmap(lambda number: jax.random.fold_in(state.method, number))(jnp.asarray(numbers, jnp.uint32))
        chosen = jax.vmap(lambda one: jax.random.randint(one, (), 0, sub_classes))(keys)
        block = jax.nn.one_hot(chosen, sub_classes, dtype=dtype)
        return generation.Labelling(soft_labels.in_block(block, known, num_classes))

    def init(context, state, batch, key):
        generation.check_model("random_labels", context, state, batch, key, num_classes * sub_classes)
        found = jnp.shape(ids(batch))
        if found != jnp.shape(labels(batch)) or not jnp.issubdtype(jnp.result_type(ids(batch)), jnp.integer):
            raise ValueError(
                f"random_labels(ids=) returned {jnp.result_type(ids(batch))}{list(found)}; expected one integer per "
                f"example, [{jnp.shape(labels(batch))[0]}]."
            )
        return jax.random.clone(key)

    def inner(context, state, batch, key):
        return generation.descend_on(context, state, batch, key, label(state, batch), auxiliary_weight)

    def weights(context, state, batch, key):
        return generation.reported_weights(context, state, batch, key, label(state, batch), auxiliary_weight)

    return Method(init=init, inner=inner, weights=weights)
