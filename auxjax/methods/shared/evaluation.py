"""Calling the model, checking what it returns, and looking at its losses task by task."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from auxjax._internal.precision import accumulation_dtype
from auxjax.formulas.losses import masked_means
from auxjax.formulas.partition import checked_mask
from auxjax.interface import Context, Scalar, TaskLosses, TaskModel, TrainState, call, takes


def evaluate(model: TaskModel, params, model_state, batch, key) -> TaskLosses:
    """Calls the model's loss function and checks, at trace time, what came back.

    Args:
      model: a `TaskModel`.
      params: inner variables.
      model_state: the model's state, for a loss function that names `state`; `None` in a run without.
      batch: any pytree.
      key: typed PRNG key.

    Returns:
      The model's `TaskLosses`.

    Raises:
      TypeError: not a `TaskLosses`.
      ValueError: model state that the loss function does not take or does not return, no primary task, a loss that is
        not one number per example, masks that do not fit. (Features are checked by the methods that look at them.)
    """
    params, model_state, key = fresh((params, model_state, key))
    if model_state is not None and not takes(model.losses, "state"):
        raise ValueError(
            "The run has model state, and TaskModel.losses does not take it. Add an argument of the name `state`, as "
            "in losses(params, batch, key, *, state), and return the new one with TaskLosses(state=)."
        )
    out = call(model.losses, params, batch, key, state=model_state)
    _check_losses(out, model.primary)
    _check_state(out.state, model_state)
    return out if out.state is not None else out._replace(state=model_state)


def _check_state(new, old) -> None:
    if old is not None and jax.tree.leaves(old) and new is None:
        raise ValueError(
            "The run has model state, and TaskModel.losses returned TaskLosses without state=: the statistics would "
            "never move. Expected the new state, as in TaskLosses(values, state=new_state), or the one that came in "
            "where it is not to move."
        )
    if old is None and jax.tree.leaves(new):
        raise ValueError(
            "TaskModel.losses returned TaskLosses(state=), and the run has no model state. Give the first one to init: "
            "init(key, params, batch, model_state)."
        )


def fresh(tree):
    """The pytree for one more evaluation: all that a method makes of a batch have the same keys, and mean to.

    Containers are new, for what a model writes into one (Flax NNX does) stays within one evaluation.
    """

    def again(leaf):
        is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.clone(leaf) if is_key else leaf

    return jax.tree.map(again, tree)


def _check_losses(out, primary: str) -> None:
    if not isinstance(out, TaskLosses):
        raise TypeError(
            f"TaskModel.losses must return auxjax.TaskLosses and returned {type(out).__name__}. "
            "Wrap the per-example losses: TaskLosses({'task': losses_of_shape_n})."
        )
    if not isinstance(out.values, Mapping) or not out.values:
        raise ValueError("TaskLosses.values must be a dict {task: [n_task] losses} with at least one task.")
    if primary not in out.values:
        raise ValueError(
            f"TaskModel.primary is {primary!r}, and TaskLosses.values has the tasks {sorted(out.values)}. "
            "Name one of them, or return the primary task's losses under that name."
        )
    for task, value in out.values.items():
        shape = jnp.shape(value)
        if len(shape) != 1 or shape[0] == 0:
            raise ValueError(
                f"TaskLosses.values[{task!r}] has shape {shape}; expected [n], one loss per example, n >= 1. "
                "Return the losses before any mean over the batch."
            )
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise ValueError(f"TaskLosses.values[{task!r}] has dtype {jnp.result_type(value)}; losses are floating.")
    if out.label_losses is not None:
        shape, count = jnp.shape(out.label_losses), jnp.shape(out.values[primary])[0]
        if len(shape) != 2 or shape[0] != count or not jnp.issubdtype(out.label_losses.dtype, jnp.floating):
            raise ValueError(
                f"TaskLosses.label_losses is {out.label_losses.dtype}{list(shape)}; expected floats [{count}, "
                "classes]: for every example of the primary task the auxiliary head's loss for every class."
            )
    if out.masks is not None and not isinstance(out.masks, Mapping):
        raise TypeError(
            f"TaskLosses.masks is a {type(out.masks).__name__}; expected a dict {{task: bool [n_task]}}, or None where "
            "everything is labelled."
        )
    for task, mask in (out.masks or {}).items():
        if mask is None and task in out.values:
            continue
        if task not in out.values:
            raise ValueError(f"TaskLosses.masks has the task {task!r}; the losses have {sorted(out.values)}.")
        if jnp.shape(mask) != jnp.shape(out.values[task]) or jnp.result_type(mask) != jnp.bool_:
            raise ValueError(
                f"TaskLosses.masks[{task!r}] is {jnp.result_type(mask)}{list(jnp.shape(mask))}; expected "
                f"bool{list(jnp.shape(out.values[task]))}, True where the example has a label."
            )


def auxiliary_tasks(out: TaskLosses, primary: str) -> list[str]:
    """The auxiliary tasks in the order every method uses: sorted by name, the primary left out."""
    return sorted(task for task in out.values if task != primary)


def all_tasks(context: Context, out: TaskLosses) -> list[str]:
    """The primary task, then `auxiliary_tasks`."""
    return [context.model.primary, *auxiliary_tasks(out, context.model.primary)]


def check_names(what: str, names: Iterable[str], out: TaskLosses) -> None:
    """Raises a ValueError if one of the names is not a task."""
    unknown = sorted(set(names) - set(out.values))
    if unknown:
        raise ValueError(f"{what} names {unknown[0]!r}; the model has the tasks {sorted(out.values)}.")


def auxiliary_or_raise(method: str, context: Context, out: TaskLosses) -> list[str]:
    """`auxiliary_tasks`, for methods that are about nothing else.

    Raises:
      ValueError: there are none.
    """
    names = auxiliary_tasks(out, context.model.primary)
    if not names:
        raise ValueError(f"{method} weighs auxiliary tasks, and the model has none. Add one, or use method 'stl'.")
    return names


def labelled(context: Context, out: TaskLosses, tasks: Sequence[str]) -> jax.Array:
    """Bool `[len(tasks)]`: for which of the tasks the batch, of any replica, has a label."""
    share = masked_means({task: jnp.ones(out.values[task].shape, jnp.float32) for task in tasks}, out.masks)
    return context.reduce(share) > 0


def observed(context: Context, out: TaskLosses, tasks: Sequence[str]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a running statistic may take from a batch: a loss that is not finite would stay in it for ever.

    Returns:
      `(means, usable, skipped)`: `[len(tasks)]`, the mean losses over the labelled examples of all replicas, 0 where
      not finite; bool `[len(tasks)]`, where there is a label and the loss is finite; the number of labelled tasks that
      are left out for a loss that is not finite, a float.
    """
    means, seen = context.reduce(mean_losses(out, tasks)), labelled(context, out, tasks)
    finite = jnp.isfinite(means)
    return jnp.where(finite, means, jnp.zeros_like(means)), seen & finite, jnp.sum(seen & ~finite, dtype=jnp.float32)


