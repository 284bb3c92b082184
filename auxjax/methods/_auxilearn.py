"""AuxiLearn: a learned function of the losses is the inner loss.

    inner   min_theta  g_phi(L_0, ..., L_K)
    outer   min_phi    L_dev(theta*(phi))

    linear           sum_k phi_k L_k                                    phi >= 0, 1 at the start
    monotone         L_0 + mean_i MLP(l_i0, ..., l_iK)                  non-negative weights, softplus between
    deep_linear      L_0 + mean_i W_n ... W_1 l_i                       non-negative weights
    convolutional    L_0 + mean_i CNN(maps of losses of example i)      for losses per pixel, `TaskLosses.maps`

The non-linear forms can make the weight of one task depend on another task's loss at the same example. Generated tasks,
the paper's other use of the same hypergradient, are not here.

Reference: Navon, Achituve, Maron, Chechik, Fetaya, 2021, Auxiliary Learning by Implicit Differentiation, ICLR.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax.formulas.loss_combiners import CONSTRAINTS, Combiner, convolutional_combiner, dense_combiner
from auxjax.formulas.losses import masked_mean, weighted_loss
from auxjax.hypergrad import Amortised, BilevelProblem, Estimator
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import absent_tasks, default_optimizers, descent, evaluation, outer_level
from auxjax.methods.shared.positive_curvature import of_outputs


@register("hypergradient", needs={"auxiliary", "outer_batch"})
def auxilearn(
    *,
    form: str = "linear",
    hidden: Sequence[int] = (3,),
    channels: Sequence[int] = (8, 16, 32),
    upper: float | None = None,
    constraint: str = "clamp",
    outer_optimizer: optax.GradientTransformation | None = None,
    outer_updates: int | None = None,
    hypergradient: Estimator | Amortised | None = None,
    warm_start: bool = False,
) -> Method:
    """A learned combination of losses.

    Args:
      form: see above.
      hidden: sizes of the hidden layers of "monotone" and "deep_linear".
      channels: of the convolutions of "convolutional".
      upper: weights of the three deep forms start uniformly between 0 and this: 1, and 0.1 for "convolutional", as in
        the authors' code, when it is `None`.
      constraint: "clamp" sets negative weights to 0 after every outer update, as the authors' code does; "softplus"
        parametrises them, so that none can get stuck at 0.
      outer_optimizer: optimiser of phi; by default AdaGrad, at a rate at which in `outer_updates` updates that agree a
        weight of the linear form grows tenfold or falls to 0, and a deep form's moves by 1.
      outer_updates: how many outer updates are planned, 100 if nothing is said; the default optimiser's rate follows.
      hypergradient: an estimator such as `implicit(neumann(3))`, the default: the paper's four terms, with a fitted
        step size and its factor, which the authors' code leaves out; or an estimator with state. For the linear form of
        a model that gives its outputs, the default is that of `jtds`.
      warm_start: start each linear solve from the last solution.

    Returns:
      A `Method`. Inner update: one gradient. Outer update: as `jtds`. All forms but "linear" need every task to have
      its loss for every example of the batch; a missing label counts as a loss of 0. The weight it reports for example
      i and task k is `n_k d g / d l_ik`.

    Raises:
      TypeError, ValueError: an impossible option; losses that do not fit the form (when the state is made).
    """
    checks.one_of("auxilearn", ("linear", "monotone", "deep_linear", "convolutional"), form=form)
    checks.one_of("auxilearn", CONSTRAINTS, constraint=constraint)
    checks.sizes("auxilearn", hidden=hidden, channels=channels)
    if not (channels if form == "convolutional" else hidden):
        raise ValueError(f"auxilearn(hidden={hidden}, channels={channels}): expected one or more whole numbers >= 1.")
    if upper is not None:
        checks.number("auxilearn", above=0, upper=upper)
    default = default_optimizers.of_network if form != "linear" else default_optimizers.of_weights
    default = default_optimizers.of_logits if constraint == "softplus" else default
    optimizer = default_optimizers.chosen("auxilearn", outer_optimizer, outer_updates, default)
    level = outer_level.make_outer_level("auxilearn", optimizer, hypergradient, warm_start)
    combiner = _combiner(form, hidden, channels, upper, constraint)  # None for the linear form
    spatial = combiner is not None and combiner.spatial
    if combiner is not None:
        project = combiner.project
    elif constraint == "clamp":
        project = partial(jax.tree.map, lambda weight: jnp.maximum(weight, 0.0))
    else:
        project = _same

    def init(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        evaluation.auxiliary_or_raise("auxilearn", context, out)
        dtype = accumulation_dtype(out.values)
        names = evaluation.all_tasks(context, out)
        if combiner is None:
            start = jnp.log(jnp.expm1(jnp.ones((), dtype))) if constraint == "softplus" else jnp.ones((), dtype)
            meta = {name: jnp.full((), start, dtype) for name in names}
        else:
            _check_losses(combiner, out, names)
            meta = combiner.init(key, len(names), dtype)
        problem = problem_of(context, state.model_state, key)
        return outer_level.init_outer(level, problem, state.params, meta, batch, key)

    def combined(context, meta, out):
        """g(losses), a scalar."""
        if combiner is None:
            positive = jax.nn.softplus if constraint == "softplus" else _same
            weights = {name: positive(weight) for name, weight in meta.items()}
            return weighted_loss(out.values, weights, masks=out.masks)
        source = out.maps if spatial else out.values
        dtype = accumulation_dtype(source)
        columns = []
        for name in evaluation.all_tasks(context, out):
            column, mask = source[name].astype(dtype), evaluation.mask_of(out, name)
            if mask is not None:
                column = jnp.where(mask.reshape(-1, *[1] * (column.ndim - 1)), column, jnp.zeros_like(column))
            columns.append(column)
        primary = masked_mean(out.values[context.model.primary], evaluation.mask_of(out, context.model.primary))
        return primary + jnp.mean(combiner.apply(meta, jnp.stack(columns, axis=-1)))

    def weights_of(context, state, out):
        """The derivative of the combination in every example's loss, times the labelled examples."""

        def value(losses):
            return combined(context, state.method.meta, out._replace(values=losses[0], maps=losses[1]))

        by_value, by_map = jax.grad(value)(jax.lax.stop_gradient((out.values, out.maps)))
        weights = {}
        for task, slope in by_value.items():
            if spatial:
                slope = slope + jnp.sum(by_map[task], axis=(1, 2)).astype(slope.dtype)
            mask = evaluation.mask_of(out, task)
            labelled = slope.shape[0] if mask is None else jnp.maximum(jnp.sum(mask, dtype=slope.dtype), 1.0)
            weights[task] = slope * labelled
        return weights

    def problem_of(context, model_state, key) -> BilevelProblem:
        combine = partial(combined, context)

        def inner(params, meta, batch):
            return combine(meta, evaluation.evaluate(context.model, params, model_state, batch, key))

        outer = outer_level.primary_loss(context, model_state, key)
        curvature = of_outputs(context.model, model_state, key, combine) if combiner is None else None
        return BilevelProblem(inner=inner, outer=outer, curvature=curvature, **outer_level.of_run(context))

    def inner(context, state, batch, key):
        def loss(params):
            out = evaluation.evaluate(context.model, params, state.model_state, batch, key)
            return combined(context, state.method.meta, out), out

        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        metrics = descent.loss_metrics(out, weights_of(context, state, out))
        options = {"value": value, "loss": lambda params: loss(params)[0]}
        return descent.descend(context, state, grads, out.state, **options), metrics

    def outer(context, state, inner_batch, outer_batch, key):
        problem = problem_of(context, state.model_state, key)
        seen = absent_tasks.seen_tasks(context, state, inner_batch, key) if combiner is None else None
        options = {"share": context.share, "project": project, "seen": seen}
        return outer_level.outer_step(level, problem, state, inner_batch, outer_batch, key, **options)

    weights = evaluation.reported(weights_of, from_losses=True)
    return Method(init, inner, outer, weights, shared=outer_level.shared, all_params=True)


def _combiner(form, hidden, channels, upper, constraint) -> Combiner | None:
    if form == "linear":
        return None
    if form == "convolutional":
        return convolutional_combiner(channels, upper=0.1 if upper is None else upper, constraint=constraint)
    shape = (
        {"activation": jax.nn.softplus, "bias": True} if form == "monotone" else {"activation": _same, "bias": False}
    )
    return dense_combiner(hidden, upper=1.0 if upper is None else upper, constraint=constraint, **shape)


def _same(values):
    return values


def _check_losses(combiner, out, names) -> None:
    sizes = {name: out.values[name].shape[0] for name in names}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"auxilearn combines the losses of one example, and the tasks have {sizes} examples. Use form='linear', or "
            "compute every task's loss for every example and mask the missing ones."
        )
    if not combiner.spatial:
        return
    shapes = {name: getattr((out.maps or {}).get(name), "shape", ()) for name in names}
    if len(set(shapes.values())) > 1 or any(len(shape) != 3 for shape in shapes.values()):
        raise ValueError(
            f"auxilearn(form='convolutional'): expected TaskLosses.maps, one [n, height, width] per task, got {shapes}."
        )
