"""A class from a few labelled images, and auxiliary tasks, yes-or-no or real, from a pool of others."""

import jax
import jax.numpy as jnp
import optax

from auxjax import TaskLosses, TaskModel
from experiments.contract import Experiment
from experiments.evaluation import classification
from experiments.evaluation.evaluators import Evaluator
from experiments.inputs.batches import Draw, Draws
from experiments.methods.defaults import common_options

PRIMARY = "class"
KINDS = ("binary", "real")


def names_of(shapes) -> dict[str, tuple[str, ...]]:
    """`{kind: names}` of the auxiliary tasks, a column of targets per kind."""
    columns = dict(shapes.columns)
    return {kind: columns[kind].names for kind in KINDS if kind in columns}


def heads(shapes) -> dict[str, int]:
    """Output sizes of the network: the classes, and one head for all auxiliary tasks of a kind."""
    return {PRIMARY: shapes.num_classes, **{kind: len(names) for kind, names in names_of(shapes).items()}}


def expected_error(logits, labels):
    """`1 - p_label`, `[n]`: the share of mistakes of predictions that are drawn from the probabilities.

    Bounded, so that a network that is too sure of itself does not gain by being less sure alone.
    """
    return 1.0 - jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], axis=1)[:, 0]


OUTER_LOSSES = {
    "cross_entropy": optax.softmax_cross_entropy_with_integer_labels,
    "expected_error": expected_error,
}


def task_model(network, shapes, outer_loss: str = "cross_entropy") -> TaskModel:
    """The `TaskModel`: cross-entropies, and half the squared error of real targets.

    Args:
      network: with the heads above.
      shapes: `data.pools.Shapes`.
      outer_loss: of the primary task where a batch has no part "pool", one of `OUTER_LOSSES`.
    """
    by_kind = names_of(shapes)

    def outputs(params, batch, key):
        del key
        known = network.apply({"params": params}, batch["labelled"]["image"], train=True)
        if "pool" not in batch:  # the outer loss
            return {"labelled": known}
        return {"labelled": known, "pool": network.apply({"params": params}, batch["pool"]["image"], train=True)}

    def output_losses(out, batch, key):
        del key
        known = out["labelled"]
        of_primary = OUTER_LOSSES["cross_entropy" if "pool" in out else outer_loss]
        values = {PRIMARY: of_primary(known.heads[PRIMARY], batch["labelled"]["label"])}
        features = {PRIMARY: known.features}
        for kind, names in by_kind.items() if "pool" in out else ():
            found = _LOSSES[kind](out["pool"].heads[kind], batch["pool"][kind].astype(jnp.float32))
            values |= {name: found[:, place] for place, name in enumerate(names)}
            features |= {name: out["pool"].features for name in names}
        return TaskLosses(values, features=features)

    def losses(params, batch, key):
        return output_losses(outputs(params, batch, key), batch, key)

    shared = {"trunk": lambda path: "trunk" in path, "outputs": outputs, "output_losses": output_losses}
    return TaskModel(losses, primary=PRIMARY, **shared)


_LOSSES = {"binary": optax.sigmoid_binary_cross_entropy, "real": optax.l2_loss}


def evaluator(network) -> Evaluator:
    """Accuracy of the classes."""

    def scores_of(params, model_state, images):
        del model_state
        return network.apply({"params": params}, images, train=False).heads[PRIMARY]

    return classification.accuracy(scores_of)


def method_options(settings, shapes) -> dict[str, dict]:
    """Options of the methods that need some; all weights have one learning rate."""
    options = common_options(settings, shapes, shapes.tasks[1:], max_updates=150, fixed_weight=1.0)
    options["arml"]["outer_optimizer"] = optax.adam(settings.weight_learning_rate)
    return options


def experiment(network, settings, shapes) -> Experiment:
    """A network without model state, trained by Adam.

    Args:
      network: of `auxjax.models`, with the heads above.
      settings: a config's, with `outer_loss`, `learning_rate` and the sizes of the batches.
      shapes: `data.pools.Shapes`.
    """

    def init_params(key):
        return network.init(key, jnp.zeros((1, *shapes.inputs), jnp.float32))["params"], None

    return Experiment(
        model=task_model(network, shapes, settings.outer_loss),
        optimizer=optax.adam(settings.learning_rate),
        init_params=init_params,
        draw_inner=Draws({"labelled": Draw(settings.batch_size), "pool": Draw(settings.pool_batch_size)}),
        draw_outer=Draws({"labelled": Draw(settings.outer_batch_size, pool="dev")}),
        evaluators=(evaluator(network),),
        metric="accuracy",
    )
