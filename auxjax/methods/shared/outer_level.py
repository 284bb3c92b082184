"""The outer level of methods that learn by a hypergradient: problem in, one update of the outer variables out.

    meta <- project(meta + outer_optimizer(share(d L_dev(theta*(meta)) / d meta)))

A method poses the `BilevelProblem`; what is the same for all of them is here: which estimator, what it carries from one
outer step to the next, the optimiser of the outer variables, and what is logged. `share` is the identity, or the mean
over the copies of a run in folds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from auxjax._internal import tree_math
from auxjax.formulas.losses import masked_mean
from auxjax.hypergrad import BilevelProblem, implicit
from auxjax.hypergrad.amortised import Amortised, warm_started
from auxjax.hypergrad.problem import Estimator
from auxjax.interface import Context, TrainState, no_reduction
from auxjax.methods.shared import evaluation
from auxjax.solvers import neumann

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
    outer_optimizer: optax.GradientTransformation | None,
    hypergradient: Estimator | Amortised | None,
    warm_start: bool,
    default_rate=1e-2,
) -> OuterLevel:
    """Checks a method's options and fills in the defaults: Adam, and four terms of a Neumann series.

    Args:
      method: the method's name, for messages.
      outer_optimizer: an optax transformation, or `None` for `optax.adam(default_rate)`.
      hypergradient: an estimator, one with state, or `None` for `implicit(neumann(3))`.
      warm_start: start each linear solve of an estimator without state from the last solution.
      default_rate: learning rate of the default optimiser.

    Raises:
      TypeError: `hypergradient` is not an estimator.
      ValueError: `warm_start` with an estimator that has its own option for it.
    """
    estimator = implicit(neumann(3)) if hypergradient is None else hypergradient
    if not (callable(estimator) or isinstance(estimator, Amortised)):
        raise TypeError(
            f"{method}(hypergradient=): expected an estimator such as implicit(neumann(3)), or one with state such as "
            f"single_loop(), got {type(estimator).__name__}."
        )
    if warm_start:
        if isinstance(estimator, Amortised):
            raise ValueError(
                f"{method}(warm_start=True): an estimator with state has its own option for that. Leave it out."
            )
        estimator = warm_started(estimator)
    optimizer = optax.adam(default_rate) if outer_optimizer is None else outer_optimizer
    return OuterLevel(optimizer, estimator)


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
    whole = share(gradient)
    updates, opt_state = level.optimizer.update(whole, state.opt_state, state.meta)
    meta = project(optax.apply_updates(state.meta, updates))
    metrics = {
        "outer_loss": info.outer_loss,
        **{f"hypergradient/{name}": getattr(info, name) for name in info._fields if name not in _NOT_LOGGED},
    }
    # What is not finite would stay in the variables, in momentum and in the next start for ever.
    finite = tree_math.all_finite(whole)
    metrics["skipped"] = (~finite).astype(jnp.float32)
    meta, opt_state = tree_math.select(finite, (meta, opt_state), (state.meta, state.opt_state))
    carried = tree_math.select(tree_math.all_finite(gradient), carried, state.hypergradient)
    return OuterState(meta, opt_state, carried), metrics


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


def reduction(context: Context) -> Callable | None:
    """`BilevelProblem.reduce` of a context: `None` without replicas, where every solver may be used."""
    return None if context.reduce is no_reduction else context.reduce
