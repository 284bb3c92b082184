"""ARML: auxiliary task weights that bring the joint score close to the primary task's.

The auxiliary losses, weighted, act as a prior for the primary task; the best prior is the one whose score
(log-density gradient) agrees with the primary task's on samples of the joint posterior:

    min_{w in A}  E_{theta ~ p_joint} || grad L_0(theta) - sum_k w_k grad L_k(theta) ||^2,   A = {w >= 0, sum_k w_k = K}

Samples come from Langevin dynamics on the joint loss, theta <- theta - e grad L_joint + sqrt(2 e T) noise. Everything
is computed on training batches; ARML needs no held-out set. With one auxiliary task A is a single point, and the
weights are equal weights.

Reference: Shi, Zhang, Li, Zhao, Feng, 2020, Auxiliary Task Reweighting for Minimum-data Learning, equations A9 and A11.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax.formulas.langevin import langevin_step
from auxjax.formulas.score_matching import score_matching_value_and_gradient
from auxjax.formulas.simplex import shift_and_clamp
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import absent_tasks, default_optimizers, descent, evaluation

_FAST, _SLOW = 0.9, 0.98  # decays of the two running means whose distance tells whether the weights still move


class ArmlState(NamedTuple):
    """State of ARML.

    Attributes:
      weights: `[K]`, weights of the auxiliary tasks in order of their names; the primary task's weight is 1.
      opt_state: state of the optimiser of the weights.
      fast: `[K]`, running mean of the weights over about 10 updates.
      slow: `[K]`, running mean over about 50 updates; the weights kept when sampling ends.
      sampling: bool scalar, True while Langevin noise is on; always False in the merged form.
      updates: int32 scalar, updates of the weights done.
    """

    weights: jax.Array
    opt_state: Any
    fast: jax.Array
    slow: jax.Array
    sampling: jax.Array
    updates: jax.Array


@register("gradients", needs={"auxiliary"})
def arml(
    *,
    form: str = "merged",
    outer_optimizer: optax.GradientTransformation | None = None,
    outer_updates: int | None = None,
    total: float | None = None,
    projection: str = "simplex",
    step_size: float | None = None,
    temperature: float | None = None,
    tolerance: float = 0.01,
    min_updates: int = 100,
    max_updates: int = 1000,
    train_primary: bool = True,
    normalise: bool = False,
    chunk: int = 8,
) -> Method:
    """Auxiliary task reweighting by score matching.

    Two forms (the paper's algorithms 1 and 2). "two_stage": Langevin sampling with the weights learned on the samples
    until they have converged, then ordinary training from there with the weights fixed. "merged": no noise, params and
    weights learned together throughout. "merged" is the default because sampling needs two numbers only the caller
    knows: the step size, and the temperature, which for mean losses over n examples is 1/n.

    The weights are taken to have converged when two running means of them, over about 10 and 50 updates, differ by at
    most `tolerance * total / K` in every entry; the slower one is then kept, because single weights carry the sampling
    noise.

    Args:
      form: "merged" or "two_stage".
      outer_optimizer: optimiser of the weights; by default steps as long as scores agree with each other from one outer
        update to the next, at a rate made for `outer_updates` of them. The authors' code has `optax.sgd(0.05)`; plain
        gradient steps are stable below 1/lambda_max of the Gram matrix of the task gradients.
      outer_updates: how many outer updates are planned, 100 if nothing is said; the default optimiser's rate follows.
      total: sum of the weights; the number of auxiliary tasks K by default.
      projection: "simplex", the exact Euclidean projection, or "shift_and_clamp", the authors' code, whose result can
        sum to more than `total`.
      step_size: step of the Langevin dynamics (two-stage form only), at least 0.
      temperature: temperature of the Langevin dynamics (two-stage form only), at least 0.
      tolerance: see above; relative to the mean weight.
      min_updates: updates of the weights before convergence is looked at.
      max_updates: updates of the weights after which sampling ends in any case.
      train_primary: False trains the params on the auxiliary losses alone, the primary labels driving the weights
        only (the paper's domain generalisation, "Baseline + ARML").
      normalise: compare directions alone, `|| g_0 / ||g_0|| - sum_k w_k g_k / ||g_k|| ||^2`; the weights multiply the
        losses as they are. The published divergence (False) gives the weight that the sum asks for to tasks with short
        gradients, whether they are solved or their labels are noise: both change the score little.
      chunk: gradients that are in memory at a time with `normalise`.

    Returns:
      A `Method`. Its outer update costs one joint gradient and one forward-mode pass, whatever K is (with `normalise`
      1 + K reverse passes more); gradients are compared on `TaskModel.trunk` only. It uses the inner batch and ignores
      the outer one. A task without a label in the batch keeps its weight, and the others share what it leaves of the
      total. A batch whose gradient in the weights is not finite changes nothing (`skipped` is then 1).

    Raises:
      TypeError, ValueError: an impossible option; no auxiliary task (when the state is made).
    """
    checks.one_of("arml", ("merged", "two_stage"), form=form)
    checks.one_of("arml", ("simplex", "shift_and_clamp"), projection=projection)
    if total is not None:
        checks.number("arml", above=0, total=total)
    noise = _noise(form, step_size, temperature)
    checks.number("arml", above=0, tolerance=tolerance)
    checks.count("arml", 1, min_updates=min_updates, max_updates=max_updates, chunk=chunk)
    if min_updates > max_updates:
        raise ValueError(
            f"arml(min_updates={min_updates}, max_updates={max_updates}): expected min_updates <= max_updates."
        )
    optimizer = default_optimizers.chosen("arml", outer_optimizer, outer_updates, default_optimizers.of_shares)
    project = {"simplex": absent_tasks.project_seen, "shift_and_clamp": _shift_and_clamp}[projection]

    def total_of(count: int):
        return float(count) if total is None else total

    def init(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        count = len(evaluation.auxiliary_or_raise("arml", context, out))
        dtype = accumulation_dtype(out.values[context.model.primary])
        weights = jnp.full((count,), total_of(count) / count, dtype)
        start = optimizer.init(weights)
        return ArmlState(weights, start, weights, weights, jnp.array(form == "two_stage"), jnp.zeros((), jnp.int32))

    def weights_of(context, state, out):
        weights = evaluation.beside_primary(context, out, state.method.weights)
        if not train_primary:
            del weights[context.model.primary]
        return weights

    def inner(context, state, batch, key):
        key_loss, key_noise = jax.random.split(key)
        grads, out, weights = descent.weighted_gradient(
            context, state, batch, key_loss, lambda out: weights_of(context, state, out)
        )
        trained = descent.descend_weighted(context, state, grads, out, weights, batch, key_loss)
        if noise:
            # The same gradient serves both stages, so choosing between two updates costs nothing. The optimiser's state
            # stays as it was while sampling: the second stage starts it afresh.
            sampled = langevin_step(state.params, context.reduce(grads), key=key_noise, **noise)
            params, opt_state = _choose(
                state.method.sampling, (sampled, state.opt_state), (trained.params, trained.opt_state)
            )
            trained = trained._replace(params=params, opt_state=opt_state)
        return trained, descent.loss_metrics(out, weights)

    def outer(context, state, inner_batch, outer_batch, key):
        del outer_batch  # ARML has no held-out set
        previous = state.method
        losses = evaluation.loss_vector(context, state, inner_batch, key)
        trunk = evaluation.trunk_of(context, state.params)
        divergence, gradient, *_ = score_matching_value_and_gradient(
            losses,
            state.params,
            previous.weights,
            trunk=trunk,
            reduce=context.reduce,
            products=context.model.products,
            normalise=normalise,
            chunk=chunk,
        )
        # A batch without a primary label has no primary gradient to match: the weights would make the others cancel
        # out.
        labelled = evaluation.labelled_in_batch(context, state, inner_batch, key)
        seen = labelled[0] & jnp.all(jnp.isfinite(gradient))
        others = evaluation.in_any_copy(context, labelled[1:])
        gradient = context.share(jnp.where(seen, gradient, jnp.zeros_like(gradient)))
        updates, opt_state = optimizer.update(gradient, previous.opt_state, previous.weights)
        moved = descent.apply_updates(previous.weights, updates)
        weights = project(moved, previous.weights, others, total_of(moved.shape[0]))
        new = previous._replace(
            weights=weights,  # those of absent tasks are what they were, and so are their means where they have settled
            opt_state=absent_tasks.keep_unseen(others, opt_state, previous.opt_state),
            fast=_FAST * previous.fast + (1 - _FAST) * weights,
            slow=_SLOW * previous.slow + (1 - _SLOW) * weights,
            updates=previous.updates + jnp.int32(1),
        )
        if form == "two_stage":
            # Once sampling has ended nothing moves any more.
            new = _choose(previous.sampling, end_sampling(new), previous)
        new = _choose(evaluation.in_any_copy(context, seen), new, previous)
        skipped = (labelled[0] & ~seen).astype(jnp.float32)
        metrics = {"score_divergence": divergence, "sampling": new.sampling.astype(jnp.float32), "skipped": skipped}
        return state._replace(method=new), metrics

    def end_sampling(new):
        """The state with its weights fixed, if they have converged; as it is otherwise."""
        scale = total_of(new.weights.shape[0]) / new.weights.shape[0]
        has_converged = jnp.max(jnp.abs(new.fast - new.slow)) <= tolerance * scale
        done = ((new.updates >= min_updates) & has_converged) | (new.updates >= max_updates)
        return _choose(done, new._replace(weights=new.slow.copy(), sampling=jnp.array(False)), new)

    return Method(init, inner, outer, evaluation.reported(weights_of), shared=lambda path: True, outer_data=False)


def _noise(form, step_size, temperature) -> dict[str, Any]:
    """The numbers of the Langevin dynamics, none for the merged form."""
    given: dict[str, Any] = {"step_size": step_size, "temperature": temperature}
    given = {name: value for name, value in given.items() if value is not None}
    if form == "two_stage" and len(given) < 2:
        raise ValueError(
            f"arml(form='two_stage', step_size={step_size}, temperature={temperature}): Langevin sampling needs both, "
            "each >= 0. For mean losses over n examples, temperature=1/n samples the posterior."
        )
    if form == "merged" and given:
        raise ValueError("arml(form='merged') adds no noise: leave out step_size and temperature, or use 'two_stage'.")
    checks.number("arml", least=0, **given)
    return given


def _shift_and_clamp(weights, kept, seen, total):
    """`shift_and_clamp` of all weights, as the authors' code has it; of tasks without a label the old ones."""
    return jnp.where(seen, shift_and_clamp(weights, total), kept)


def _choose(flag, a, b):
    return jax.tree.map(lambda x, y: jnp.where(flag, x, y), a, b)
