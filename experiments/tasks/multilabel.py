"""Several yes-or-no labels of one input: what the multi-label configs share.

Every label is a task with the binary cross-entropy of its own logit, all of them read from the same features. The
primary task counts only where its label is shown. As the classes of one label can be very unequal, the primary task is
judged by the area under the ROC curve, with the accuracy at probability 1/2 beside it.
"""

import jax.numpy as jnp
import optax

from auxjax import TaskLosses, TaskModel
from experiments.evaluation import classification
from experiments.evaluation.evaluators import Evaluator

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


def evaluator(network) -> Evaluator:
    """Accuracy and area under the ROC curve of the primary task."""

    def logits_of(params, features):
        return network.apply({"params": params}, features, train=False).heads[HEAD][:, 0]

    return classification.binary(logits_of)
