"""Updates of the params that methods share: one step of the optimiser, and one step on a weighted sum of losses."""

from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import optax

from auxjax.formulas.losses import masked_means, weighted_loss
from auxjax.interface import Context, Scalar, TaskLosses, TrainState
from auxjax.methods.shared import evaluation


def descend(context: Context, state: TrainState, grads, model_state, *, value=None, loss=None) -> TrainState:
    """One update of the inner optimiser: `params + optimizer.update(reduce(grads))`.

    Args:
      context: model, optimiser and reduction.
      state: training state; its params and optimiser state change.
      grads: pytree like `state.params`, a gradient or any other update field.
      model_state: the model's new state.
      value: scalar, the loss that `grads` come from, for optimisers that ask for it (`optax.polyak_sgd`,
        `optax.contrib.reduce_on_plateau`).
      loss: `params -> scalar`, the same as a function, for those that search along a line.
    """
    grads, extras = context.reduce(grads), {}
    if value is not None:
        extras = {"value": context.reduce(value), "grad": grads}
    if loss is not None:
        extras["value_fn"] = lambda params: context.reduce(loss(params))
    updates, opt_state = context.optimizer.update(grads, state.opt_state, state.params, **extras)
    params = optax.apply_updates(state.params, updates)
    return state._replace(params=params, opt_state=opt_state, model_state=model_state)


def descend_weighted(context: Context, state: TrainState, grads, out: TaskLosses, weights, batch, key) -> TrainState:
    """`descend`, with the weighted loss as the value that an optimiser may ask for; the weights are held fixed.

    Args:
      context: model, optimiser and reduction.
      state: training state.
      grads: pytree like `state.params`.
      out: the losses that they come from.
      weights: `{task: scalar or [n_task]}`.
      batch: what `out` was evaluated on.
      key: and the key.
    """

    def value_of(out):
        return weighted_loss(out.values, jax.lax.stop_gradient(weights), masks=out.masks)

    def loss(params):
        return value_of(evaluation.evaluate(context.model, params, state.model_state, batch, key))

    return descend(context, state, grads, out.state, value=value_of(out), loss=loss)


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
    """One inner update on a weighted sum of losses: `weighted_gradient`, then `descend_weighted`.

    Returns:
      `(state, metrics)`.
    """
    grads, out, weights = weighted_gradient(context, state, batch, key, weights_of)
    new = descend_weighted(context, state, grads, out, weights, batch, key)
    return new, loss_metrics(out, weights)


def weighted_by(weights_of) -> Callable:
    """`Method.inner` of a method whose updates are `weighted_update` with `weights_of(context, state, out)`."""

    def inner(context, state, batch, key):
        return weighted_update(context, state, batch, key, lambda out: weights_of(context, state, out))

    return inner


def loss_metrics(out: TaskLosses, weights: Mapping[str, Scalar]) -> dict[str, jax.Array]:
    """`loss/<task>` and `weight/<task>`: means over the labelled examples; a task without a weight has weight 0.

    Of a task with a mask, `labelled/<task>` is the share of examples that have a label. Where it is 0 the loss is 0,
    for there is none, and so is a weight per example; a weight of the whole task is what it is.
    """
    tasks = sorted(out.values)
    means = masked_means(evaluation.constant_weights(weights, out), out.masks)
    found = {
        f"loss/{task}": value for task, value in evaluation.by_task(tasks, evaluation.mean_losses(out, tasks)).items()
    }
    for task, mean in evaluation.by_task(tuple(out.values), means).items():
        whole = jnp.ndim(weights.get(task, 0.0)) == 0
        found[f"weight/{task}"] = jnp.asarray(weights.get(task, 0.0), mean.dtype) if whole else mean
        if (mask := evaluation.mask_of(out, task)) is not None:
            found[f"labelled/{task}"] = jnp.mean(mask, dtype=mean.dtype)
    return found


def apply_updates(weights: jax.Array, updates) -> jax.Array:
    """`optax.apply_updates` of one array, for which optax names the type of any pytree."""
    return cast(jax.Array, optax.apply_updates(weights, updates))
