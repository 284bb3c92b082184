"""Tasks that a batch has no label of: what the model then returns, and how what is learned of them stays as it is.

A task may be absent in two ways: its mask is False throughout, or the losses do not have it at all. The second is made
the first, so that methods know one of them.
"""

from collections.abc import Iterable, Mapping
from functools import wraps

import jax
import jax.numpy as jnp

from auxjax.formulas.simplex import project_simplex
from auxjax.interface import Context, TaskLosses, TaskModel, TrainState
from auxjax.methods.shared import evaluation


def with_tasks(model: TaskModel, tasks: Iterable[str], *, others: bool) -> TaskModel:
    """The model with losses of all these tasks: one that a batch lacks is a task without a label in any example.

    What is absent gets the shapes of the primary task's losses, features and maps.

    Args:
      model: a `TaskModel`.
      tasks: the names.
      others: whether the model may return further ones.

    Returns:
      A `TaskModel` whose losses raise a ValueError for a task that is not expected.
    """
    known = sorted(tasks)

    def completed(out):
        if not (isinstance(out, TaskLosses) and isinstance(out.values, Mapping) and model.primary in out.values):
            return out  # `evaluate` says what is wrong with it
        if not isinstance(out.masks, Mapping | None):
            return out
        new, absent = sorted(set(out.values) - set(known)), [task for task in known if task not in out.values]
        if new and not others:
            raise ValueError(
                f"TaskLosses.values has the task {new[0]!r}, which the batch given to init did not have; the method "
                f"knows the tasks {known}. Give init a batch with all of them: one without labels has masks of False."
            )
        return _completed(out, model.primary, absent) if absent else out

    def completing(function):
        return wraps(function)(lambda *arguments, **extras: completed(function(*arguments, **extras)))

    own = model.output_losses and completing(model.output_losses)
    return model._replace(losses=completing(model.losses), output_losses=own)


def _completed(out: TaskLosses, primary: str, absent: list[str]) -> TaskLosses:
    """The losses with these tasks added, none of their examples labelled."""

    def added(found):
        if not isinstance(found, Mapping) or primary not in found:
            return found
        return {**found, **{task: jnp.zeros_like(found[primary]) for task in absent}}

    unlabelled = jnp.zeros(jnp.shape(out.values[primary]), bool)
    return out._replace(
        values=added(out.values),
        masks={**(out.masks or {}), **dict.fromkeys(absent, unlabelled)},
        features=added(out.features),
        maps=added(out.maps),
    )


def seen_tasks(context: Context, state: TrainState, batch, key) -> dict[str, jax.Array] | None:
    """`{task: bool}`: of which tasks a batch, of any copy or replica, has a label; `None` where nothing is masked."""
    shapes = evaluation.loss_shapes(context, state, batch, key)
    if all(mask is None for mask in (shapes.masks or {}).values()):
        return None
    # Evaluated for its masks alone; jit drops the rest.
    out = evaluation.evaluate(context.model, state.params, state.model_state, batch, key)
    tasks = sorted(out.values)
    return evaluation.by_task(tasks, evaluation.in_any_copy(context, evaluation.labelled(context, out, tasks)))


def keep_unseen(seen, new, old):
    """The state of an optimiser of weights: `new` for tasks that were seen, `old` for the others.

    Without it momentum would keep updating weights for which the batch has no labels.

    Args:
      seen: a pytree of bools, like the weights.
      new: the optimiser's state, or the weights, after an update.
      old: and before it.
    """
    structure, shapes = jax.tree.structure(seen), [jnp.shape(leaf) for leaf in jax.tree.leaves(seen)]

    def is_alike(node) -> bool:
        return jax.tree.structure(node) == structure and [jnp.shape(leaf) for leaf in jax.tree.leaves(node)] == shapes

    def choose(after, before):
        return jax.tree.map(jnp.where, seen, after, before) if is_alike(after) else after

    return jax.tree.map(choose, new, old, is_leaf=is_alike)


def project_seen(weights: jax.Array, kept: jax.Array, seen: jax.Array, total) -> jax.Array:
    """`project_simplex` of the weights that were seen, on what the others, which stay, leave of the total.

    Args:
      weights: `[K]`, after an update.
      kept: `[K]`, before it, with the sum `total`.
      seen: bool `[K]`.
      total: scalar.
    """
    rest = total - jnp.sum(jnp.where(seen, jnp.zeros_like(kept), kept))
    # So far below the others that the projection gives them nothing.
    low = jnp.max(jnp.where(seen, weights, -jnp.inf)) - 2 * rest - 1
    return jnp.where(seen, project_simplex(jnp.where(seen, weights, low), rest), kept)
