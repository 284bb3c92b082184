"""The curvature of a loss that is made of the model's losses, in a form that stays positive far from a minimum.

    Gauss-Newton                  of a model that gives its outputs
    empirical Fisher matrix       of the examples' losses, for any other

The Hessian has both signs as long as a network is not trained to the end, and conjugate gradients lose the signal there
(docs/results/along_runs.md). The empirical Fisher matrix is far from it where examples have wrong labels.

Not for: a network of the losses, or another combination that does not grow in each of them.
"""

from collections.abc import Callable
from typing import Any

import jax

from auxjax.hypergrad import Curvature, fisher, gauss_newton
from auxjax.interface import TaskLosses, TaskModel, call
from auxjax.methods.shared import evaluation

Combine = Callable[[Any, TaskLosses], jax.Array]  # (meta, losses) -> scalar, the inner loss


def of_outputs(model: TaskModel, model_state, key, combine: Combine) -> Curvature | None:
    """The Gauss-Newton matrix of `combine(meta, losses of the model)`, `None` for a model without outputs.

    Args:
      model: a `TaskModel`.
      model_state: its state.
      key: typed PRNG key, the one that the inner loss is evaluated with.
      combine: `(meta, TaskLosses) -> scalar`, the inner loss.
    """
    if model.outputs is None or model.output_losses is None:
        return None
    network, losses = model.outputs, model.output_losses

    def outputs(params, meta, batch):
        again = evaluation.fresh({"key": key, "state": model_state})
        return call(network, params, batch, again["key"], state=again["state"])

    def loss(z, params, meta, batch):
        # What else the model returns, such as masks and features, is held fixed.
        whole = jax.lax.stop_gradient(evaluation.evaluate(model, params, model_state, batch, key))
        again = evaluation.fresh({"key": key, "state": model_state})
        values = call(losses, z, batch, again["key"], state=again["state"]).values
        return combine(meta, whole._replace(values=values))

    return gauss_newton(outputs, loss)


def of_losses(model: TaskModel, model_state, key, combine: Combine) -> Curvature:
    """The empirical Fisher matrix of `combine(meta, losses of the model)`, with the same arguments."""

    def out_of(params, batch) -> TaskLosses:
        return evaluation.evaluate(model, params, model_state, batch, key)

    def losses(params, meta, batch):
        return out_of(params, batch).values

    def loss(values, params, meta, batch):
        # What else the model returns, such as masks and features, is held fixed.
        return combine(meta, jax.lax.stop_gradient(out_of(params, batch))._replace(values=values))

    return fisher(losses, loss)
