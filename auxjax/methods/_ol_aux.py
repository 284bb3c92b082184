"""OL_AUX: auxiliary weights that make the primary loss fall fastest.

One update with step eta on the joint loss lowers the primary loss by eta <g_0, g_0 + sum_k w_k g_k> in first order, so
the gradient of that decrease in w_k is eta <g_0, g_k>:

    w_k <- w_k + beta sum_{n = 1..N} <g_0, g_k>_n

over the last N updates of the params. Nothing bounds the weights: they grow with the scale of the gradients, and a
task that points the primary task's way gets ever more weight. ARML's gradient has one term more,
-sum_j w_j <g_j, g_k>, which does bound it. The paper also divides losses by running means (its "adaptive loss
balancing"), which is left to the model's losses here.

Reference: Lin, Baweja, Kantor, Held, 2019, Adaptive Auxiliary Task Weighting for Reinforcement Learning, NeurIPS.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax.formulas.task_gradients import task_gradients
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import absent_tasks, default_optimizers, descent, evaluation


class OlAuxState(NamedTuple):
    """State of OL_AUX.

    Attributes:
      weights: `[K]`, weights of the auxiliary tasks in order of their names; the primary task's weight is 1.
      opt_state: state of their optimiser.
      products: `[K]`, sum of `<g_0, g_k>` since the last update of the weights; `()` in the one-step form.
    """

    weights: jax.Array
    opt_state: Any
    products: Any


@register("gradients", needs={"auxiliary"})
def ol_aux(
    *,
    outer_optimizer: optax.GradientTransformation | None = None,
    outer_updates: int | None = None,
    form: str = "n_step",
    initial: float = 1.0,
    clamp: bool = False,
) -> Method:
    """Online learning of auxiliary weights from products of gradients.

    Args:
      outer_optimizer: optimiser of the weights, given the gradient `-sum <g_0, g_k>`; by default AdaGrad with steps
        in proportion to the weight, at a rate at which it grows tenfold, or falls to 0, in `outer_updates` updates that
        agree. The paper's plain steps, `optax.sgd(rate)`, depend on the scale of the losses; the update's step size eta
        is part of their rate.
      outer_updates: how many outer updates are planned, 100 if nothing is said; the default optimiser's rate follows.
      form: "n_step" adds up the products at all inner updates since the last outer one, so that N is `inner_steps` of
        `make_step`. "one_step" takes the products at the outer update alone, as ARML's code has its baseline.
      initial: all weights at the start.
      clamp: keep weights at or above 0, as ARML's code does; the paper does not.

    Returns:
      A `Method`. Beyond a joint gradient, the products cost one gradient of the primary loss and one forward-mode pass,
      whatever K is: at every inner update ("n_step") or at outer ones ("one_step"). Gradients are compared on
      `TaskModel.trunk`. It uses inner batches and ignores the outer one. A task without a label since the last outer
      update keeps its weight, whatever the optimiser's momentum. Products that are not finite are left out (`skipped`
      counts them).

    Raises:
      TypeError, ValueError: an impossible option; no auxiliary task (when the state is made).
    """
    checks.one_of("ol_aux", ("n_step", "one_step"), form=form)
    checks.number("ol_aux", initial=initial)
    optimizer = default_optimizers.chosen("ol_aux", outer_optimizer, outer_updates, default_optimizers.of_weights)

    def init(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        names = evaluation.auxiliary_or_raise("ol_aux", context, out)
        dtype = accumulation_dtype(out.values)
        weights = jnp.full((len(names),), initial, dtype)
        products = jnp.zeros((len(names),), dtype) if form == "n_step" else ()
        return OlAuxState(weights, optimizer.init(weights), products)

    def weights_of(context, state, out):
        return evaluation.beside_primary(context, out, state.method.weights)

    def inner(context, state, batch, key):
        new, metrics = descent.weighted_update(context, state, batch, key, lambda out: weights_of(context, state, out))
        if form == "n_step":
            found = _products(context, state, batch, key)
            finite = jnp.isfinite(found)
            products = state.method.products + jnp.where(finite, found, 0.0)
            new = new._replace(method=state.method._replace(products=products))
            metrics |= {"skipped": jnp.sum(~finite, dtype=jnp.float32)}
        return new, metrics

    def outer(context, state, inner_batch, outer_batch, key):
        del outer_batch  # OL_AUX has no held-out set
        previous = state.method
        products = previous.products if form == "n_step" else _products(context, state, inner_batch, key)
        finite = jnp.isfinite(products)
        shared = context.share(jnp.where(finite, products, 0.0))
        updates, opt_state = optimizer.update(-shared, previous.opt_state, previous.weights)
        weights = descent.apply_updates(previous.weights, updates)
        weights = jnp.maximum(weights, 0.0) if clamp else weights
        finite = evaluation.in_any_copy(context, finite)
        seen = evaluation.in_any_copy(context, products != 0) & finite  # of a task without a label it is 0
        weights, opt_state = absent_tasks.keep_unseen(
            seen, (weights, opt_state), (previous.weights, previous.opt_state)
        )
        new = OlAuxState(weights, opt_state, jax.tree.map(jnp.zeros_like, previous.products))
        out = evaluation.loss_shapes(context, state, inner_batch, key)
        named = evaluation.by_task(evaluation.auxiliary_tasks(out, context.model.primary), products)
        metrics = {f"gradient_product/{name}": product for name, product in named.items()}
        if form == "one_step":
            metrics["skipped"] = jnp.sum(~finite, dtype=jnp.float32)
        return state._replace(method=new), metrics

    weights = evaluation.reported(weights_of)
    return Method(init, inner, outer, weights, shared=lambda path: path != "products", outer_data=False)


def _products(context, state, batch, key):
    """`[K]`, `<g_0, g_k>` on the trunk."""
    losses, trunk = evaluation.loss_vector(context, state, batch, key), evaluation.trunk_of(context, state.params)
    tasks = task_gradients(
        losses, state.params, trunk=trunk, reduce=context.reduce, where="ol_aux", products=context.model.products
    )
    primary = tasks.combine(jnp.zeros_like(tasks.losses).at[0].set(1.0))
    return tasks.products(primary)[1:].astype(state.method.weights.dtype)
