"""What a problem is, and how it travels between processes: one .npz file, read with NumPy alone."""

import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

_TREES = ("params", "meta", "inner_batch", "outer_batch", "reference")


class LeftOut(Exception):  # noqa: N818 (not a failure: a measurement that is left out, with the reason)
    """A problem or an entry that cannot be measured here; the message says why and what to do about it."""


class Problem(NamedTuple):
    """A bilevel problem at the point where its hypergradient is needed.

    Attributes:
      name: `"hypercleaning-small"`, ...
      kind: which losses: `"ridge"`, `"hypercleaning"`, `"logistic"`, `"quadratics"`, `"data_cleaning"`, `"convnet"`.
      size: `"small"`, `"large"`, the corruption, or `""`.
      precision: `"float32"` or `"float64"`, the type of all floating arrays but `reference`.
      params: inner variables, `{name: array}`.
      meta: outer variables.
      inner_batch: data of the inner loss.
      outer_batch: data of the outer loss.
      constants: numbers that the losses need.
      reference: float64 hypergradient at exactly these (rounded) arrays, like `meta`.
      facts: what is known about the problem: `num_params`, `num_meta`, `lambda_min`, `lambda_max`, `condition` of the
        Hessian, `inner_grad_norm`, and `step`, the step size that methods get which need one by hand.
    """

    name: str
    kind: str
    size: str
    precision: str
    params: dict
    meta: dict
    inner_batch: dict
    outer_batch: dict
    constants: dict
    reference: dict
    facts: dict

    @property
    def inner(self):
        """The inner loss in JAX, `(params, meta, batch) -> scalar`."""
        return _losses(self)[0]

    @property
    def outer(self):
        """The outer loss in JAX, `(params, meta, batch) -> scalar`."""
        return _losses(self)[1]

    def cast(self, precision: str) -> "Problem":
        """The same problem with floating arrays of another type (the same numbers, if that is the wider one)."""
        trees = {name: _cast(getattr(self, name), precision) for name in _TREES if name != "reference"}
        return self._replace(precision=precision, **trees)


class Sequence(NamedTuple):
    """A run of the outer level: one problem, and the points it went through.

    Attributes:
      problem: the first point; batches, constants and losses are those of all points.
      params: `{name: [T, ...]}`, the lower level solved at every point, in the problem's precision.
      meta: `{name: [T, ...]}`.
      reference: `{name: [T, ...]}`, float64.
      facts: how it was made.
    """

    problem: Problem
    params: dict
    meta: dict
    reference: dict
    facts: dict

    @classmethod
    def of(cls, points: list[Problem], facts: dict) -> "Sequence":
        """The sequence of some points with the same data."""
        trees = {
            name: {key: np.stack([getattr(point, name)[key] for point in points]) for key in getattr(points[0], name)}
            for name in ("params", "meta", "reference")
        }
        return cls(points[0], **trees, facts=facts)

    def __len__(self) -> int:
        return len(next(iter(self.meta.values())))

    def at(self, t: int) -> Problem:
        """The problem at point t."""
        trees = {name: {key: leaf[t] for key, leaf in getattr(self, name).items()} for name in _TREES[:2]}
        return self.problem._replace(reference={key: leaf[t] for key, leaf in self.reference.items()}, **trees)


def _losses(problem: Problem):
    from benchmarks.hypergradients.problems import losses

    return losses.get(problem.kind, problem.constants)


def _cast(tree: dict, precision: str) -> dict:
    return {
        key: leaf.astype(precision) if np.issubdtype(leaf.dtype, np.floating) else leaf for key, leaf in tree.items()
    }


def save(problem: Problem | Sequence, path) -> None:
    """Writes a problem or a sequence to one file, at once or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {}
    if isinstance(problem, Sequence):
        for name in ("params", "meta", "reference"):
            arrays |= {f"sequence/{name}/{key}": leaf for key, leaf in getattr(problem, name).items()}
        arrays["sequence/facts"] = np.asarray(json.dumps(problem.facts))
        problem = problem.problem
    for name in _TREES:
        arrays |= {f"{name}/{key}": leaf for key, leaf in getattr(problem, name).items()}
    words = {name: getattr(problem, name) for name in Problem._fields if name not in _TREES}
    arrays["words"] = np.asarray(json.dumps(words))
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(partial, "wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)


def is_sequence(path) -> bool:
    """Whether the file holds a sequence, by its name."""
    return pathlib.Path(path).name.startswith(("sequence", "sweep"))


def load(path) -> Problem:
    """Reads a problem, or the first point of a sequence."""
    with np.load(path) as file:
        return _problem(file)


def load_sequence(path) -> Sequence:
    """Reads a sequence."""
    with np.load(path) as file:
        trees = {name: _tree(file, f"sequence/{name}/") for name in ("params", "meta", "reference")}
        return Sequence(_problem(file), **trees, facts=json.loads(str(file["sequence/facts"])))


def _problem(file) -> Problem:
    words: dict[str, Any] = json.loads(str(file["words"]))
    return Problem(**words, **{name: _tree(file, f"{name}/") for name in _TREES})


def _tree(file, prefix: str) -> dict:
    return {key[len(prefix) :]: file[key] for key in file.files if key.startswith(prefix)}
