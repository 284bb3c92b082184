"""MAOAL: how much of each auxiliary task each module of the trunk learns from, by implicit differentiation.

    trunk, module m    d_m = g_0,m + s c sum_k v(Lambda_mk) g_k,m        s = 1 or 1/K
    heads              d_h = g_0,h + s c sum_k g_k,h
    outer              min_Lambda  L_dev(theta*(Lambda)),   d(theta*, Lambda) = 0

Early layers may take from a task what late ones must not. The field d is the gradient of no loss, so that the linear
system of the hypergradient is J^T u = grad L_dev, with the transpose. With one module it is a weight per task.

Reference: Chen, Wang, Liu, Zhu, 2022, Module-Aware Optimization for Auxiliary Learning, NeurIPS.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax.hypergrad import BilevelProblem
from auxjax.interface import Method, no_reduction
from auxjax.methods._registry import register
from auxjax.methods.shared import descent, evaluation, outer_level
from auxjax.methods.shared.module_weights import mixed_field, modules_of

_CONSTRAINTS = ("relu", "softplus", "projection")


@register("hypergradient", needs={"auxiliary", "outer_batch"})
def maoal(
    *,
    module_of: Callable[[str], str] | None = None,
    outer_optimizer: optax.GradientTransformation | None = None,
    hypergradient=None,
    constraint: str = "relu",
    auxiliary_weight: float = 1.0,
    reduction: str = "mean",
    warm_start: bool = False,
) -> Method:
    """An importance for every auxiliary task and module.

    Args:
      module_of: function of a leaf's path to its module's name, see `auxjax.formulas.partition.modules_by_path`; by
        default the path's first part, the layers of a Flax module. `lambda path: path` makes every leaf a module.
      outer_optimizer: optimiser of the importance; `optax.adam(1e-2)` by default.
      hypergradient: an estimator such as `implicit(neumann(3))`, the default: the paper's four terms with a step size
        fitted to the curvature, or one with state. (The authors' step of 1 diverges where the largest curvature is
        above 2, and they leave its factor out.) The solver must not need a symmetric matrix: `gmres`, `bicgstab`,
        `normal_cg` or `neumann`, not `cg` or `minres`.
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
      ValueError: an impossible option; no auxiliary task (when the state is made).
    """
    if constraint not in _CONSTRAINTS:
        raise ValueError(f"maoal(constraint={constraint!r}): expected one of {', '.join(_CONSTRAINTS)}.")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"maoal(reduction={reduction!r}): expected 'sum' or 'mean'.")
    if not checks.is_traced(auxiliary_weight) and not 0 <= auxiliary_weight < float("inf"):
        raise ValueError(f"maoal(auxiliary_weight={auxiliary_weight}): expected a finite number >= 0.")
    options = _Options(
        module_of=module_of or (lambda path: path.split("/")[0]),
        level=outer_level.make_outer_level("maoal", outer_optimizer, hypergradient, warm_start),
        constraint=constraint,
        auxiliary_weight=auxiliary_weight,
        mean=reduction == "mean",
    )

    def weights(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        return descent.constant_weights(_mean_weights(options, context, state.method.meta, out), out)

    return Method(partial(_init, options), partial(_inner, options), partial(_outer, options), weights)


class _Options(NamedTuple):
    module_of: Callable[[str], str]
    level: outer_level.OuterLevel
    constraint: str
    auxiliary_weight: float
    mean: bool

    def importance(self, raw):
        """v(Lambda), at least 0."""
        return {"relu": jax.nn.relu, "softplus": jax.nn.softplus, "projection": lambda x: x}[self.constraint](raw)

    def scale(self, num_tasks: int) -> float:
        """s c."""
        return self.auxiliary_weight / num_tasks if self.mean else self.auxiliary_weight


def _init(options, context, state, batch, key):
    out = evaluation.loss_shapes(context, state, batch, key)
    names = evaluation.auxiliary_or_raise("maoal", context, out)
    modules = modules_of(context, state.params, options.module_of)
    dtype = accumulation_dtype(out.values)
    start = jnp.log(jnp.expm1(jnp.ones((), dtype))) if options.constraint == "softplus" else jnp.ones((), dtype)
    raw = jnp.full((len(modules.names), len(names)), start, dtype)
    problem = _problem(options, context, state, key)
    return outer_level.init_outer(options.level, problem, state.params, raw, batch, key)


def _mean_weights(options, context, raw, out):
    names = evaluation.auxiliary_tasks(out, context.model.primary)
    means = options.scale(len(names)) * jnp.mean(options.importance(raw), axis=0)
    return {context.model.primary: 1.0, **dict(zip(names, means, strict=True))}


def _field(options, context, state, raw, batch, key):
    """`(field, losses)` at `state.params`."""
    modules = modules_of(context, state.params, options.module_of)
    scale = options.scale(raw.shape[1])

    def weights_of(tasks):
        importance = scale * options.importance(raw).astype(tasks.losses.dtype)
        return jnp.concatenate([jnp.ones((len(importance), 1), importance.dtype), importance], axis=1)

    return mixed_field("maoal", context, state, batch, key, modules, scale, weights_of)[:2]


def _problem(options, context, state, key) -> BilevelProblem:
    local = context._replace(reduce=no_reduction)  # the problem averages what it computes by itself

    def update_field(params, raw, batch):
        return _field(options, local, state._replace(params=params), raw, batch, key)[0]

    outer = outer_level.primary_loss(context, state.model_state, key)
    return BilevelProblem(update_field=update_field, outer=outer, reduce=outer_level.reduction(context))


def _inner(options, context, state, batch, key):
    raw = state.method.meta
    field, out = _field(options, context, state, raw, batch, key)
    metrics = descent.loss_metrics(out, _mean_weights(options, context, raw, out))
    return descent.descend(context, state, field, out.state), metrics


def _outer(options, context, state, inner_batch, outer_batch, key):
    problem = _problem(options, context, state, key)
    point = (problem, state.params, state.method, inner_batch, outer_batch, key)
    project = (lambda raw: jnp.maximum(raw, 0.0)) if options.constraint == "projection" else (lambda raw: raw)
    new, metrics = outer_level.update_outer(options.level, *point, project=project)
    modules = modules_of(context, state.params, options.module_of)
    names = evaluation.auxiliary_tasks(evaluation.loss_shapes(context, state, inner_batch, key), context.model.primary)
    importance = options.importance(new.meta)
    metrics |= {
        f"importance/{module}/{name}": importance[m, k]
        for m, module in enumerate(modules.names)
        for k, name in enumerate(names)
    }
    if options.constraint == "relu":
        metrics["dead"] = jnp.mean((new.meta <= 0).astype(new.meta.dtype))
    return state._replace(method=new), metrics
