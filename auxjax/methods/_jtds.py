"""JTDS: a scheduler that weighs every example of every task by its task, its features and its loss.

    w_ik = s(alpha_k) * s(P_k . c_i) * sigmoid(a_k z_ik + b_k)

alpha_k says how much task k is worth, the prototype P_k which features c_i (the trunk's output) it learns from, and the
loss filter a_k, b_k which losses z_ik are believed: under label noise it learns to fall. The primary task is weighed,
too. That is O(d K) numbers instead of one per example and task. Two levels:

    inner   theta <- theta - lr * sum_k mean_i w_ik grad l_ik(theta)       weights held fixed
    outer   min_phi L_dev(theta*(phi)),   phi = {alpha, P, a, b},          by implicit differentiation

Reference: Chen, Wang, Guan, Liu, Zhu, 2022, Auxiliary Learning with Joint Task and Data Scheduling, ICML.
The free table of weights, one per example and task, that the paper compares with is `n_jtds`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax._internal.safe_math import positive_or_one
from auxjax.formulas.losses import masked_mean, weighted_loss
from auxjax.hypergrad import Amortised, BilevelProblem, Estimator
from auxjax.interface import Method, no_reduction
from auxjax.methods._registry import register
from auxjax.methods.shared import absent_tasks, default_optimizers, descent, evaluation, outer_level
from auxjax.methods.shared.positive_curvature import of_outputs


class TaskSchedule(NamedTuple):
    """The scheduler's parameters for one task.

    Attributes:
      importance: scalar, alpha_k.
      prototype: `[d]`, P_k, compared with the trunk's features.
      slope: scalar, a_k of the loss filter; negative means that high losses are distrusted.
      offset: scalar, b_k of the loss filter.
      bias: scalar, q_k, added to the product of features and prototype; `()` without `feature_bias`.
    """

    importance: jax.Array
    prototype: jax.Array
    slope: jax.Array
    offset: jax.Array
    bias: Any = ()


@register("hypergradient", needs={"outer_batch", "features"})
def jtds(
    *,
    outer_optimizer: optax.GradientTransformation | None = None,
    outer_updates: int | None = None,
    hypergradient: Estimator | Amortised | None = None,
    activation: str = "sigmoid",
    feature_bias: bool = False,
    standardise: bool | str = True,
    schedule_primary: bool = True,
    jacobian: str = "held_fixed",
    warm_start: bool = False,
) -> Method:
    """Joint task and data scheduling.

    Args:
      outer_optimizer: optimiser of the scheduler; by default steps as long as hypergradients agree with each
        other, at a rate made for `outer_updates` of them: of 100 planned, ten that agree take a factor from 1/2 to
        1/100. The authors' code uses SGD with momentum on a hypergradient that lacks the Neumann series' leading step
        size and is clipped at norm 10; ours has its true scale, for an optimiser that does not depend on it.
      outer_updates: how many outer updates are planned, 100 if nothing is said; the default optimiser's rate follows.
      hypergradient: an estimator such as `implicit(neumann(3))`, the default: the paper's four terms, but with a step
        size fitted to the curvature. (The authors' step of 1e-4 leaves the Hessian without effect.) With a model that
        gives its outputs, and the Jacobian "held_fixed", the default is better, ten steps of conjugate gradients with
        the Gauss-Newton matrix, damped by 0.01. Or an estimator with state, such as `amortise(...)` or
        `single_loop()`, whose state becomes part of the training state.
      activation: s for the task and feature factors: "sigmoid" (the paper; weights below 1) or "softplus" (the
        authors' code; unbounded above).
      feature_bias: learn a bias in the feature factor, s(P_k . c_i + q_k), 0 at first, as the authors' code does.
      standardise: give the loss filter losses with mean 0 and variance 1 over the labelled examples of the batch.
        "sample" divides by the sample deviation (n - 1 in its denominator) plus 1e-6, as the authors' code does: losses
        below 1e-6 are then flat to the filter; inside `pmap` every replica takes the whole batch.
        Without it the filter has to follow the scale of the losses as training goes on and can end with the wrong sign.
      schedule_primary: weigh the primary task's examples, too; False gives them all weight 1.
      jacobian: "held_fixed" differentiates the inner update as the paper does, the weights constants in it.
        "exact" also counts how the weights change with the params through losses and features: the field is then
        not a gradient, and the system is solved with its transpose. Inside `pmap` every replica then takes the whole
        batch, for the means of the standardisation must not be differentiated there.
      warm_start: start each linear solve from the last solution; costs the memory of one copy of the params.

    Returns:
      A `Method`. Inner update: one gradient. Outer update: one gradient of the dev loss, the solver's matrix-vector
      products, and one forward-mode pass of the per-example losses for all weights at once. The dev loss is the mean
      primary loss on the outer batch. The model must return `features`.

    Raises:
      ValueError: an unknown option; a model without features (when the state is made).
    """
    checks.one_of("jtds", ("sigmoid", "softplus"), activation=activation)
    checks.one_of("jtds", ("held_fixed", "exact"), jacobian=jacobian)
    checks.one_of("jtds", (True, False), feature_bias=feature_bias)
    checks.one_of("jtds", (True, False, "sample"), standardise=standardise)
    optimizer = default_optimizers.chosen("jtds", outer_optimizer, outer_updates, default_optimizers.of_logits)
    level = outer_level.make_outer_level("jtds", optimizer, hypergradient, warm_start)
    activate = {"sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus}[activation]

    def init(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        tasks = sorted(out.values) if schedule_primary else evaluation.auxiliary_tasks(out, context.model.primary)
        if not tasks:
            raise ValueError("jtds(schedule_primary=False) has nothing to schedule: the model has no auxiliary task.")
        schedule = {
            task: _init_schedule(
                jax.random.fold_in(key, index), evaluation.features_of("jtds", out, task), feature_bias
            )
            for index, task in enumerate(tasks)
        }
        problem = problem_of(context, state.model_state, key)
        return outer_level.init_outer(level, problem, state.params, schedule, batch, key)

    def weigh(reduce, part, losses, features, mask):
        """One task's weights, `[n]`."""
        losses, features = losses.astype(part.importance.dtype), features.astype(part.importance.dtype)
        if mask is not None:  # what is not labelled may be NaN, and 0 times NaN is NaN in the scheduler's gradient
            losses = jnp.where(mask, losses, jnp.zeros_like(losses))
            features = jnp.where(mask[:, None], features, jnp.zeros_like(features))
        if standardise == "sample":
            filtered = standardised_by_sample(losses, mask)
        else:
            filtered = standardised(losses, mask, reduce) if standardise else losses
        believed = jax.nn.sigmoid(part.slope * filtered + part.offset)
        fitting = features @ part.prototype
        return activate(part.importance) * activate(fitting + part.bias if feature_bias else fitting) * believed

    def schedule_weights(context, schedule, out):
        """`{task: [n_task]}`. Tasks of one shape and dtype are weighed together, as a matrix and not one by one."""
        weights = {} if schedule_primary else {context.model.primary: 1.0}
        for tasks in _alike(schedule, out):
            parts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(schedule[task] for task in tasks))
            losses = jnp.stack([out.values[task] for task in tasks])
            shared = not isinstance(out.features, Mapping)
            rows = out.features if shared else jnp.stack([evaluation.features_of("jtds", out, task) for task in tasks])
            found = [mask for task in tasks if (mask := evaluation.mask_of(out, task)) is not None]
            masks = jnp.stack(found) if found else None
            axes = (0, 0, None if shared else 0, None if masks is None else 0)
            weighed = jax.vmap(partial(weigh, context.reduce), in_axes=axes)(parts, losses, rows, masks)
            weights |= evaluation.by_task(tasks, weighed)
        return weights

    def weights_of(context, state, out):
        return schedule_weights(context, state.method.meta, out)

    def problem_of(context, model_state, key) -> BilevelProblem:
        """JTDS as a bilevel problem in the params and the schedule."""

        def evaluate(params, batch):
            return evaluation.evaluate(context.model, params, model_state, batch, key)

        def combine(schedule, out):
            weights = schedule_weights(context, schedule, jax.lax.stop_gradient(out))
            return weighted_loss(out.values, weights, masks=out.masks)

        def inner_loss(params, schedule, batch):
            return combine(schedule, evaluate(params, batch))

        def update_field(params, schedule, batch):
            weights = schedule_weights(context, schedule, evaluate(params, batch))

            def loss(variables):
                out = evaluate(variables, batch)
                return weighted_loss(out.values, weights, masks=out.masks)

            return jax.grad(loss)(params)

        curvature = of_outputs(context.model, model_state, key, combine)
        lower: dict[str, Any] = {"inner": inner_loss, "curvature": curvature}
        if jacobian == "exact":
            lower = {"update_field": update_field}
        outer_loss = outer_level.primary_loss(context, model_state, key)
        return BilevelProblem(**lower, outer=outer_loss, **outer_level.of_run(context))

    def outer(context, state, inner_batch, outer_batch, key):
        problem = problem_of(context, state.model_state, key)
        seen = absent_tasks.seen_tasks(context, state, inner_batch, key)
        seen = seen and {task: seen[task] for task in state.method.meta}
        point = (level, problem, state, inner_batch, outer_batch, key)
        state, metrics = outer_level.outer_step(*point, share=context.share, seen=seen)
        metrics |= {f"slope/{task}": part.slope for task, part in state.method.meta.items()}
        metrics |= {f"offset/{task}": part.offset for task, part in state.method.meta.items()}
        return state, metrics

    weights = evaluation.reported(weights_of, from_losses=True)
    whole_batch = standardise == "sample" or (jacobian == "exact" and bool(standardise))
    inner = descent.weighted_by(weights_of)
    how = {"whole_batch": whole_batch, "shared": outer_level.shared}
    return Method(init, inner, outer, weights, **how, all_params=True)


def _alike(schedule, out) -> list[list[str]]:
    """The tasks of a schedule, those of one shape and dtype together."""
    groups = {}
    for task in schedule:
        losses, features = out.values[task], evaluation.features_of("jtds", out, task)
        kind = (losses.shape, losses.dtype, features.shape, features.dtype, evaluation.mask_of(out, task) is None)
        groups.setdefault(kind, []).append(task)
    return list(groups.values())


def standardised(losses: jax.Array, mask: jax.Array | None, reduce: Callable = no_reduction) -> jax.Array:
    """Losses with mean 0 and variance 1 over the labelled examples; all 0 for one example or equal losses.

    Args:
      losses: `[n]`.
      mask: bool `[n]` or `None`; unlabelled examples get 0.
      reduce: mean over replicas that see a part of the batch each; not to be differentiated through.
    """
    labelled = jnp.ones(losses.shape, bool) if mask is None else mask
    safe = jnp.where(labelled, losses, jnp.zeros((), losses.dtype))
    centred = jnp.where(labelled, safe - reduce(masked_mean(safe, labelled)), jnp.zeros((), losses.dtype))
    # First to a size of 1, held fixed: memorised (near-zero) losses would be lost beside the 1e-12.
    peak = reduce(jax.lax.stop_gradient(jnp.max(jnp.abs(centred))))
    centred = centred / positive_or_one(peak)
    # Under the root: its derivative at 0 is finite, so equal losses do not make NaN in the exact Jacobian.
    return centred * jax.lax.rsqrt(reduce(masked_mean(centred**2, labelled)) + 1e-12)


def standardised_by_sample(losses: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Losses less their mean, over (sample deviation + 1e-6), over the labelled examples; 0 for one example.

    Args:
      losses: `[n]`.
      mask: bool `[n]` or `None`; unlabelled examples get 0.
    """
    labelled = jnp.ones(losses.shape, bool) if mask is None else mask
    safe = jnp.where(labelled, losses, jnp.zeros((), losses.dtype))
    centred = jnp.where(labelled, safe - masked_mean(safe, labelled), jnp.zeros((), losses.dtype))
    count = jnp.sum(labelled, dtype=losses.dtype)
    variance = jnp.sum(centred**2) / jnp.maximum(count - 1.0, 1.0)
    deviation = jnp.where(variance == 0, 0.0, jnp.sqrt(positive_or_one(variance)))
    return centred / (deviation + 1e-6)


def _init_schedule(key, features, feature_bias: bool) -> TaskSchedule:
    """The authors' initial values: alpha = 1, P ~ U(-0.05, 0.05), a ~ 0.05 U(0, 1), b = 0, q = 0."""
    dtype = accumulation_dtype(features)
    key_prototype, key_slope = jax.random.split(key)
    prototype = jax.random.uniform(key_prototype, (features.shape[1],), dtype, -0.05, 0.05)
    slope = 0.05 * jax.random.uniform(key_slope, (), dtype)
    zero = jnp.zeros((), dtype)
    return TaskSchedule(jnp.ones((), dtype), prototype, slope, zero, zero if feature_bias else ())
