"""What a run starts from, checked before any training: the params, and the losses of the first batch."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from auxjax._internal import checks
from auxjax.formulas.losses import masked_mean
from auxjax.interface import Context, TrainState
from auxjax.methods.shared import evaluation


def check_params(params, trained, model_state) -> None:
    """Raises unless the params and the model's state are arrays, and the trained leaves floating."""
    _leaves("params", params)
    for path, leaf in _leaves("params", trained):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"init(params=): the leaf {path} has dtype {jnp.result_type(leaf)}; params are what gradients update, "
                "so floating arrays. Put counters and statistics into model_state, and leave what stays as it is, such "
                "as weights in 8 bits, out of TaskModel(trainable=lambda path: ...)."
            )
    _leaves("model_state", model_state)


def _leaves(name: str, tree) -> list:
    """Leaves with their paths; raises a TypeError unless they are arrays or numbers."""
    found = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    for path, leaf in found:
        if not (isinstance(leaf, bool | int | float | complex) or (hasattr(leaf, "dtype") and hasattr(leaf, "shape"))):
            raise TypeError(
                f"init({name}=): {f'the leaf {path}' if path else 'it'} is a {type(leaf).__name__}; expected arrays. "
                "Take modules, functions and names out first, as equinox.partition(model, equinox.is_inexact_array) "
                "and flax.nnx.split(model, nnx.Param, ...) do, and put them back in the loss function."
            )
    return found


def check_missing_labels(
    context: Context, state: TrainState, batch, key, weights: Callable[..., Mapping] | None = None
) -> None:
    """Raises a ValueError where NaN in the first batch would make the params NaN; looks only where there is some.

    A mask does not help after the fact: behind it stands 0 times the loss's own derivative, and 0 times NaN is NaN.
    Tasks that a method gives no weight (`Method.weights`) may have NaN; it does not use them. Cost: none without NaN in
    the batch, or where the batch is traced; a forward pass, a gradient and the weights otherwise.
    """
    if checks.is_traced(*jax.tree.leaves((state, batch, key))) or not any(map(_has_nan, jax.tree.leaves(batch))):
        return

    @jax.jit
    def look(params):
        out = evaluation.evaluate(context.model, params, state.model_state, batch, key)
        masked = [task for task in out.values if evaluation.mask_of(out, task) is not None]

        def mean(params, task):
            out = evaluation.evaluate(context.model, params, state.model_state, batch, key)
            return masked_mean(out.values[task], evaluation.mask_of(out, task))

        gradients = {task: jax.grad(mean)(params, task) for task in masked}
        finite = {
            task: jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradient)]))
            for task, gradient in gradients.items()
        }
        return out.values, {task: evaluation.mask_of(out, task) for task in masked}, finite

    values, masks, finite = jax.device_get(look(state.params))
    given = None if weights is None else jax.device_get(weights(context, state, batch, key))
    used = [task for task in values if given is None or np.any(given.get(task, 0.0) != 0)]
    for task, losses in ((task, values[task]) for task in used):
        mask = masks.get(task, np.ones(losses.shape, bool))
        shown, hidden = (int(np.sum(~np.isfinite(losses) & part)) for part in (mask, ~mask))
        if shown:
            raise ValueError(
                f"init(batch=): the batch has NaN, and the losses of task {task!r} are not finite for {shown} of "
                f"{losses.size} examples that count as labelled. Where labels are missing, mask them: targets, known = "
                f"auxjax.known_targets(targets), and TaskLosses(masks={{{task!r}: known}})."
            )
        if hidden and not finite[task]:
            raise ValueError(
                f"init(batch=): the batch has NaN, and the losses of task {task!r} are not finite for {hidden} of "
                f"{losses.size} examples that its mask leaves out, and neither is their gradient. A mask comes too "
                "late for that: put a harmless target there before the loss is computed, with targets, known = "
                "auxjax.known_targets(targets)."
            )


def _has_nan(leaf) -> bool:
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating) or not getattr(leaf, "is_fully_addressable", True):
        return False
    return bool(np.isnan(np.asarray(leaf)).any())
