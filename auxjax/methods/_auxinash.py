"""AuxiNash: task weights from Nash bargaining, with bargaining powers learned for the primary task's sake.

    inner   theta <- theta - lr sum_k a_k g_k,    G a = p / a,   G_jk = <g_j, g_k> on the trunk
    outer   min_p L_0(theta*(p); other batch),    p on the simplex

The weights a are held fixed when the inner update is differentiated in the params, and the chain rule takes the
hypergradient from a to p. The trunk's update has length lr whatever the gradients are, so the learning rate has to
fall.

Reference: Shamsian, Navon, Glazer, Kawaguchi, Chechik, Fetaya, 2023, Auxiliary Learning as an Asymmetric Bargaining
Game, ICML.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax.formulas.bargaining import bargaining_weights
from auxjax.formulas.losses import weighted_loss
from auxjax.formulas.simplex import project_simplex
from auxjax.formulas.task_gradients import gram_matrix, task_gradients
from auxjax.hypergrad import Amortised, BilevelProblem, Estimator
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import absent_tasks, default_optimizers, descent, evaluation, outer_level
from auxjax.methods.shared.positive_curvature import of_outputs


class AuxinashState(NamedTuple):
    """State of AuxiNash.

    Attributes:
      outer: `OuterState` whose meta are the powers p, `[1 + K]`, the primary task's first, then in order of the names.
      weights: `[1 + K]`, a, of the last time they were computed.
    """

    outer: Any
    weights: jax.Array


@register("hypergradient", needs={"auxiliary", "outer_batch"})
def auxinash(
    *,
    outer_optimizer: optax.GradientTransformation | None = None,
    outer_updates: int | None = None,
    hypergradient: Estimator | Amortised | None = None,
    refresh: str = "inner",
    smallest: float = 1e-3,
    chunk: int = 8,
    warm_start: bool = False,
) -> Method:
    """Bargaining weights with learned powers.

    Args:
      outer_optimizer: optimiser of the powers; by default steps as long as hypergradients agree, at a rate
        at which a power grows tenfold, or falls to 0, in `outer_updates` updates that agree. The paper's is
        `optax.sgd(5e-3, momentum=0.9)`, which depends on the scale of the losses.
      outer_updates: how many outer updates are planned, 100 if nothing is said; the default optimiser's rate follows.
      hypergradient: an estimator, with or without state; the default is that of `jtds`.
      refresh: compute the Gram matrix and the weights at every "inner" update, or at "outer" updates only, in between
        which they stay.
      smallest: lower bound on the powers; a task without power would have no weight for ever.
      chunk: gradients that are in memory at a time.
      warm_start: start each linear solve from the last solution.

    Returns:
      A `Method`. Inner update: a joint gradient and, with `refresh="inner"`, the Gram matrix, 1 + K reverse and as many
      forward-mode passes. Outer update: the Gram matrix, and what the hypergradient costs. The paper takes another
      training batch for the outer loss and not held-out data; pass it as `outer_batch`. A task without a label in the
      batch of an outer update keeps its weight and its power.

    Raises:
      TypeError, ValueError: an impossible option; no auxiliary task (when the state is made).
    """
    checks.one_of("auxinash", ("inner", "outer"), refresh=refresh)
    checks.number("auxinash", above=0, below=1, smallest=smallest)
    optimizer = default_optimizers.chosen("auxinash", outer_optimizer, outer_updates, default_optimizers.of_shares)
    level = outer_level.make_outer_level("auxinash", optimizer, hypergradient, warm_start)

    def gram_of(context, state, batch, key, dtype):
        losses, trunk = evaluation.loss_vector(context, state, batch, key), evaluation.trunk_of(context, state.params)
        tasks = task_gradients(
            losses, state.params, trunk=trunk, reduce=context.reduce, where="auxinash", products=context.model.products
        )
        return gram_matrix(tasks, chunk=chunk).astype(dtype)

    def init(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        count = 1 + len(evaluation.auxiliary_or_raise("auxinash", context, out))
        if not checks.is_traced(smallest) and count * smallest >= 1:
            raise ValueError(f"auxinash(smallest={smallest}): {count} tasks cannot all have that and sum to 1.")
        powers = jnp.full((count,), 1.0 / count, accumulation_dtype(out.values))
        gram = gram_of(context, state, batch, key, powers.dtype)
        problem = _problem(context, state.model_state, gram, key)
        outer = outer_level.init_outer(level, problem, state.params, powers, batch, key)
        seen, weights = evaluation.labelled_in_batch(context, state, batch, key), bargaining_weights(gram, powers)
        usual = jnp.sum(weights) / jnp.maximum(jnp.sum(seen, dtype=weights.dtype), 1.0)
        return AuxinashState(outer, jnp.where(seen, weights, usual))

    def weights_now(context, state, batch, key, gram, powers):
        """The bargaining weights; those of a task that the batch has no label of, which would be 0, stay."""
        there = evaluation.labelled_in_batch(context, state, batch, key)
        found = bargaining_weights(gram, powers)
        return jnp.where(there & jnp.isfinite(found), found, state.method.weights)

    def inner(context, state, batch, key):
        if refresh == "inner":
            gram = gram_of(context, state, batch, key, state.method.weights.dtype)
            weights = weights_now(context, state, batch, key, gram, state.method.outer.meta)
            state = state._replace(method=state.method._replace(weights=weights))
        return descent.weighted_by(_weights_of)(context, state, batch, key)

    def outer(context, state, inner_batch, outer_batch, key):
        previous = state.method
        gram = gram_of(context, state, inner_batch, key, previous.weights.dtype)
        problem = _problem(context, state.model_state, gram, key)

        out = evaluation.loss_shapes(context, state, inner_batch, key)
        seen = absent_tasks.seen_tasks(context, state, inner_batch, key)
        if seen is not None:
            seen = jnp.stack([seen[task] for task in evaluation.all_tasks(context, out)])

        def project(powers):
            free = 1.0 - len(powers) * smallest
            if seen is None:
                return smallest + project_simplex(powers - smallest, free)
            kept = previous.outer.meta - smallest
            return smallest + absent_tasks.project_seen(powers - smallest, kept, seen, free)

        point = (problem, state.params, previous.outer, inner_batch, outer_batch, key)
        outer, metrics = outer_level.update_outer(level, *point, share=context.share, project=project, seen=seen)
        metrics |= {f"power/{task}": power for task, power in _named(context, outer.meta, out).items()}
        weights = weights_now(context, state, inner_batch, key, gram, outer.meta)
        return state._replace(method=AuxinashState(outer, weights)), metrics

    return Method(init, inner, outer, evaluation.reported(_weights_of), shared=_shared, all_params=True)


def _shared(path: str) -> bool:
    """The powers: the weights are those at a copy's own params."""
    part, _, rest = path.partition("/")
    return part == "outer" and outer_level.shared(rest)


def _named(context, values, out) -> dict[str, jax.Array]:
    return evaluation.by_task(evaluation.all_tasks(context, out), values)


def _weights_of(context, state, out):
    return _named(context, state.method.weights, out)


def _problem(context, model_state, gram, key) -> BilevelProblem:
    def combine(powers, out):
        return weighted_loss(out.values, _named(context, bargaining_weights(gram, powers), out), masks=out.masks)

    def inner(params, powers, batch):
        return combine(powers, evaluation.evaluate(context.model, params, model_state, batch, key))

    outer = outer_level.primary_loss(context, model_state, key)
    curvature = of_outputs(context.model, model_state, key, combine)
    return BilevelProblem(inner=inner, outer=outer, curvature=curvature, **outer_level.of_run(context))
