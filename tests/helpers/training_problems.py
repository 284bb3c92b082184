"""Small linear regression tasks on shared parameters: every gradient of a method's update has a closed form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import auxjax
from auxjax.interface import Context


class LinearTasks(NamedTuple):
    """A batch of linear regression tasks and params to start from."""

    batch: dict
    params: dict

    @staticmethod
    def make(seed, *, num_tasks=2, num_examples=8, dim=3, masked=False):
        """Primary task and `num_tasks - 1` auxiliary ones, each with its own examples."""
        rng = np.random.default_rng(seed)
        names = ["primary", *(f"aux{k}" for k in range(num_tasks - 1))]
        batch = {
            "x": {name: jnp.array(rng.normal(size=(num_examples, dim))) for name in names},
            "y": {name: jnp.array(rng.normal(size=num_examples)) for name in names},
        }
        if masked:
            batch["mask"] = {name: jnp.array(rng.random(num_examples) < 0.6) for name in names}
        return LinearTasks(batch, {"w": jnp.array(rng.normal(size=dim))})


def linear_model(*, masked=False):
    """Half squared errors; the inputs are the features. Four classes to label, for methods that generate labels."""

    def losses(params, batch, key):
        del key
        values = {task: 0.5 * (batch["x"][task] @ params["w"] - batch["y"][task]) ** 2 for task in batch["x"]}
        logits = _class_logits(batch["x"]["primary"] @ params["w"])
        return auxjax.TaskLosses(
            values,
            masks=batch["mask"] if masked else None,
            features=batch["x"],
            label_losses=auxjax.formulas.soft_labels.focal_losses(logits),
        )

    def feature_loss(params, features, labels):
        return jnp.sum(labels * auxjax.formulas.soft_labels.focal_losses(_class_logits(features @ params["w"])), axis=1)

    return auxjax.TaskModel(losses, primary="primary", feature_loss=feature_loss)


def _class_logits(outputs):
    return outputs[:, None] * jnp.array([-1.0, -0.3, 0.4, 1.2])[None, :]


def state_of(model, problem, *, optimizer=None, method=None):
    """Context and fresh state of a problem."""
    optimizer = optax.with_extra_args_support(optax.sgd(0.1) if optimizer is None else optimizer)
    context = Context(model, optimizer)
    key = jax.random.key(0)
    state = auxjax.TrainState(jnp.zeros((), jnp.int32), key, problem.params, optimizer.init(problem.params))
    if method is not None:
        state = state._replace(method=method.init(context, state, problem.batch, key))
    return context, state


def numpy_losses(batch, w):
    """`{task: [n]}`, half squared errors, by NumPy."""
    x, y = ({task: np.asarray(value) for task, value in batch[name].items()} for name in ("x", "y"))
    return {task: 0.5 * (x[task] @ w - y[task]) ** 2 for task in x}


def numpy_means(batch, w):
    """`[K + 1]`, mean losses, primary first, then by name; over the labelled examples if there is a mask."""
    losses = numpy_losses(batch, w)
    return np.array([losses[task][labelled(batch, task)].mean() for task in order(batch)])


def numpy_gradients(batch, w):
    """`[K + 1, dim]`, gradients of the mean losses."""
    rows = []
    for task in order(batch):
        keep = labelled(batch, task)
        x, y = np.asarray(batch["x"][task])[keep], np.asarray(batch["y"][task])[keep]
        rows.append(x.T @ (x @ w - y) / keep.sum())
    return np.array(rows)


def numpy_hessians(batch):
    """`[K + 1, dim, dim]`, Hessians of the mean losses."""
    found = []
    for task in order(batch):
        keep = labelled(batch, task)
        x = np.asarray(batch["x"][task])[keep]
        found.append(x.T @ x / keep.sum())
    return np.array(found)


def order(batch):
    """The tasks in the order of all methods: the primary one, then by name."""
    return ["primary", *sorted(task for task in batch["x"] if task != "primary")]


def labelled(batch, task):
    """Bool `[n]`."""
    return np.asarray(batch["mask"][task]) if "mask" in batch else np.ones(len(batch["y"][task]), bool)


def network_problem(seed, *, num_tasks=3, num_examples=8, masked=False):
    """A small network with a trunk of two layers and a head per task, one input for all: `(problem, model)`."""
    rng = np.random.default_rng(seed)
    names = ["primary", *(f"aux{k}" for k in range(num_tasks - 1))]
    batch = {
        "x": jnp.array(rng.normal(size=(num_examples, 3))),
        "y": {name: jnp.array(rng.normal(size=num_examples)) for name in names},
    }
    if masked:
        batch["mask"] = {name: jnp.array(rng.random(num_examples) < 0.6) for name in names}
    params = {
        "trunk_0": {"w": jnp.array(rng.normal(size=(3, 4))), "b": jnp.array(rng.normal(size=4))},
        "trunk_1": {"w": jnp.array(rng.normal(size=(4, 4))) / 2.0},
        "heads": {name: jnp.array(rng.normal(size=4)) for name in names},
    }

    def losses(params, batch, key):
        del key
        hidden = jnp.tanh(batch["x"] @ params["trunk_0"]["w"] + params["trunk_0"]["b"][None, :])
        features = jnp.tanh(hidden @ params["trunk_1"]["w"])
        values = {
            name: 0.5 * (features @ head - batch["y"][name]) ** 2 + 0.05 * jnp.sum(head**2)
            for name, head in params["heads"].items()
        }
        return auxjax.TaskLosses(values, masks=batch.get("mask"), features=features)

    model = auxjax.TaskModel(losses, primary="primary", trunk=lambda path: "trunk" in path)
    return LinearTasks(batch, params), model


def network_gradients(model, problem):
    """`{leaf: [K + 1, *shape]}`, all gradients of the mean losses by reverse mode, primary first."""

    def means(params):
        out = model.losses(params, problem.batch, None)
        names = ["primary", *sorted(set(out.values) - {"primary"})]
        masks = out.masks or {}
        kept = [jnp.ones(out.values[name].shape, bool) if name not in masks else masks[name] for name in names]
        sums = [jnp.sum(jnp.where(m, out.values[name], 0.0)) for name, m in zip(names, kept, strict=True)]
        return jnp.stack([total / jnp.sum(m, dtype=total.dtype) for total, m in zip(sums, kept, strict=True)])

    jacobian = jax.jacrev(means)(problem.params)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(jacobian)
    }
