"""Several yes-or-no labels of one input: what the multi-label configs share.

Every label is a task with the binary cross-entropy of its own logit, all of them read from the same features. The
primary task counts only where its label is shown. As the classes of one label can be very unequal, the primary task is
judged by the area under the ROC curve, with the accuracy at probability 1/2 beside it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from auxjax import TaskLosses, TaskModel
from experiments.evaluation.statistics import auroc

HEAD = "labels"


def heads(tasks: tuple[str, ...]) -> dict[str, int]:
    """Output sizes of the network: one head with a logit per task, which compiles faster than a head per task."""
    return {HEAD: len(tasks)}


def task_model(network, tasks: tuple[str, ...]) -> TaskModel:
    """The `TaskModel` of a network with the head above; `tasks` has the primary task first."""

    def losses(params, batch, key):
        out = network.apply({"params": params}, batch["features"], train=True)
        logits = out.heads[HEAD]
        labels = jnp.concatenate([batch["label"][:, None], batch["auxiliary"]], axis=1)
        values = optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype))
        columns = {task: values[:, place] for place, task in enumerate(tasks)}
        return TaskLosses(columns, masks={tasks[0]: batch["labelled"]}, features=out.features)

    return TaskModel(losses, primary=tasks[0], trunk=lambda path: "trunk" in path)


def make_evaluate(network):
    """`(params, model_state, split) -> {"accuracy", "auroc"}` of the primary task."""

    @jax.jit
    def logits_of(params, features):
        return network.apply({"params": params}, features, train=False).heads[HEAD][:, 0]

    def evaluate(params, model_state, split) -> dict[str, float]:
        logits, positive = np.asarray(logits_of(params, split["features"])), split["label"] == 1
        return {"accuracy": float(np.mean((logits > 0) == positive)), "auroc": auroc(logits, positive)}

    return evaluate
