"""What benchmarks.scaling compiles: one small network with classes to predict, and every method with its options.

A row may have a knob, the number whose cost is asked for: terms of a solver, look-ahead steps, auxiliary tasks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import auxjax
from auxjax.formulas import soft_labels
from auxjax.hypergrad import implicit, one_step, unrolled
from auxjax.models import MLP, ConvNet
from auxjax.solvers import cg, neumann

CLASSES, SUB_CLASSES, INPUTS, FEATURES = 4, 2, 12, 8


class Sizes(NamedTuple):
    """What is varied.

    Attributes:
      width: of the trunk's first layer, so that the params grow and the features do not.
      meta: of a generator's first layer, or rows of a table of weights.
      batch: examples of all devices together.
      knob: the row's own number; 0 for rows without one.
      network: "mlp" or "convnet".
    """

    width: int = 32
    meta: int = 32
    batch: int = 16
    knob: int = 0
    network: str = "mlp"


class Row(NamedTuple):
    """A method with options.

    Attributes:
      method: its name.
      group: the panel of the plots it belongs to.
      options: `Sizes -> dict`.
      knob: what the row's number is, `None` for rows without.
      values: two values of it.
      default: the value that the tables and the model are for.
      has_meta: whether `Sizes.meta` is the size of something.
      tasks: whether the knob is the number of auxiliary tasks.
      replicas: whether the method takes explicit reductions, `make_step(axis_name=)`.
    """

    method: str
    group: str
    options: Callable[[Sizes], dict] = lambda sizes: {}
    knob: str | None = None
    values: tuple[int, int] = (0, 0)
    default: int = 0
    has_meta: bool = False
    tasks: bool = False
    replicas: bool = True


class Case(NamedTuple):
    """A model with abstract params and batches."""

    model: auxjax.TaskModel
    params: Any
    batch: dict


def make_case(sizes: Sizes, num_tasks: int, heads: bool = True) -> Case:
    """A network with a head per task and one for generated labels, as shapes alone.

    Args:
      sizes: `Sizes`.
      num_tasks: auxiliary tasks.
      heads: False leaves out all heads but the primary one, so that every param has a gradient.
    """
    names = tuple(f"aux{k}" for k in range(num_tasks)) if heads else ()
    outputs = dict.fromkeys(("primary", *names), CLASSES) | ({"generated": CLASSES * SUB_CLASSES} if heads else {})
    network, shape = _network(sizes.network, outputs, sizes.width)

    def losses(params, batch, key):
        del key
        out = network.apply({"params": params}, batch["x"])
        values = {
            name: optax.softmax_cross_entropy_with_integer_labels(out.heads[name], batch["y"][name])
            for name in ("primary", *names)
        }
        made = soft_labels.focal_losses(out.heads["generated"]) if heads else None
        return auxjax.TaskLosses(values, features=out.features, label_losses=made)

    def feature_loss(params, features, labels):
        head = params["head_generated"]
        logits = features @ head["kernel"] + head["bias"]
        return jnp.sum(labels * soft_labels.focal_losses(logits), axis=1)

    model = auxjax.TaskModel(
        losses, primary="primary", trunk=lambda path: "trunk_" in path, feature_loss=feature_loss if heads else None
    )
    integers = jax.ShapeDtypeStruct((sizes.batch,), jnp.int32)
    batch = {
        "x": jax.ShapeDtypeStruct((sizes.batch, *shape), jnp.float32),
        "y": dict.fromkeys(("primary", *names), integers),
        "ids": integers,
    }
    params = jax.eval_shape(network.init, jax.random.key(0), batch["x"])["params"]
    return Case(model, params, batch)


def _network(kind: str, outputs: dict, width: int):
    """The network and the shape of an example."""
    if kind == "mlp":
        return MLP(outputs, (width, FEATURES)), (INPUTS,)
    return ConvNet(outputs, (width // 2, width, 2 * width)), (16, 16, 3)


def _generator(sizes: Sizes, width: int, split: Callable = lambda outputs: outputs) -> auxjax.Generator:
    """A network like the model, `sizes.meta` wide."""
    network, _ = _network(sizes.network, {"label": width}, sizes.meta)

    def apply(meta, batch):
        return split(network.apply({"params": meta}, batch["x"]).heads["label"])

    return auxjax.Generator(lambda key, batch: network.init(key, batch["x"])["params"], apply)


def _labels(batch):
    return batch["y"]["primary"]


def _ids(batch):
    return batch["ids"]


_MADE = {"labels": _labels, "sub_classes": SUB_CLASSES}
_WIDE = CLASSES * SUB_CLASSES


def _weighted(outputs):
    return outputs[:, :_WIDE], outputs[:, _WIDE]


def _terms(sizes: Sizes) -> dict:
    return {"hypergradient": implicit(neumann(sizes.knob))}


def _steps(make: Callable) -> Callable:
    return lambda sizes: {"hypergradient": make(sizes.knob)}


def _maxl(**more) -> Callable:
    return lambda sizes: (
        _MADE
        | {"generator": _generator(sizes, _WIDE)}
        | ({"look_ahead_steps": sizes.knob} if sizes.knob else {})
        | more
    )


RULE, PRODUCTS, OUTER, MADE = "weights by a rule", "products of task gradients", "outer level", "generated tasks"
GROUPS = (RULE, PRODUCTS, OUTER, MADE)
_TERMS = {"knob": "Neumann terms", "values": (1, 3), "default": 3}
_TASKS = {"knob": "auxiliary tasks", "values": (2, 4), "default": 2, "tasks": True}
_SGD = optax.sgd(1e-2)
ROWS = {
    "stl": Row("stl", RULE),
    "equal": Row("equal", RULE),
    "fixed_weights": Row("fixed_weights", RULE, lambda sizes: {"weights": {"aux0": 0.5, "aux1": 0.1}}),
    "random_weights": Row("random_weights", RULE),
    "uncertainty": Row("uncertainty", RULE),
    "adaloss": Row("adaloss", RULE),
    "dwa": Row("dwa", RULE),
    "arml": Row("arml", PRODUCTS, **_TASKS),
    "ol_aux": Row("ol_aux", PRODUCTS, **_TASKS),
    "ol_aux, one step": Row("ol_aux", PRODUCTS, lambda sizes: {"form": "one_step"}),
    "cosine_similarity": Row("cosine_similarity", PRODUCTS, **_TASKS),
    "cosine_similarity, weighted": Row("cosine_similarity", PRODUCTS, lambda sizes: {"form": "weighted"}, **_TASKS),
    "gradnorm": Row("gradnorm", PRODUCTS, **_TASKS),
    "gradnorm, last layer": Row("gradnorm", PRODUCTS, lambda sizes: {"layer": lambda path: _last(path, sizes)}),
    "auxinash": Row("auxinash", PRODUCTS, **_TASKS),
    "auto_lambda": Row("auto_lambda", OUTER),
    "auxilearn": Row("auxilearn", OUTER, _terms, **_TERMS),
    "maoal": Row("maoal", OUTER, _terms, **_TERMS),
    "jtds": Row("jtds", OUTER, _terms, **_TERMS),
    "jtds, cg": Row(
        "jtds", OUTER, _steps(lambda n: implicit(cg(max_steps=n))), knob="CG steps", values=(2, 4), default=4
    ),
    "jtds, unrolled": Row(
        "jtds", OUTER, _steps(lambda n: unrolled(n, _SGD)), knob="unrolled steps", values=(2, 4), default=4
    ),
    "jtds, one_step": Row("jtds", OUTER, lambda sizes: {"hypergradient": one_step(_SGD)}),
    "n_jtds": Row(
        "n_jtds",
        OUTER,
        lambda sizes: _terms(sizes) | {"num_examples": sizes.meta, "ids": _ids},
        has_meta=True,
        replicas=False,
        **_TERMS,
    ),
    "grid_search": Row(
        "grid_search",
        OUTER,
        lambda sizes: {"candidates": [{"aux0": float(k), "aux1": 0.0} for k in range(sizes.knob)]},
        knob="candidates",
        values=(2, 4),
        default=5,
    ),
    "random_labels": Row("random_labels", MADE, lambda sizes: _MADE | {"num_classes": CLASSES, "ids": _ids}),
    "maxl": Row("maxl", MADE, _maxl(), knob="look-ahead steps", values=(1, 2), default=1, has_meta=True),
    "wamal": Row(
        "wamal", MADE, lambda sizes: _MADE | {"generator": _generator(sizes, _WIDE + 1, _weighted)}, has_meta=True
    ),
    "dtg_auxl": Row(
        "dtg_auxl",
        MADE,
        lambda sizes: _terms(sizes) | {"num_generated": _WIDE, "hidden": (sizes.meta,)},
        has_meta=True,
        replicas=False,
        **_TERMS,
    ),
    "rl_aux": Row(
        "rl_aux",
        MADE,
        lambda sizes: _MADE | {"generator": _generator(sizes, _WIDE), "num_rollouts": sizes.knob},
        knob="roll-outs",
        values=(2, 4),
        default=8,
        has_meta=True,
        replicas=False,
    ),
}


def _last(path: str, sizes: Sizes) -> bool:
    """Whether a leaf belongs to the trunk's last layer."""
    return ("trunk_1" if sizes.network == "mlp" else "trunk_conv_2") in path
