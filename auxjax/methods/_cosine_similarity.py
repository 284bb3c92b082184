"""Gradient cosine similarity: an auxiliary gradient is used as far as it points the primary gradient's way.

    trunk   theta <- theta - lr (g_0 + sum_k v_k g_k),     v_k = [cos(g_0, g_k) >= 0]  or  max(0, cos(g_0, g_k))
    heads   their own tasks' gradients, all of them

To first order a task that is let through does not raise the primary loss. The gates depend on the params through other
gradients, so the update is the gradient of no loss.

Reference: Du, Czarnecki, Jayakumar, Farajtabar, Pascanu, Lakshminarayanan, 2018, Adapting Auxiliary Losses Using
Gradient Similarity, algorithms 1 (weighted) and 2 (unweighted).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax._internal.safe_math import positive_or_one
from auxjax.formulas.task_gradients import module_products, squared_norms
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import descent, evaluation
from auxjax.methods.shared.module_weights import mixed_field, modules_of


@register("gradients", needs={"auxiliary"})
def cosine_similarity(
    *,
    form: str = "gate",
    module_of: Callable[[str], str] | None = None,
    auxiliary_weight: float = 1.0,
    chunk: int = 8,
) -> Method:
    """Gates auxiliary gradients by their cosine with the primary gradient, anew at every update.

    Args:
      form: "gate", the unweighted form, lets a task through or not; "weighted" multiplies its gradient by the cosine
        where that is positive.
      module_of: compare per module and not on the whole trunk: a function of a leaf's path to its module's name, see
        `auxjax.formulas.partition.modules_by_path`; `lambda path: path` gates every leaf by itself.
      auxiliary_weight: weight of the auxiliary losses, before any gate; at least 0.
      chunk: gradients that are in memory at a time where norms are needed; fewer, larger chunks compile faster.

    Returns:
      A `Method` without an outer level. The state is the last weights, `[M, K]` in order of the modules and of the
      tasks' names. Cost beyond a joint gradient: one gradient of the primary loss, one forward-mode pass and one
      reverse pass, for any K. The weighted form needs the norms, K reverse passes more; M modules take M forward-mode
      and M reverse passes. The trunk is `TaskModel.trunk`.

    Raises:
      ValueError: an impossible option; no auxiliary task (when the state is made).
    """
    if form not in ("gate", "weighted"):
        raise ValueError(f"cosine_similarity(form={form!r}): expected 'gate' or 'weighted'.")
    if not checks.is_traced(auxiliary_weight) and not 0 <= auxiliary_weight < float("inf"):
        raise ValueError(f"cosine_similarity(auxiliary_weight={auxiliary_weight}): expected a finite number >= 0.")
    options = _Options(form == "gate", module_of, auxiliary_weight, chunk)

    def weights(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        return descent.constant_weights(_mean_weights(context, state.method, out), out)

    return Method(partial(_init, options), partial(_inner, options), weights=weights)


class _Options(NamedTuple):
    gate: bool
    module_of: Callable[[str], str] | None
    auxiliary_weight: float
    chunk: int


def _init(options, context, state, batch, key):
    out = evaluation.loss_shapes(context, state, batch, key)
    count = len(evaluation.auxiliary_or_raise("cosine_similarity", context, out))
    return jnp.full(
        (len(modules_of(context, state.params, options.module_of).names), count),
        options.auxiliary_weight,
        accumulation_dtype(out.values),
    )


def _mean_weights(context, weights, out):
    """The weights, averaged over modules, for the log."""
    names = evaluation.auxiliary_tasks(out, context.model.primary)
    means = jnp.mean(weights, axis=0)
    return {context.model.primary: 1.0, **dict(zip(names, means, strict=True))}


def _inner(options, context, state, batch, key):
    modules = modules_of(context, state.params, options.module_of)

    def weights_of(tasks):
        gates = options.auxiliary_weight * _gates(options, tasks, modules)
        return jnp.concatenate([jnp.ones((len(gates), 1), gates.dtype), gates], axis=1)

    field, out, weights = mixed_field(
        "cosine_similarity", context, state, batch, key, modules, options.auxiliary_weight, weights_of
    )
    weights = weights[:, 1:].astype(state.method.dtype)
    # The field is averaged already; `descend` averages it once more, which changes nothing.
    new = descent.descend(context, state, field, out.state)
    return new._replace(method=weights), descent.loss_metrics(out, _mean_weights(context, weights, out))


def _gates(options, tasks, modules) -> jax.Array:
    """`[M, K]`."""
    primary = tasks.combine(jnp.zeros_like(tasks.losses).at[0].set(1.0))
    single = len(modules.names) == 1
    products = tasks.products(primary)[None, :] if single else module_products(tasks, primary, modules)
    if options.gate:
        return (products[:, 1:] >= 0).astype(products.dtype)
    squares = squared_norms(tasks, modules=modules, chunk=options.chunk)
    scale = jnp.sqrt(squares[:, :1]) * jnp.sqrt(squares[:, 1:])  # the product of the squares would leave float32
    # A task without a gradient has no direction; whatever its weight, it changes nothing.
    cosines = jnp.where(scale > 0, products[:, 1:].astype(scale.dtype) / positive_or_one(scale), 0.0)
    return jnp.maximum(cosines, 0.0)
