"""Gradient cosine similarity: an auxiliary gradient is used as far as it points the primary gradient's way.

    trunk   theta <- theta - lr (g_0 + sum_k v_k g_k),     v_k = [cos(g_0, g_k) >= 0]  or  max(0, cos(g_0, g_k))
    heads   their own tasks' gradients, all of them

To first order a task that is let through does not raise the primary loss. The gates depend on the params through other
gradients, so the update is the gradient of no loss.

Reference: Du, Czarnecki, Jayakumar, Farajtabar, Pascanu, Lakshminarayanan, 2018, Adapting Auxiliary Losses Using
Gradient Similarity, algorithms 1 (weighted) and 2 (unweighted).
"""

from collections.abc import Callable

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
      TypeError, ValueError: an impossible option; no auxiliary task (when the state is made).
    """
    checks.one_of("cosine_similarity", ("gate", "weighted"), form=form)
    checks.number("cosine_similarity", least=0, auxiliary_weight=auxiliary_weight)

    def init(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        count = len(evaluation.auxiliary_or_raise("cosine_similarity", context, out))
        modules = modules_of(context, state.params, module_of)
        return jnp.full((len(modules.names), count), auxiliary_weight, accumulation_dtype(out.values))

    def gates_of(tasks, modules) -> jax.Array:
        """`[M, K]`."""
        primary = tasks.combine(jnp.zeros_like(tasks.losses).at[0].set(1.0))
        single = len(modules.names) == 1
        products = tasks.products(primary)[None, :] if single else module_products(tasks, primary, modules)
        if form == "gate":
            return (products[:, 1:] >= 0).astype(products.dtype)
        squares = squared_norms(tasks, modules=modules, chunk=chunk)
        scale = jnp.sqrt(squares[:, :1]) * jnp.sqrt(squares[:, 1:])  # the product of the squares would leave float32
        # A task without a gradient has no direction; whatever its weight, it changes nothing.
        cosines = jnp.where(scale > 0, products[:, 1:].astype(scale.dtype) / positive_or_one(scale), 0.0)
        return jnp.maximum(cosines, 0.0)

    def inner(context, state, batch, key):
        modules = modules_of(context, state.params, module_of)

        def mixture(tasks):
            gates = auxiliary_weight * gates_of(tasks, modules)
            return jnp.concatenate([jnp.ones((len(gates), 1), gates.dtype), gates], axis=1)

        point = ("cosine_similarity", context, state, batch, key, modules)
        field, out, weights = mixed_field(*point, auxiliary_weight, mixture)
        # The field is averaged already; `descend` averages it once more, which changes nothing.
        state = state._replace(method=weights[:, 1:].astype(state.method.dtype))
        means = _weights_of(context, state, out)
        new = descent.descend_weighted(context, state, field, out, means, batch, key)
        return new, descent.loss_metrics(out, means)

    return Method(init, inner, weights=evaluation.reported(_weights_of))


def _weights_of(context, state, out):
    """The weights, averaged over modules."""
    return evaluation.beside_primary(context, out, jnp.mean(state.method, axis=0))
