"""The update field of methods that weigh tasks per module: every module of the trunk mixes the gradients its own way.

    module m of the trunk    d_m = sum_k w_mk g_k,m        (k = 0 is the primary task)
    heads                    d_h = g_0,h + sum_k c g_k,h

Unless all rows of w are alike, d is the gradient of no loss, and its Jacobian is not symmetric.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from auxjax.formulas.losses import weighted_loss
from auxjax.formulas.partition import Modules, modules_by_path, partition
from auxjax.formulas.task_gradients import TaskGradients, scale_modules, task_gradients
from auxjax.interface import Context, TrainState
from auxjax.methods.shared import evaluation


def modules_of(context: Context, params, module_of: Callable[[str], str] | None) -> Modules:
    """The trunk's modules; one, "trunk", for `module_of=None`."""
    trunk = evaluation.trunk_of(context, params)
    return modules_by_path(params, module_of or (lambda path: "trunk"), trunk=trunk)


def mixed_field(
    where: str,
    context: Context,
    state: TrainState,
    batch,
    key,
    modules: Modules,
    head_weight: float,
    weights_of: Callable[[TaskGradients], jax.Array],
):
    """The field, at `state.params`.

    Args:
      where: the method's name, for messages.
      context: model, optimiser and reduction.
      state: training state.
      batch: any pytree.
      key: typed PRNG key.
      modules: from `modules_of`.
      head_weight: c, the weight of the auxiliary losses in the heads.
      weights_of: `TaskGradients -> [M, 1 + K]`, w, the primary task's column first.

    Returns:
      `(field, losses, weights)`: a pytree like the params, averaged over replicas; the `TaskLosses`; w.

    Cost: one evaluation of the losses, what `weights_of` takes, and M reverse passes, or 1 + K if that is less.
    """

    def heads(params):
        out = evaluation.evaluate(context.model, params, state.model_state, batch, key)
        weights = {task: 1.0 if task == context.model.primary else head_weight for task in out.values}
        return weighted_loss(out.values, weights, masks=out.masks), out

    # The trunk's part of this gradient is replaced below; the compiler leaves it out.
    field, out = jax.grad(heads, has_aux=True)(state.params)
    trunk = evaluation.trunk_of(context, state.params)
    losses = evaluation.loss_vector(context, state, batch, key)
    tasks = task_gradients(
        losses, state.params, trunk=trunk, reduce=context.reduce, where=where, products=context.model.products
    )
    weights = weights_of(tasks)
    _, merge = partition(context.reduce(field), True if trunk is None else trunk)
    return merge(_mixtures(tasks, modules, weights)), out, weights


def _mixtures(tasks: TaskGradients, modules: Modules, weights) -> list:
    """The trunk's part: `sum_k w_mk g_k` on the leaves of module m."""
    count, num_tasks = weights.shape
    if count == 1:
        return tasks.combine(weights[0])
    if count <= num_tasks:
        # One after another and not batched: of every mixture the compiler then keeps the leaves of its module alone.
        mixtures = [tasks.combine(row) for row in weights]
        return [mixtures[module][place] for place, module in enumerate(modules.of_leaf)]
    gradients = jax.vmap(tasks.combine)(jnp.eye(num_tasks, dtype=weights.dtype))
    scaled = jax.vmap(lambda gradient, column: scale_modules(gradient, column, modules))(gradients, weights.T)
    return [leaf.sum(0) for leaf in scaled]
