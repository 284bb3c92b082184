"""What benchmarks.train_step times: two small networks with many binary tasks, and every method with its options."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import auxjax
from auxjax.models import MLP, ConvNet

MODELS = {"mlp": "MLP", "convnet": "ConvNet"}
REFERENCES = ("stl", "equal")
# What runs by default: everything on the MLP, the methods that compare gradients and two others on the ConvNet.
TASKS = {"mlp": (1, 13, 39, 312), "convnet": (1, 39, 312)}
ON_CONVNET = ("stl", "equal", "arml", "ol_aux", "cosine_similarity", "gradnorm", "maoal", "jtds")
EXAMPLES = 1000  # rows of the table of N-JTDS
CHUNK = 64  # gradients in memory at a time, where a method has that option


class Case(NamedTuple):
    """One model with its data.

    Attributes:
      model: the `TaskModel`.
      params: initial parameters.
      inner, outer: batches.
      names: the auxiliary tasks.
      last_layer: name of the last layer of the trunk.
    """

    model: auxjax.TaskModel
    params: Any
    inner: dict
    outer: dict
    names: tuple[str, ...]
    last_layer: str


def make_case(kind: str, tasks: int, options: argparse.Namespace) -> Case:
    """Random inputs, random binary labels, and a network whose heads are one dense layer.

    Args:
      kind: "mlp" or "convnet".
      tasks: K; 0 for a model without auxiliary tasks.
      options: of the command line.
    """
    keys = jax.random.split(jax.random.key(options.seed), 5)
    heads, names = {"all": tasks + 1}, tuple(f"auxiliary_{k:03d}" for k in range(tasks))
    if kind == "mlp":
        network, shape, last = MLP(heads, options.hidden), (options.inputs,), f"trunk_{len(options.hidden) - 1}"
    else:
        network, shape = ConvNet(heads, options.channels), (options.image, options.image, 3)
        last = f"trunk_conv_{len(options.channels) - 1}"

    def batch(key_x, key_y):
        return {
            "x": jax.random.normal(key_x, (options.batch, *shape), jnp.float32),
            "y": jax.random.bernoulli(key_y, 0.5, (tasks + 1, options.batch)).astype(jnp.float32),
            "ids": jnp.arange(options.batch, dtype=jnp.int32),
        }

    def losses(params, batch, key):
        del key
        out = network.apply({"params": params}, batch["x"])
        values = optax.sigmoid_binary_cross_entropy(out.heads["all"].T, batch["y"])
        # Not values[k] for every k: the reverse of unstack is one stack, that of K + 1 slices is K + 1 sums.
        tasks_losses = dict(zip(("primary", *names), jnp.unstack(values), strict=True))
        return auxjax.TaskLosses(tasks_losses, features=out.features)

    model = auxjax.TaskModel(losses, primary="primary", trunk=lambda path: "trunk_" in path)
    inner = batch(keys[0], keys[1])
    params = network.init(keys[4], inner["x"])["params"]
    return Case(model, params, inner, batch(keys[2], keys[3]), names, last)


class Row(NamedTuple):
    """A method with options.

    Attributes:
      method: its name.
      family: the panel of the plot it belongs to.
      options: `case -> dict`.
      why_not: `tasks -> str`, why it cannot be run with so many, or `None`.
      one_head: run it on a model without auxiliary tasks.
    """

    method: str
    family: str
    options: Callable[[Case], dict] = lambda case: {}
    why_not: Callable[[int], str | None] = lambda tasks: None
    one_head: bool = False


def grid_too_large(tasks: int) -> str | None:
    """Why the product grid of `grid_search` is left out."""
    return f"the product grid has 5^{tasks} candidates, each a copy of the params" if 5**tasks > 256 else None


def gram_too_large(tasks: int) -> str | None:
    """Why the cosines and the Gram matrix of all tasks are left out."""
    return (
        f"compiling the products of {tasks + 1} gradients takes minutes, or ends XLA's compiler" if tasks > 64 else None
    )


def shared_weights(case: Case) -> dict:
    """Five candidates for `grid_search`, whatever K is."""
    return {"candidates": [dict.fromkeys(case.names, weight) for weight in (0.0, 0.1, 0.3, 1.0, 3.0)]}


RULE, PRODUCTS, OUTER = "weights by a rule", "products of task gradients", "outer level and grid"
FAMILIES = (RULE, PRODUCTS, OUTER)
ROWS = {
    "stl": Row("stl", RULE),
    "stl, one head": Row("stl", RULE, one_head=True),
    "equal": Row("equal", RULE),
    "fixed_weights": Row("fixed_weights", RULE, lambda case: {"weights": dict.fromkeys(case.names, 0.5)}),
    "random_weights": Row("random_weights", RULE),
    "uncertainty": Row("uncertainty", RULE),
    "adaloss": Row("adaloss", RULE),
    "dwa": Row("dwa", RULE),
    "arml": Row("arml", PRODUCTS),
    "ol_aux": Row("ol_aux", PRODUCTS),
    "ol_aux, one step": Row("ol_aux", PRODUCTS, lambda case: {"form": "one_step"}),
    "cosine_similarity": Row("cosine_similarity", PRODUCTS),
    "cosine_similarity, weighted": Row(
        "cosine_similarity", PRODUCTS, lambda case: {"form": "weighted"}, why_not=gram_too_large
    ),
    "gradnorm": Row("gradnorm", PRODUCTS, lambda case: {"chunk": CHUNK}),
    "gradnorm, last layer": Row(
        "gradnorm", PRODUCTS, lambda case: {"layer": lambda path: case.last_layer in path, "chunk": CHUNK}
    ),
    "auxinash": Row("auxinash", PRODUCTS, lambda case: {"chunk": CHUNK}, why_not=gram_too_large),
    "auxinash, refresh outer": Row(
        "auxinash", PRODUCTS, lambda case: {"refresh": "outer", "chunk": CHUNK}, why_not=gram_too_large
    ),
    "auto_lambda": Row("auto_lambda", OUTER),
    "auxilearn": Row("auxilearn", OUTER),
    "maoal": Row("maoal", OUTER),
    "jtds": Row("jtds", OUTER),
    "n_jtds": Row("n_jtds", OUTER, lambda case: {"num_examples": EXAMPLES, "ids": lambda batch: batch["ids"]}),
    "grid_search, 5 candidates": Row("grid_search", OUTER, shared_weights),
    "grid_search, product": Row("grid_search", OUTER, why_not=grid_too_large),
}
# Methods that generate tasks weigh none, so that K says nothing about them: `benchmarks.step_cost` times them.
GENERATING = tuple(name for name in auxjax.methods.names() if auxjax.methods.info(name).family == "generated tasks")
# A method that is not named above runs with its own defaults.
_NAMED = {*GENERATING, *(row.method for row in ROWS.values())}
ROWS |= {name: Row(name, OUTER) for name in auxjax.methods.names() if name not in _NAMED}


def default_rows(kind: str) -> tuple[str, ...]:
    """The rows that run on a model when no methods are given."""
    return tuple(label for label, row in ROWS.items() if kind == "mlp" or row.method in ON_CONVNET)
