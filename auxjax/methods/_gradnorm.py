"""GradNorm: weights that bring the tasks' gradient norms to one level, set by how fast each task learns.

    G_k = w_k ||grad_W l_k||,    target_k = mean_j(G_j) r_k^a,    r_k = (l_k / l_k(0)) / mean_j(l_j / l_j(0))
    w <- w - lr d/dw sum_k |G_k - target_k|   (targets held fixed),    then scaled to sum_k w_k = 1 + K

r_k is the inverse training rate: a task that has learned little, against its loss at the start, gets a larger gradient.
W are the weights at which norms are taken, the last shared layer in the paper.

Reference: Chen, Badrinarayanan, Lee, Rabinovich, 2018, GradNorm: Gradient Normalization for Adaptive Loss Balancing in
Deep Multitask Networks, ICML, equations 1 and 2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax._internal.safe_math import positive_or_one
from auxjax.formulas.partition import checked_mask
from auxjax.formulas.task_gradients import squared_norms, task_gradients
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import absent_tasks, descent, evaluation


class GradnormState(NamedTuple):
    """State of GradNorm.

    Attributes:
      weights: `[1 + K]`, the primary task's first, then in order of the names.
      opt_state: state of their optimiser.
      first: `[1 + K]`, the losses of the batch the state was made with, l_k(0); 0 for a task it had no label of, whose
        first loss is then that of the first batch that has one.
    """

    weights: jax.Array
    opt_state: Any
    first: jax.Array


@register("gradients", needs={"auxiliary"})
def gradnorm(
    *,
    outer_optimizer: optax.GradientTransformation | None = None,
    asymmetry: float = 1.5,
    layer: Callable[[str], bool] | None = None,
    weigh_primary: bool = True,
    smallest: float = 1e-3,
    chunk: int = 8,
) -> Method:
    """Weights from gradient norms.

    Args:
      outer_optimizer: optimiser of the weights; `optax.adam(0.025)` by default, the paper's learning rate.
      asymmetry: a, at least 0; how strongly slow tasks are favoured. 1.5 in the paper, 1 in ARML's code.
      layer: predicate on the path of a leaf: where norms are taken. `TaskModel.trunk` by default; the paper's choice,
        the last shared layer, is cheaper.
      weigh_primary: balance the primary task, too, as the paper does with every task. False keeps its weight at 1 and
        the auxiliary weights' sum at K, as ARML's code has its baseline.
      smallest: lower bound on the weights before they are scaled; the paper has none, and plain steps can make weights
        negative.
      chunk: gradients that are in memory at a time.

    Returns:
      A `Method`. Inner update: one gradient of the joint loss. Outer update: the norms, one reverse pass per task down
      to `layer`. It uses the inner batch and ignores the outer one. Losses must be positive for r_k to mean anything;
      a task whose loss is not, or starts at 0, is left out of their mean and gets r_k = 1. A task without a label in
      the batch, or with a loss or a norm that is not finite (`skipped` counts these), keeps its weight, and the others
      are balanced among themselves.

    Raises:
      TypeError, ValueError: an impossible option; no auxiliary task (when the state is made).
    """
    checks.number("gradnorm", least=0, asymmetry=asymmetry)
    checks.number("gradnorm", least=0, below=1, smallest=smallest)
    checks.optimizer("gradnorm", outer_optimizer=outer_optimizer)
    optimizer = optax.adam(0.025) if outer_optimizer is None else outer_optimizer
    balanced = slice(0 if weigh_primary else 1, None)

    def init(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        evaluation.auxiliary_or_raise("gradnorm", context, out)
        layer_of(state.params)
        first = evaluation.loss_vector(context, state, batch, key)(state.params)
        weights = jnp.ones(first.shape, accumulation_dtype(first))
        first = jnp.where(jnp.isfinite(first), first, jnp.zeros_like(first)).astype(weights.dtype)
        return GradnormState(weights, optimizer.init(weights), first)

    def layer_of(params):
        return checked_mask("gradnorm(layer=)", params, layer)

    def weights_of(context, state, out):
        return evaluation.by_task(evaluation.all_tasks(context, out), state.method.weights)

    def outer(context, state, inner_batch, outer_batch, key):
        del outer_batch  # GradNorm has no held-out set
        previous = state.method
        losses = evaluation.loss_vector(context, state, inner_batch, key)
        trunk = evaluation.trunk_of(context, state.params) if layer is None else layer_of(state.params)
        tasks = task_gradients(
            losses, state.params, trunk=trunk, reduce=context.reduce, where="gradnorm", products=context.model.products
        )
        dtype = previous.weights.dtype
        norms = jnp.sqrt(squared_norms(tasks, chunk=chunk)).astype(dtype)
        now = tasks.losses.astype(dtype)
        seen = evaluation.labelled_in_batch(context, state, inner_batch, key)
        finite = jnp.isfinite(norms) & jnp.isfinite(now)
        first = jnp.where((previous.first == 0) & finite, now, previous.first)
        observed = (jnp.where(finite, norms, 0.0), jnp.where(finite, now, 0.0), first, seen & finite)
        weights, metrics, opt_state = balance(context, previous, *observed)
        names = evaluation.all_tasks(context, evaluation.loss_shapes(context, state, inner_batch, key))
        metrics |= {f"gradient_norm/{name}": norm for name, norm in evaluation.by_task(names, norms).items()}
        metrics["skipped"] = jnp.sum(seen & ~finite, dtype=jnp.float32)
        return state._replace(method=GradnormState(weights, opt_state, first)), metrics

    def balance(context, previous, norms, now, first, seen):
        """One step on the weights: `(weights, metrics, opt_state)`."""
        there = seen[balanced]
        usable = (there & (first > 0)[balanced] & (now > 0)[balanced]).astype(norms.dtype)
        progress = jnp.where(usable > 0, now[balanced] / jnp.where(usable > 0, first[balanced], 1.0), 0.0)
        rates = jnp.where(usable > 0, progress / jnp.where(usable > 0, _mean(progress, usable), 1.0), 1.0)
        scaled = (previous.weights * norms)[balanced]
        targets = _mean(scaled, there.astype(norms.dtype)) * rates**asymmetry
        # d/dw_k |w_k n_k - target_k|
        differences = jnp.where(there, scaled - targets, 0.0)
        slopes = jnp.zeros_like(norms).at[balanced].set(norms[balanced] * jnp.sign(differences))
        seen = evaluation.in_any_copy(context, seen)
        there = seen[balanced]
        updates, opt_state = optimizer.update(context.share(slopes), previous.opt_state, previous.weights)
        opt_state = absent_tasks.keep_unseen(seen, opt_state, previous.opt_state)
        before = previous.weights[balanced]
        moved = jnp.maximum(descent.apply_updates(previous.weights, updates)[balanced], smallest)
        # The weights sum to the number of tasks; those without a label keep theirs.
        left = len(before) - jnp.sum(jnp.where(there, 0.0, before))
        total = jnp.sum(jnp.where(there, moved, 0.0))
        after = jnp.where(there, moved * left / positive_or_one(total), before)
        return previous.weights.at[balanced].set(after), {"gradnorm_loss": jnp.sum(jnp.abs(differences))}, opt_state

    inner, weights = descent.weighted_by(weights_of), evaluation.reported(weights_of)
    return Method(init, inner, outer, weights, shared=lambda path: path != "first", outer_data=False)


def _mean(values, counted):
    return jnp.sum(values * counted) / jnp.maximum(jnp.sum(counted), 1.0)
