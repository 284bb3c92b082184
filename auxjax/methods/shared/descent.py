"""Updates of the params that methods share: one step of the optimiser, and one step on a weighted sum of losses."""

from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import optax

from auxjax.formulas.losses import masked_means, weighted_loss
from auxjax.interface import Context, Scalar, TaskLosses, TrainState
from auxjax.methods.shared import evaluation


def descend(context: Context, state: TrainState, grads, model_state) -> TrainState:
    """One update of the inner optimiser: `params + optimizer.update(reduce(grads))`.

    Args:
      context: model, optimiser and reduction.
      state: training state; its params and optimiser state change.
      grads: pytree like `state.params`, a gradient or any other update field.
      model_state: the model's new state.
    """
    updates, opt_state = context.optimizer.update(context.reduce(grads), state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state._replace(params=params, opt_state=opt_state, model_state=model_state)


def weighted_gradient(context: Context, state: TrainState, batch, key, weights_of):
    """Gradient of `sum_k mean_i w_ik l_ik` in the params, the weights held fixed.

    Args:
      context: model, optimiser and reduction.
      state: training state.
      batch: any pytree.
      key: typed PRNG key.
      weights_of: `TaskLosses -> {task: scalar or [n_task]}`; called on stop-gradiented losses and features.

    Returns:
      `(grads, losses, weights)`: the gradient, the `TaskLosses` it came from and the weights used.
      Cost: one gradient.
    """

    def loss(params):
        out = evaluation.evaluate(context.model, params, state.model_state, batch, key)
        weights = weights_of(jax.lax.stop_gradient(out))
        return weighted_loss(out.values, weights, masks=out.masks), (out, weights)

    grads, (out, weights) = jax.grad(loss, has_aux=True)(state.params)
    return grads, out, weights


def weighted_update(context: Context, state: TrainState, batch, key, weights_of):
    """One inner update on a weighted sum of losses: `weighted_gradient`, then `descend`.

    Returns:
      `(state, metrics)`.
    """
    grads, out, weights = weighted_gradient(context, state, batch, key, weights_of)
    return descend(context, state, grads, out.state), loss_metrics(out, weights)


def weighted_by(weights_of) -> Callable:
    """`Method.inner` of a method whose updates are `weighted_update` with `weights_of(context, state, out)`."""

    def inner(context, state, batch, key):
        return weighted_update(context, state, batch, key, lambda out: weights_of(context, state, out))

    return inner


def loss_metrics(out: TaskLosses, weights: Mapping[str, Scalar]) -> dict[str, jax.Array]:
    """`loss/<task>` and `weight/<task>`: means over the labelled examples; a task without a weight has weight 0."""
    tasks = sorted(out.values)
    means = masked_means(evaluation.constant_weights(weights, out), out.masks)
    losses = {
        f"loss/{task}": value for task, value in evaluation.by_task(tasks, evaluation.mean_losses(out, tasks)).items()
    }
    return losses | {f"weight/{task}": value for task, value in evaluation.by_task(tuple(out.values), means).items()}


def apply_updates(weights: jax.Array, updates) -> jax.Array:
    """`optax.apply_updates` of one array, for which optax names the type of any pytree."""
    return cast(jax.Array, optax.apply_updates(weights, updates))


def keep_unseen(seen: jax.Array, new, old):
    """The state of an optimiser of `[tasks]` weights: `new` for tasks that were seen, `old` for the others.

    Without it momentum would keep updating weights for which the batch has no labels.
    """

    def choose(after, before):
        return jnp.where(seen, after, before) if jnp.shape(after) == seen.shape else after

    return jax.tree.map(choose, new, old)