def labelled_in_batch(context: Context, state: TrainState, batch, key) -> jax.Array:
    """`labelled` of a batch that is not evaluated yet, `[K + 1]` in the order of `loss_vector`."""
    out = evaluate(context.model, state.params, state.model_state, batch, key)
    return labelled(context, out, all_tasks(context, out))


def in_any_copy(context: Context, seen: jax.Array) -> jax.Array:
    """What is true in any of the copies of a run in folds; without folds `seen`, a bool array, itself."""
    return context.share(seen.astype(jnp.float32)) > 0


def mask_of(out: TaskLosses, task: str):
    """The task's label mask, or `None` where every example is labelled."""
    return (out.masks or {}).get(task)


def features_of(method: str, out: TaskLosses, task: str) -> jax.Array:
    """The trunk's features of a task, `[n_task, d]`, for methods that look at them.

    Raises:
      ValueError: there are none, or not a row for every example of the task.
    """
    features = out.features
    if isinstance(features, Mapping):
        features = features.get(task)
    if features is None:
        raise ValueError(
            f"{method} needs the trunk's features, and TaskLosses.features has none for task {task!r}. Return "
            "features=[n, d] (or {task: [n_task, d]}) with the losses."
        )
    wanted = out.values[task].shape[0]
    if len(features.shape) != 2 or features.shape[0] != wanted:
        raise ValueError(
            f"TaskLosses.features for task {task!r} has shape {tuple(features.shape)}; expected [{wanted}, d], one row "
            "per example of the task."
        )
    return features


def mean_losses(out: TaskLosses, tasks: Sequence[str]) -> jax.Array:
    """`[len(tasks)]`, the mean losses over the labelled examples of these tasks (0 where there are none)."""
    return masked_means({task: out.values[task] for task in tasks}, out.masks)


def by_task(tasks: Sequence[str], values: jax.Array) -> dict[str, jax.Array]:
    """`{task: values[k]}` of a `[len(tasks)]` array."""
    return dict(zip(tasks, jnp.unstack(values), strict=True))


def beside_primary(context: Context, out: TaskLosses, values: jax.Array) -> dict[str, Scalar]:
    """Weights of the auxiliary tasks, `[K]`, by name, and 1 for the primary task."""
    return {context.model.primary: 1.0, **by_task(auxiliary_tasks(out, context.model.primary), values)}


def constant_weights(weights: Mapping[str, Scalar], out: TaskLosses) -> dict[str, jax.Array]:
    """`{task: [n_task]}` from scalar weights, 0 for tasks without one: what `Method.weights` returns."""
    found = {}
    for task, value in out.values.items():
        weight = weights.get(task, 0.0)
        # Not in the losses' dtype: half precision has no room for a weight of 1.003, or of a million.
        found[task] = jnp.broadcast_to(jnp.asarray(weight).astype(accumulation_dtype(value, weight)), value.shape)
    return found


def reported(weights_of: Callable, *, from_losses: bool = False) -> Callable:
    """`Method.weights` from `weights_of(context, state, out) -> {task: scalar or [n_task]}`.

    `out` has the shapes of the losses alone; the losses themselves with `from_losses`, which costs a forward pass.
    """
    find = _losses_of if from_losses else loss_shapes

    def weights(context, state, batch, key):
        out = find(context, state, batch, key)
        return constant_weights(weights_of(context, state, out), out)

    return weights


def loss_vector(context: Context, state: TrainState, batch, key) -> Callable[[Any], jax.Array]:
    """`params -> [K + 1]`: the mean losses, the primary task first and then `auxiliary_tasks`, for `task_gradients`.

    The model state and the key are held fixed; the new model state is dropped.
    """

    def losses(params):
        out = evaluate(context.model, params, state.model_state, batch, key)
        return mean_losses(out, all_tasks(context, out))

    return losses


def trunk_of(context: Context, params):
    """`TaskModel.trunk` as a pytree of bools, or `None` for all leaves."""
    return checked_mask("TaskModel(trunk=), among the trained leaves,", params, context.model.trunk)


def loss_shapes(context: Context, state: TrainState, batch, key) -> TaskLosses:
    """Shapes and dtypes of the losses, without computing them; checks them on the way."""
    return jax.eval_shape(partial(_losses_of, context), state, batch, key)


def _losses_of(context, state, batch, key):
    return evaluate(context.model, state.params, state.model_state, batch, key)
