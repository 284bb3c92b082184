"""Auto-Lambda: task weights that lower the primary loss after one look-ahead step of the real optimiser.

    min_lambda  L_0(theta+; other batch),     theta+ = theta + U(sum_k lambda_k grad L_k(theta))

with U one update of the inner optimiser, momentum and weight decay included (of the one inside of `optax.MultiSteps`).
Every task has a weight, the primary one, too; nothing keeps the weights positive.

Reference: Liu, James, Davison, Johns, 2022, Auto-Lambda: Disentangling Dynamic Task Relationships, TMLR.
"""

import jax.numpy as jnp
import optax

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax.formulas.losses import weighted_loss
from auxjax.hypergrad import BilevelProblem, finite_difference, one_step
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import absent_tasks, default_optimizers, descent, evaluation, outer_level


@register("hypergradient", needs={"auxiliary", "outer_batch"})
def auto_lambda(
    *,
    outer_optimizer: optax.GradientTransformation | None = None,
    outer_updates: int | None = None,
    form: str = "finite_difference",
    epsilon: float = 0.01,
    initial: float = 0.1,
) -> Method:
    """Weights by one look-ahead step.

    Args:
      outer_optimizer: optimiser of the weights; by default AdaGrad with steps in proportion to the weight, at a rate
        at which it grows tenfold, or falls to 0, in `outer_updates` updates that agree. The paper's for NYUv2 is
        `optax.adam(1e-4)`, for tens of thousands of updates.
      outer_updates: how many outer updates are planned, 100 if nothing is said; the default optimiser's rate follows.
      form: "finite_difference", the paper's, or "exact", which differentiates the look-ahead step itself.
      epsilon: length of the displacement of the finite difference.
      initial: all weights at the start, the primary task's too. The paper's 0.1 divides the effective learning rate by
        about ten at first; Adam as the inner optimiser does not feel it. Not 0, where nothing has a gradient.

    Returns:
      A `Method`, whose outer variables are `{task: scalar}`. Inner update: one joint gradient. Outer update: three
      inner gradients and one of the primary loss on the outer batch. The paper takes another training batch there and
      not held-out data; pass it as `outer_batch`.

    Raises:
      TypeError, ValueError: an impossible option; no auxiliary task, or an inner optimiser that needs more than
        gradients (when the state is made); params in half precision with finite differences (from the outer update).
    """
    checks.one_of("auto_lambda", ("finite_difference", "exact"), form=form)
    checks.number("auto_lambda", above=0, epsilon=epsilon)
    checks.number("auto_lambda", initial=initial)
    if not checks.is_traced(initial) and initial == 0:
        raise ValueError("auto_lambda(initial=0): expected another number; nothing has a gradient there.")
    optimizer = default_optimizers.chosen("auto_lambda", outer_optimizer, outer_updates, default_optimizers.of_weights)

    def init(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        evaluation.auxiliary_or_raise("auto_lambda", context, out)
        outer_level.look_ahead_optimizer("auto_lambda", context, state)  # raises here, before any training
        meta = {task: jnp.full((), initial, accumulation_dtype(value)) for task, value in out.values.items()}
        return outer_level.OuterState(meta, optimizer.init(meta), ())

    def weights_of(context, state, out):
        return state.method.meta

    def outer(context, state, inner_batch, outer_batch, key):
        def inner_loss(params, weights, batch):
            out = evaluation.evaluate(context.model, params, state.model_state, batch, key)
            return weighted_loss(out.values, weights, masks=out.masks)

        outer_loss = outer_level.primary_loss(context, state.model_state, key)
        problem = BilevelProblem(inner=inner_loss, outer=outer_loss, **outer_level.of_run(context))
        inside, opt_state = outer_level.look_ahead_optimizer("auto_lambda", context, state)
        if form == "exact":
            estimator = one_step(inside, opt_state=opt_state)
        else:
            estimator = finite_difference(inside, epsilon=epsilon, opt_state=opt_state)
        level = outer_level.OuterLevel(optimizer, estimator)
        options = {"share": context.share, "seen": absent_tasks.seen_tasks(context, state, inner_batch, key)}
        return outer_level.outer_step(level, problem, state, inner_batch, outer_batch, key, **options)

    inner, weights = descent.weighted_by(weights_of), evaluation.reported(weights_of)
    return Method(init, inner, outer, weights, shared=outer_level.shared)
