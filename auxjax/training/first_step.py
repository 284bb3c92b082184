"""Mistakes that only a run shows, told around the compiled step: on the host, and at no cost once a step has been made.

    a state that was given away     a donated state that is used again
    a loss that is not finite       in the first step, with the leaves of the batches that are not
    a leaf that never moves         an optimiser with labels that freeze it, which the method takes for trained

Not for: watching a run. Losses are in the metrics of every step.
"""

import warnings
from collections.abc import Callable
from functools import wraps

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Literal

from auxjax._internal import checks


def told(
    step: Callable, one: Callable = lambda metrics: metrics, trained: Callable = lambda params: params
) -> Callable:
    """The step, which tells of a donated state and, the first time it is called, of losses that are not finite.

    Args:
      step: `(state, inner_batch, outer_batch=None) -> (state, metrics)`.
      one: metrics -> those of one replica.
      trained: params -> those that are trained.

    Raises (from the step):
      ValueError: a state whose memory an earlier step gave to its successor.
      FloatingPointError: the first step has a loss that is not finite, and what it trains is not finite after it; where
        it is (the optimiser has skipped the step, the solver refused the right-hand side), there is a warning.
    """
    looked = []

    @wraps(step)
    def call(state, inner_batch, outer_batch=None):
        try:
            new, metrics = step(state, inner_batch, outer_batch)
        except (RuntimeError, ValueError) as error:
            if "deleted" in str(error) and any(map(_is_deleted, jax.tree.leaves(state))):
                raise ValueError(
                    "step(state=): expected the newest state, got one whose memory an earlier step gave away. "
                    "Write state, metrics = step(state, ...), or keep old states with make_step(donate=False)."
                ) from error
            raise
        if not looked and not checks.is_traced(*jax.tree.leaves(metrics)):
            looked.append(True)
            learned = (trained(new.params), new.method)
            _check_losses(one(metrics), learned, {"inner_batch": inner_batch, "outer_batch": outer_batch})
        return new, metrics

    if hasattr(step, "lower"):
        call.lower = step.lower  # pyright: ignore[reportAttributeAccessIssue]
    return call


def warn_of_frozen(optimizer: optax.GradientTransformation, params, opt_state) -> None:
    """Warns where the update of some leaves, but not of all, does not depend on their gradients.

    Only optimisers with masks or labels (`optax.masked`, `optax.multi_transform`) are looked at. Nothing is computed:
    the update is traced, and an operation counts as depending on all of its inputs. Frozen leaves behind an operation
    that mixes leaves (a clip by the global norm after the labels, `optax.MultiSteps`) are therefore missed, and no
    trained one is ever named.
    """
    masked = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_masked) if _is_masked(node)]
    if not masked:
        return
    try:
        traced = jax.make_jaxpr(lambda *given: optimizer.update(*given)[0])(params, opt_state, params)
    except Exception:  # an optimiser that wants more than gradients, state and params: nothing is known of it
        return
    depends = set(traced.jaxpr.invars[: len(jax.tree.leaves(params))])
    for equation in traced.jaxpr.eqns:
        if any(not isinstance(variable, Literal) and variable in depends for variable in equation.invars):
            depends.update(equation.outvars)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]
    updates = zip(paths, traced.jaxpr.outvars, strict=True)
    frozen = [path for path, out in updates if isinstance(out, Literal) or out not in depends]
    if frozen and len(frozen) < len(paths):
        shown = ", ".join(frozen[:5]) + (f" and {len(frozen) - 5} more" if len(frozen) > 5 else "")
        warnings.warn(
            f"make_step(optimizer=): the update of the leaves {shown} does not depend on their gradients, and the "
            "method differentiates as if they were trained. Say what is: TaskModel(trainable=lambda path: ...).",
            stacklevel=3,
        )


def _check_losses(metrics, learned, batches) -> None:
    """Raises a FloatingPointError for a loss that is not finite; warns where what is learned has stayed finite."""
    losses = [name for name in metrics if name.startswith("loss/") or name == "outer_loss"]
    used = [name for name in losses if not _is_zero(metrics.get(name.replace("loss/", "weight/", 1)))]
    bad = [name for name in used if jnp.ndim(metrics[name]) == 0 and _not_finite(metrics[name])]
    if not bad:
        return
    holes = {
        f"{name}{jax.tree_util.keystr(path)}": count
        for name, batch in batches.items()
        for path, leaf in jax.tree.leaves_with_path(batch)
        if (count := _not_finite(leaf))
    }
    found = ", ".join(f"{count} in {name}" for name, count in holes.items()) or "none in the batches"
    message = (
        f"step: in the first step {', '.join(bad)} is not finite; numbers that are not finite: {found}. Where a label "
        "is missing, mask it (TaskLosses(masks=)) and put a valid one in its place; otherwise look for a logarithm or "
        "root of 0 in the loss, or lower the learning rates."
    )
    if any(map(_not_finite, jax.tree.leaves(learned))):
        raise FloatingPointError(message)
    warnings.warn(message, stacklevel=3)


def _not_finite(leaf) -> int:
    """How many entries are not finite; 0 for what is not floating or lies on devices of other processes."""
    if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
        return 0
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return 0
    return int(np.sum(~np.isfinite(np.asarray(leaf, np.float64))))


def _is_zero(weight) -> bool:
    return weight is not None and jnp.ndim(weight) == 0 and float(weight) == 0


def _is_masked(node) -> bool:
    return isinstance(node, optax.MaskedState)


def _is_deleted(leaf) -> bool:
    return isinstance(leaf, jax.Array) and not checks.is_traced(leaf) and leaf.is_deleted()
