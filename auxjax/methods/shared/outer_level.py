"""The outer level of methods that learn by a hypergradient: problem in, one update of the outer variables out.

    meta <- project(meta + outer_optimizer(share(d L_dev(theta*(meta)) / d meta)))

A method poses the `BilevelProblem`; what is the same for all of them is here: which estimator, what it carries from one
outer step to the next, the optimiser of the outer variables, and what is logged. `share` is the identity, or the mean
over the copies of a run in folds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import optimizers, roles, tree_math
from auxjax._internal.scalars import computed_once
from auxjax.formulas.losses import masked_mean
from auxjax.hypergrad import BilevelProblem, implicit
from auxjax.hypergrad.amortised import Amortised, warm_started
from auxjax.hypergrad.problem import Estimator
from auxjax.interface import Context, TrainState, no_reduction
from auxjax.methods.shared import absent_tasks, evaluation
from auxjax.solvers import cg, neumann

_WITH_HESSIAN = implicit(neumann(3))
_WITH_CURVATURE = implicit(cg(max_steps=10, damping=1e-2), curvature="problem")
_NOT_LOGGED = ("solution", "outer_loss", "aux")  # fields of HypergradInfo that are not logged


class OuterLevel(NamedTuple):
    """What stays fixed: the optimiser of the outer variables and the estimator of the hypergradient."""

    optimizer: optax.GradientTransformation
    estimator: Estimator | Amortised


class OuterState(NamedTuple):
    """State of an outer level.

    Attributes:
      meta: the outer variables, a pytree.
      opt_state: state of their optimiser.
      hypergradient: what the hypergradient's estimator carries along (a warm start, a step size, a preconditioner);
        `()` for one that carries nothing.
    """

    meta: Any
    opt_state: Any
    hypergradient: Any


def make_outer_level(
    method: str,
    optimizer: optax.GradientTransformation,
    hypergradient: Estimator | Amortised | None,
    warm_start: bool,
) -> OuterLevel:
    """Checks a method's options and fills in the default hypergradient.

    Args:
      method: the method's name, for messages.
      optimizer: of the outer variables, an optax transformation.
      hypergradient: an estimator, one with state, or `None` for `default_hypergradient`.
      warm_start: start each linear solve of an estimator without state from the last solution.

    Raises:
      TypeError: `hypergradient` is not an estimator.
      ValueError: `warm_start` with an estimator that has its own option for it.
    """
    estimator = default_hypergradient if hypergradient is None else hypergradient
    if not isinstance(estimator, Amortised):
        expected = "an estimator such as implicit(neumann(3)), or one with state such as single_loop()"
        roles.estimator(method, expected, hypergradient=estimator)
    if warm_start:
        if isinstance(estimator, Amortised):
            raise ValueError(
                f"{method}(warm_start=True): an estimator with state has its own option for that. Leave it out."
            )
        estimator = warm_started(estimator)
    return OuterLevel(optimizer, estimator)


def default_hypergradient(problem, params, meta, inner_batch, outer_batch, *, key=None, init=None):
    """The estimator of a method that was given none; docs/results/along_runs.md says why.

    Ten steps of conjugate gradients, damped by 0.01, with the problem's own curvature, which the methods with task
    weights know of a model that gives its outputs; four terms of a Neumann series with the Hessian otherwise.
    """
    chosen = _WITH_HESSIAN if problem.curvature is None else _WITH_CURVATURE
    return chosen(problem, params, meta, inner_batch, outer_batch, key=key, init=init)


def init_outer(level: OuterLevel, problem: BilevelProblem, params, meta, batch, key) -> OuterState:
    """The state before the first outer update.

    Args:
      level: from `make_outer_level`.
      problem: the method's bilevel problem.
      params: inner variables.
      meta: initial outer variables.
      batch: an inner batch; it stands for the outer one as well, which is not there yet.
      key: typed PRNG key.
    """
    carried = ()
    if isinstance(level.estimator, Amortised):
        # Made once and copied to all replicas, so outside of their averages.
        carried = level.estimator.init(dataclasses.replace(problem, reduce=None), params, meta, batch, batch, key=key)
    return OuterState(meta, level.optimizer.init(meta), carried)


def update_outer(
    level: OuterLevel,
    problem: BilevelProblem,
    params,
    state: OuterState,
    inner_batch,
    outer_batch,
    key,
    *,
    share: Callable = no_reduction,
    project: Callable = lambda meta: meta,
    seen=None,
) -> tuple[OuterState, dict]:
    """One hypergradient and one update of the outer variables.

    Args:
      level: from `make_outer_level`.
      problem: the method's bilevel problem.
      params: inner variables, held fixed.
      state: `OuterState`.
      inner_batch: batch of the inner loss.
      outer_batch: batch of the outer loss.
      key: typed PRNG key.
      share: `Context.share`, applied to the hypergradient.
      project: applied to the outer variables after the update, to keep them where they are allowed to be.
      seen: bools, a prefix of the outer variables, that broadcast to them: those of which the inner batch has nothing
        stay as they are, with their part of the optimiser's state; `None` updates all.

    Returns:
      `(state, metrics)`: `outer_loss`, `hypergradient/<field of HypergradInfo>`, and `skipped`, 1 where the
      hypergradient is not finite and the state stays as it is.
    """
    point = (problem, params, state.meta, inner_batch, outer_batch)
    carried = ()
    if isinstance(level.estimator, Amortised):
        gradient, info, carried = level.estimator.update(*point, state.hypergradient, key=key)
    else:
        gradient, info = level.estimator(*point, key=key)
    optimizer, value, whole = optimizers.with_extras(level.optimizer), share(info.outer_loss), share(gradient)
    updates, opt_state = optimizer.update(whole, state.opt_state, state.meta, value=value)
    meta = project(optax.apply_updates(state.meta, updates))
    if seen is not None:
        spread = lambda flag, part: jax.tree.map(lambda leaf: jnp.broadcast_to(flag, jnp.shape(leaf)), part)  # noqa: E731
        seen = jax.tree.map(spread, seen, state.meta)
        meta = absent_tasks.keep_unseen(seen, meta, state.meta)
        opt_state = absent_tasks.keep_unseen(seen, opt_state, state.opt_state)
    metrics = {
        "outer_loss": info.outer_loss,
        **{f"hypergradient/{name}": getattr(info, name) for name in info._fields if name not in _NOT_LOGGED},
    }
    # What is not finite would stay in the variables, in momentum and in the next start for ever.
    finite = computed_once(tree_math.all_finite(whole).astype(jnp.float32))[0] > 0
    metrics["skipped"] = (~finite).astype(jnp.float32)
    meta, opt_state = tree_math.select(finite, (meta, opt_state), (state.meta, state.opt_state))
    carried = tree_math.select(tree_math.all_finite(gradient), carried, state.hypergradient)
    return OuterState(meta, opt_state, carried), metrics


def look_ahead_optimizer(method: str, context: Context, state: TrainState, *, differentiated: bool = True):
    """The inner optimiser for a step ahead, and its state: what is inside of `optax.MultiSteps`, which itself waits.

    Args:
      method: the method's name, for messages.
      context: its optimiser.
      state: and that one's state.
      differentiated: whether the step is differentiated in the gradient, for optimisers that need nothing else.

    Raises:
      TypeError: an optimiser that needs more.
      ValueError: one that accumulates gradients further inside.
    """
    optimizer, opt_state = optimizers.without_accumulation(context.optimizer, state.opt_state)
    if optimizers.accumulates(opt_state):
        raise ValueError(
            f"{method}: make_step(optimizer=) adds up gradients over several updates and moves nothing in between, so "
            "that a step ahead tells nothing. Expected optax.MultiSteps around the whole optimiser, not inside of it."
        )
    if differentiated:
        where = f"{method} looks a step ahead: make_step(optimizer=)"
        optimizers.check_needs_gradients_alone(where, optimizer, opt_state, state.params)
    return optimizer, opt_state


def outer_step(level: OuterLevel, problem: BilevelProblem, state: TrainState, inner_batch, outer_batch, key, **options):
    """`update_outer` with its options, for a method whose state is the `OuterState`: `(training state, metrics)`."""
    point = (problem, state.params, state.method, inner_batch, outer_batch, key)
    new, metrics = update_outer(level, *point, **options)
    return state._replace(method=new), metrics


def shared(path: str) -> bool:
    """`Method.shared` of such a method: all of the `OuterState` but what the estimator carries, each copy's own."""
    return path.partition("/")[0] != "hypergradient"


def primary_loss(context: Context, model_state, key) -> Callable:
    """`(params, meta, batch) -> scalar`: the mean primary loss over the labelled examples, the usual outer loss."""
    model = context.model

    def loss(params, meta, batch):
        del meta
        out = evaluation.evaluate(model, params, model_state, batch, key)
        return masked_mean(out.values[model.primary], evaluation.mask_of(out, model.primary))

    return loss


def of_run(context: Context) -> dict[str, Any]:
    """What a `BilevelProblem` takes from the run.

    `reduce` is `None` without replicas, where every solver may be used.
    """
    return {
        "reduce": None if context.reduce is no_reduction else context.reduce,
        "products": context.model.products,
    }
