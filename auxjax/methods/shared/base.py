"""The interface between a model and a method: neither knows the other.

A user gives per-task, per-example losses (`TaskModel`). A method is three pure functions on the training state
(`Method`), as an optax transformation is two on the optimiser state. `make_step` puts them together.

    init (context, state, batch, key)                     -> method state
    inner(context, state, batch, key)                     -> (state, metrics)      one update of params
    outer(context, state, inner_batch, outer_batch, key)  -> (state, metrics)      one update of meta

Whole states go in and come out because methods differ in what they touch: a weighted loss changes the gradient,
Langevin sampling replaces the optimiser, a look-ahead runs the optimiser on a copy, a policy samples labels. What they
share is here: `evaluate` calls the model and checks what it returns, `descend` does one optimiser update,
`weighted_update` does both for a weighted sum of losses.

Metrics have common names: `loss/<task>` and `weight/<task>` (means over the labelled examples of the batch),
`outer_loss`, `hypergradient/<field of HypergradInfo>`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from auxjax._internal.precision import accumulation_dtype
from auxjax.formulas.losses import masked_means, weighted_loss
from auxjax.formulas.partition import mask_by_path
from auxjax.interface import TrainState


class TaskLosses(NamedTuple):
    """What a model's loss function returns for one batch.

    Attributes:
      values: `{task: [n_task]}`, one loss per example and task. Tasks may have batches of different sizes.
      masks: `{task: bool [n_task]}`, True where the example has a label for the task; tasks left out are
        fully labelled.
      features: `[n, d]` output of the shared trunk, or `{task: [n_task, d]}`, for methods that look at it (JTDS).
      state: the model's new state (BatchNorm statistics), `None` for a model without any.
      maps: `{task: [n_task, height, width]}`, losses per pixel whose means over pixels are `values`, for methods that
        look at where in an image a loss is (AuxiLearn's convolutional form).
      label_losses: `[n, classes]`, what the auxiliary head would lose if class c were its label, for methods that
        generate labels, where the loss is linear in the label, as cross-entropy and focal loss are. They then need no
        `TaskModel.soft_label_loss`, and one forward and backward pass serves the primary and the generated task.
    """

    values: Mapping[str, jax.Array]
    masks: Mapping[str, jax.Array] | None = None
    features: Any = None
    state: Any = None
    maps: Mapping[str, jax.Array] | None = None
    label_losses: jax.Array | None = None


class TaskModel(NamedTuple):
    """A model as a method sees it. With model state, every function takes it as one more, last argument.

    Attributes:
      losses: `(params, batch, key) -> TaskLosses`.
      primary: name of the task that counts.
      trunk: which leaves of `params` the tasks share: a predicate on the path of a leaf, such as
        `lambda path: "trunk" in path`, a pytree of bools like `params`, or `None` for all of them.
      soft_label_loss: `(params, batch, labels, key) -> [n]`, the auxiliary head's loss against given soft labels
        `[n, classes]`, for methods that generate labels.
      feature_loss: `(params, features, labels) -> [n]`, the loss of given features and labels, for methods that
        generate both.
    """

    losses: Callable[..., TaskLosses]
    primary: str
    trunk: Any = None
    soft_label_loss: Callable[..., jax.Array] | None = None
    feature_loss: Callable[..., jax.Array] | None = None


def no_reduction(tree):
    """The reduction outside of `pmap`: `tree` itself."""
    return tree


class Context(NamedTuple):
    """What stays fixed over a run: the model, the inner optimiser and how replicas average.

    Attributes:
      model: a `TaskModel`.
      optimizer: the inner optimiser, an optax transformation; methods may call it on copies (look-ahead).
      reduce: pytree -> pytree, applied to every gradient and inside every matrix-vector product. The identity under
        jit and sharding; a mean over replicas inside a pmapped step.
    """

    model: TaskModel
    optimizer: optax.GradientTransformationExtraArgs
    reduce: Callable[[Any], Any] = no_reduction


class Method(NamedTuple):
    """A method of auxiliary learning.

    Attributes:
      init: `(context, state, batch, key) -> method state`; `state.method` is still `()`.
      inner: `(context, state, batch, key) -> (state, metrics)`, one update of `state.params`. The step counter and
        the PRNG key of the state are the caller's to change.
      outer: `(context, state, inner_batch, outer_batch, key) -> (state, metrics)`, one update of `state.method`, or
        `None` for methods without an outer level. It leaves `state.model_state` alone.
      weights: `(context, state, batch, key) -> {task: scalar or [n_task]}`, the weights the method gives this batch,
        to look at; `None` for methods that have none.
      whole_batch: the method looks at the batch as a whole (at pairs of its examples, at rows of a table), where a mean
        over replicas is not enough. Inside `pmap` every replica then gets all of it, and does the same work; a batch
        that is sharded under jit is divided all the same.
    """

    init: Callable[..., Any]
    inner: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    outer: Callable[..., tuple[TrainState, dict[str, jax.Array]]] | None = None
    weights: Callable[..., dict[str, jax.Array]] | None = None
    whole_batch: bool = False


def evaluate(model: TaskModel, params, model_state, batch, key) -> TaskLosses:
    """Calls the model's loss function and checks, at trace time, what came back.

    Args:
      model: a `TaskModel`.
      params: inner variables.
      model_state: the model's state, passed on as a fourth argument unless it is `None`.
      batch: any pytree.
      key: typed PRNG key.

    Returns:
      The model's `TaskLosses`. Without a new model state in it, `state` is the one that went in.

    Raises:
      TypeError: not a `TaskLosses`.
      ValueError: no primary task, a loss that is not one number per example, masks that do not fit. (Features are
        checked by the methods that look at them.)
    """
    arguments = (params, batch, key) if model_state is None else (params, batch, key, model_state)
    out = model.losses(*arguments)
    _check_losses(out, model.primary)
    return out if out.state is not None else out._replace(state=model_state)


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


def labelled_in_batch(context: Context, state: TrainState, batch, key) -> jax.Array:
    """`labelled` of a batch that is not evaluated yet, `[K + 1]` in the order of `loss_vector`."""
    out = evaluate(context.model, state.params, state.model_state, batch, key)
    return labelled(context, out, (context.model.primary, *auxiliary_tasks(out, context.model.primary)))


def keep_unseen(seen: jax.Array, new, old):
    """The state of an optimiser of `[tasks]` weights: `new` for tasks that were seen, `old` for the others.

    Without it momentum would go on moving what a batch without labels has nothing to say about.
    """

    def choose(after, before):
        return jnp.where(seen, after, before) if jnp.shape(after) == seen.shape else after

    return jax.tree.map(choose, new, old)


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


def loss_vector(context: Context, state: TrainState, batch, key) -> Callable[[Any], jax.Array]:
    """`params -> [K + 1]`: the mean losses, the primary task first and then `auxiliary_tasks`, for `task_gradients`.

    The model state and the key are held fixed; the new model state is dropped.
    """
    model = context.model

    def losses(params):
        out = evaluate(model, params, state.model_state, batch, key)
        return mean_losses(out, (model.primary, *auxiliary_tasks(out, model.primary)))

    return losses


def trunk_of(context: Context, params):
    """`TaskModel.trunk` as a pytree of bools, or `None` for all leaves."""
    trunk = context.model.trunk
    return mask_by_path(params, trunk) if callable(trunk) else trunk


def loss_shapes(context: Context, state: TrainState, batch, key) -> TaskLosses:
    """Shapes and dtypes of the losses, without computing them; checks them on the way."""
    model = context.model
    return jax.eval_shape(lambda p, s, b, k: evaluate(model, p, s, b, k), state.params, state.model_state, batch, key)


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
        out = evaluate(context.model, params, state.model_state, batch, key)
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


def loss_metrics(out: TaskLosses, weights: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`loss/<task>` and `weight/<task>`: means over the labelled examples; a task without a weight has weight 0."""
    tasks = sorted(out.values)
    means = masked_means(constant_weights(weights, out), out.masks)
    losses = {f"loss/{task}": value for task, value in by_task(tasks, mean_losses(out, tasks)).items()}
    return losses | {f"weight/{task}": value for task, value in by_task(tuple(out.values), means).items()}


def constant_weights(weights: Mapping[str, jax.Array], out: TaskLosses) -> dict[str, jax.Array]:
    """`{task: [n_task]}` from scalar weights, 0 for tasks without one: what `Method.weights` returns."""
    found = {}
    for task, value in out.values.items():
        weight = weights.get(task, 0.0)
        # Not in the losses' dtype: half precision has no room for a weight of 1.003, or of a million.
        found[task] = jnp.broadcast_to(jnp.asarray(weight).astype(accumulation_dtype(value, weight)), value.shape)
    return found
