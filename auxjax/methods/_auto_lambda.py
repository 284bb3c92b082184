"""Auto-Lambda: task weights that lower the primary loss after one look-ahead step of the real optimiser.

    min_lambda  L_0(theta+; other batch),     theta+ = theta + U(sum_k lambda_k grad L_k(theta))

with U one update of the inner optimiser, momentum and weight decay included. Every task has a weight, the primary one,
too; nothing keeps the weights positive.

Reference: Liu, James, Davison, Johns, 2022, Auto-Lambda: Disentangling Dynamic Task Relationships, TMLR.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import optax

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax.formulas.losses import weighted_loss
from auxjax.hypergrad import BilevelProblem, finite_difference, one_step
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import descent, evaluation, outer_level


@register("hypergradient", needs={"auxiliary", "outer_batch"})
def auto_lambda(
    *,
    outer_optimizer: optax.GradientTransformation | None = None,
    form: str = "finite_difference",
    epsilon: float = 0.01,
    initial: float = 0.1,
) -> Method:
    """Weights by one look-ahead step.

    Args:
      outer_optimizer: optimiser of the weights; `optax.adam(1e-4)` by default, the paper's for NYUv2.
      form: "finite_difference", the paper's, or "exact", which differentiates the look-ahead step itself.
      epsilon: length of the displacement of the finite difference.
      initial: all weights at the start, the primary task's too. The paper's 0.1 divides the effective learning rate by
        about ten at first; Adam as the inner optimiser does not feel it. Not 0, where nothing has a gradient.

    Returns:
      A `Method`, whose outer variables are `{task: scalar}`. Inner update: one joint gradient. Outer update: three
      inner gradients and one of the primary loss on the outer batch. The paper takes another training batch there and
      not held-out data; pass it as `outer_batch`.

    Raises:
      ValueError: an impossible option; no auxiliary task (when the state is made); params in half precision with
        finite differences (from the outer update).
    """
    if form not in ("finite_difference", "exact"):
        raise ValueError(f"auto_lambda(form={form!r}): expected 'finite_difference' or 'exact'.")
    known = not checks.is_traced(epsilon, initial)
    if known and (not 0 < epsilon < float("inf") or not -float("inf") < initial < float("inf") or initial == 0):
        raise ValueError(
            f"auto_lambda(epsilon={epsilon}, initial={initial}): expected finite numbers, epsilon > 0 and initial not "
            "0."
        )
    optimizer = optax.adam(1e-4) if outer_optimizer is None else outer_optimizer
    options = _Options(optimizer, form == "exact", epsilon, initial)

    def inner(context, state, batch, key):
        return descent.weighted_update(context, state, batch, key, lambda out: state.method.meta)

    def weights(context, state, batch, key):
        return descent.constant_weights(state.method.meta, evaluation.loss_shapes(context, state, batch, key))

    return Method(partial(_init, options), inner, partial(_outer, options), weights)


class _Options(NamedTuple):
    optimizer: optax.GradientTransformation
    exact: bool
    epsilon: float
    initial: float


def _init(options, context, state, batch, key):
    out = evaluation.loss_shapes(context, state, batch, key)
    evaluation.auxiliary_or_raise("auto_lambda", context, out)
    meta = {task: jnp.full((), options.initial, accumulation_dtype(value)) for task, value in out.values.items()}
    return outer_level.OuterState(meta, options.optimizer.init(meta), ())


def _outer(options, context, state, inner_batch, outer_batch, key):
    def inner_loss(params, weights, batch):
        out = evaluation.evaluate(context.model, params, state.model_state, batch, key)
        return weighted_loss(out.values, weights, masks=out.masks)

    outer = outer_level.primary_loss(context, state.model_state, key)
    problem = BilevelProblem(inner=inner_loss, outer=outer, reduce=outer_level.reduction(context))
    if options.exact:
        estimator = one_step(context.optimizer, opt_state=state.opt_state)
    else:
        estimator = finite_difference(context.optimizer, epsilon=options.epsilon, opt_state=state.opt_state)
    level = outer_level.OuterLevel(options.optimizer, estimator)
    point = (problem, state.params, state.method, inner_batch, outer_batch, key)
    new, metrics = outer_level.update_outer(level, *point)
    return state._replace(method=new), metrics
