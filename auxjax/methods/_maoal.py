"""MAOAL: how much of each auxiliary task each module of the trunk learns from, by implicit differentiation.

    trunk, module m    d_m = g_0,m + s c sum_k v(Lambda_mk) g_k,m        s = 1 or 1/K
    heads              d_h = g_0,h + s c sum_k g_k,h
    outer              min_Lambda  L_dev(theta*(Lambda)),   d(theta*, Lambda) = 0

Early layers may take from a task what late ones must not. The field d is the gradient of no loss, so that the linear
system of the hypergradient is J^T u = grad L_dev, with the transpose. With one module it is a weight per task.

Reference: Chen, Wang, Liu, Zhu, 2022, Module-Aware Optimization for Auxiliary Learning, NeurIPS.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax.hypergrad import Amortised, BilevelProblem, Estimator
from auxjax.interface import Method, no_reduction
from auxjax.methods._registry import register
from auxjax.methods.shared import absent_tasks, default_optimizers, descent, evaluation, outer_level
from auxjax.methods.shared.module_weights import mixed_field, modules_of


@register("hypergradient", needs={"auxiliary", "outer_batch"})
def maoal(
    *,
    module_of: Callable[[str], str] | None = None,
    outer_optimizer: optax.GradientTransformation | None = None,
    outer_updates: int | None = None,
    hypergradient: Estimator | Amortised | None = None,
    constraint: str = "relu",
    auxiliary_weight: float = 1.0,
    reduction: str = "mean",
    warm_start: bool = False,
) -> Method:
    """An importance for every auxiliary task and module.

    Args:
      module_of: function of a leaf's path to its module's name, see `auxjax.formulas.partition.modules_by_path`; by
        default the path's first part, the layers of a Flax module. `lambda path: path` makes every leaf a module.
      outer_optimizer: optimiser of the importance; by default AdaGrad with steps in proportion to the entry, at a rate
        at which it grows tenfold, or falls to 0, in `outer_updates` updates that agree.
      outer_updates: how many outer updates are planned, 100 if nothing is said; the default optimiser's rate follows.
      hypergradient: an estimator such as `implicit(neumann(3))`, the default: the paper's four terms with a step size
        fitted to the curvature, or one with state. (The authors' step of 1 diverges where the largest curvature is
        above 2, and they leave its factor out.) Its solver is `gmres`, `bicgstab`, `normal_cg`, `dense` or `neumann`:
        `cg`, `minres` and `nystrom` refuse the system of an update field.
      constraint: v, which keeps importance at or above 0. "relu" is the published form: an entry that reaches 0 gets no
        gradient any more and stays there. "softplus" cannot die; "projection" has v the identity and clips at 0 after
        every outer update, and an entry comes back when its gradient says so.
      auxiliary_weight: c, the weight of the auxiliary losses; at least 0.
      reduction: s: "mean" over the auxiliary tasks or "sum"; the authors' code has both.
      warm_start: start each linear solve from the last solution.

    Returns:
      A `Method`, whose outer variables are Lambda, `[M, K]` in order of the modules and of the tasks' names, v(Lambda)
      = 1 at the start. Inner update: a joint gradient and M reverse passes (1 + K if that is less). Outer update: the
      solver's products, each a reverse pass through the field. `weight/<task>` is `s c v(Lambda)` averaged over
      modules; `importance/<module>/<task>` is v(Lambda), `dead` the share of entries that the relu has stopped.

    Raises:
      TypeError, ValueError: an impossible option; no auxiliary task (when the state is made).
    """
    checks.one_of("maoal", ("relu", "softplus", "projection"), constraint=constraint)
    checks.one_of("maoal", ("mean", "sum"), reduction=reduction)
    checks.number("maoal", least=0, auxiliary_weight=auxiliary_weight)
    default = default_optimizers.of_logits if constraint == "softplus" else default_optimizers.of_weights
    optimizer = default_optimizers.chosen("maoal", outer_optimizer, outer_updates, default)
    level = outer_level.make_outer_level("maoal", optimizer, hypergradient, warm_start)
    importance = {"relu": jax.nn.relu, "softplus": jax.nn.softplus, "projection": lambda raw: raw}[constraint]

    def modules_in(context, params):
        return modules_of(context, params, module_of or (lambda path: path.split("/")[0]))

    def scale_of(raw):
        """s c."""
        return auxiliary_weight / raw.shape[1] if reduction == "mean" else auxiliary_weight

    def init(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        names = evaluation.auxiliary_or_raise("maoal", context, out)
        modules = modules_in(context, state.params)
        dtype = accumulation_dtype(out.values)
        start = jnp.log(jnp.expm1(jnp.ones((), dtype))) if constraint == "softplus" else jnp.ones((), dtype)
        raw = jnp.full((len(modules.names), len(names)), start, dtype)
        problem = problem_of(context, state, key)
        return outer_level.init_outer(level, problem, state.params, raw, batch, key)

    def weights_of(context, state, out):
        """The weights, averaged over modules."""
        raw = state.method.meta
        return evaluation.beside_primary(context, out, scale_of(raw) * jnp.mean(importance(raw), axis=0))

    def field_of(context, state, raw, batch, key):
        """`(field, losses)` at `state.params`."""

        def mixture(tasks):
            weights = scale_of(raw) * importance(raw).astype(tasks.losses.dtype)
            return jnp.concatenate([jnp.ones((len(weights), 1), weights.dtype), weights], axis=1)

        modules = modules_in(context, state.params)
        return mixed_field("maoal", context, state, batch, key, modules, scale_of(raw), mixture)[:2]

    def problem_of(context, state, key) -> BilevelProblem:
        local = context._replace(reduce=no_reduction)  # the problem averages what it computes by itself

        def update_field(params, raw, batch):
            return field_of(local, state._replace(params=params), raw, batch, key)[0]

        outer = outer_level.primary_loss(context, state.model_state, key)
        return BilevelProblem(update_field=update_field, outer=outer, **outer_level.of_run(context))

    def inner(context, state, batch, key):
        field, out = field_of(context, state, state.method.meta, batch, key)
        weights = weights_of(context, state, out)
        new = descent.descend_weighted(context, state, field, out, weights, batch, key)
        return new, descent.loss_metrics(out, weights)

    def outer(context, state, inner_batch, outer_batch, key):
        problem = problem_of(context, state, key)
        project = (lambda raw: jnp.maximum(raw, 0.0)) if constraint == "projection" else (lambda raw: raw)
        seen = absent_tasks.seen_tasks(context, state, inner_batch, key)
        out = evaluation.loss_shapes(context, state, inner_batch, key)
        names = evaluation.auxiliary_tasks(out, context.model.primary)
        seen = seen and jnp.stack([seen[name] for name in names])[None, :]
        options = {"share": context.share, "project": project, "seen": seen}
        state, metrics = outer_level.outer_step(level, problem, state, inner_batch, outer_batch, key, **options)
        raw = state.method.meta
        metrics |= {
            f"importance/{module}/{name}": importance(raw)[m, k]
            for m, module in enumerate(modules_in(context, state.params).names)
            for k, name in enumerate(names)
        }
        if constraint == "relu":
            metrics["dead"] = jnp.mean((raw <= 0).astype(raw.dtype))
        return state, metrics

    return Method(init, inner, outer, evaluation.reported(weights_of), shared=outer_level.shared, all_params=True)
