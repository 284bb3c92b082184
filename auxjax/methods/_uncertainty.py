"""Uncertainty weighting: every task's loss divided by a noise variance that is learned with the params.

    squared errors    min  exp(-s_k) / 2 * L_k + s_k / 2,        s_k = log sigma_k^2
    cross-entropies   min  exp(-s_k)     * L_k + s_k / 2

summed over tasks: the negative log-likelihoods of Gaussian outputs with variance sigma_k^2, and (approximately) of
softmax outputs at temperature sigma_k^2. The weight of a task is then about one over its loss. The primary task is
weighed like the others and may lose its weight: the method does not distinguish the primary task.

Reference: Kendall, Gal, Cipolla, 2018, Multi-Task Learning Using Uncertainty to Weigh Losses, equations 7 and 10.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import absent_tasks, descent, evaluation


class UncertaintyState(NamedTuple):
    """State of uncertainty weighting.

    Attributes:
      log_variances: `[tasks]`, s_k of the tasks with learned weights in the order of their names.
      opt_state: state of their optimiser.
    """

    log_variances: jax.Array
    opt_state: Any


@register("statistics of losses")
def uncertainty(
    *,
    optimizer: optax.GradientTransformation | None = None,
    regression: tuple[str, ...] = (),
    form: str = "paper",
    initial: float | None = None,
    smallest: float = -10.0,
    weigh_primary: bool = True,
) -> Method:
    """Weights from learned noise variances.

    Args:
      optimizer: optimiser of the log variances, in the same updates as the params; `optax.adam(1e-3)` by default.
      regression: names of the tasks whose losses are squared errors, with the factor 1/2 above. All others are taken
        for cross-entropies.
      form: "paper" distinguishes the two kinds of losses. "public_code" has the factor 1/2 for all of them, as widely
        used implementations do, and starts at s = -0.5.
      initial: s at the start; 0 (weights 1, or 1/2) in the paper's form, -0.5 in the public code's.
      smallest: lower bound on s. A loss that goes negative (a cosine, a Gaussian log-likelihood) pulls s to minus
        infinity; a log variance of -10 is a weight of 22,000.
      weigh_primary: False keeps the primary task's weight at 1.

    Returns:
      A `Method` without an outer level. Cost: one gradient of the joint loss. A task without a labelled example in a
      batch leaves its variance as it is, and so does a loss that is not finite (`skipped` counts them).

    Raises:
      TypeError, ValueError: an impossible option; a name in `regression` that is not a task (when the state is made).
    """
    checks.one_of("uncertainty", ("paper", "public_code"), form=form)
    if isinstance(regression, str):
        raise ValueError(
            f"uncertainty(regression={regression!r}): expected a tuple of names, such as ({regression!r},)."
        )
    start = (0.0 if form == "paper" else -0.5) if initial is None else initial
    checks.number("uncertainty", smallest=smallest, initial=start)
    if not checks.is_traced(start, smallest) and start < smallest:
        raise ValueError(f"uncertainty(initial={start}, smallest={smallest}): expected smallest <= initial.")
    checks.optimizer("uncertainty", optimizer=optimizer)
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer

    def tasks_of(context, out):
        return sorted(out.values) if weigh_primary else evaluation.auxiliary_or_raise("uncertainty", context, out)

    def learned(tasks, log_variances):
        halved = [form == "public_code" or task in regression for task in tasks]
        return jnp.exp(-log_variances) * jnp.asarray(np.where(halved, 0.5, 1.0), log_variances.dtype)

    def weights_of(context, state, out):
        tasks = tasks_of(context, out)
        return {context.model.primary: 1.0, **evaluation.by_task(tasks, learned(tasks, state.method.log_variances))}

    def init(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        evaluation.check_names("uncertainty(regression=)", regression, out)
        variances = jnp.full(len(tasks_of(context, out)), start, accumulation_dtype(*out.values.values()))
        return UncertaintyState(variances, optimizer.init(variances))

    def inner(context, state, batch, key):
        grads, out, weights = descent.weighted_gradient(
            context, state, batch, key, lambda out: weights_of(context, state, out)
        )
        variances, tasks = state.method.log_variances, tasks_of(context, out)
        # d/ds (c exp(-s) L + s / 2), without the second term's pull where there is nothing to weigh.
        means, seen, skipped = evaluation.observed(context, out, tasks)
        slopes = jnp.where(seen, 0.5 - learned(tasks, variances) * means.astype(variances.dtype), 0.0)
        updates, opt_state = optimizer.update(slopes, state.method.opt_state, variances)
        opt_state = absent_tasks.keep_unseen(seen, opt_state, state.method.opt_state)
        moved = jnp.maximum(descent.apply_updates(variances, updates), smallest)
        moved = jnp.where(seen, moved, variances)
        metrics = descent.loss_metrics(out, weights) | {"skipped": skipped}
        metrics |= {f"log_variance/{task}": s for task, s in evaluation.by_task(tasks, moved).items()}
        new = descent.descend_weighted(context, state, grads, out, weights, batch, key)
        return new._replace(method=UncertaintyState(moved, opt_state)), metrics

    return Method(init, inner, weights=evaluation.reported(weights_of))
