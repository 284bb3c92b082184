"""The refit of a run: what the run has learned, and the method that trains with it from scratch.

The weights of tasks are the means over the last tenth of the log, relative to the primary task's; those of the primary
task's training examples are the last ones, where they differ. Dev examples count 1. `+refit` takes the numbers, `+keep`
their order: the tasks and examples above a threshold count 1, the others 0. `auxjax.training.refit` has the formulas.

The weights lie in the method's state, so that one compiled step serves every method and every seed of a comparison, and
a checkpoint holds them.
"""

import pathlib
import zlib
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from auxjax import Method, methods
from auxjax.training import refit
from auxjax.training.parallel import place_state
from experiments.methods.labels import Label, text_of
from experiments.runtime import records

SMALLEST = 0.1  # of the primary task's weight: below, `+keep` drops a task where two or fewer give no threshold


class Learned(NamedTuple):
    """What a run has learned.

    Attributes:
      weights: `{task: weight}`, the primary task's 1 for a refit; for a selection, 1 or 0, and the share of the primary
        task's training examples that are kept.
      examples: `[n]`, of the primary pool's examples, dev behind train; `None` where the primary task's losses are not
        one per example of the pool.
    """

    weights: dict[str, float]
    examples: np.ndarray | None

    def checksum(self) -> int:
        """CRC-32 over all numbers."""
        examples = b"" if self.examples is None else self.examples.tobytes()
        return zlib.crc32(examples, zlib.crc32(repr(sorted(self.weights.items())).encode()))


def check(label: Label, method: Method) -> None:
    """Raises a ValueError for a method from which no weights of the model's tasks can be learned."""
    if method.weights is None or methods.info(label.name).family == "generated tasks":
        what = "has no weights" if method.weights is None else "makes its auxiliary task itself"
        raise ValueError(
            f"method {text_of(label)!r}: {label.name} {what}, so there are no weights of the model's tasks to train "
            f"with again. Leave +{label.then} out."
        )


def learned(directory: pathlib.Path, then: str, primary: str, labelled: np.ndarray, dev: int) -> Learned:
    """What a finished run has learned, from its files.

    Args:
      directory: folder of the run.
      then: "refit" for the weights, "keep" for the tasks and examples that stand out.
      primary: name of the primary task.
      labelled: bool `[n]`, which training examples of the primary pool show their label, dev left out.
      dev: dev examples behind them.

    Raises:
      FloatingPointError: the weights are not finite, or the primary task's are not positive.
    """
    log = records.read_lines(directory / "metrics.jsonl")
    last = log[-max(1, len(log) // 10) :]
    names = [name for name in last[-1] if name.startswith("weight/")]
    by_task = {name.removeprefix("weight/"): [line[name] for line in last] for name in names}
    with np.load(directory / "weights.npz") as arrays:
        found = arrays[f"weight/{primary}"] if f"weight/{primary}" in arrays.files else None
    try:
        weights = refit.relative_weights(by_task, primary)
        examples = None
        if found is not None:  # a run that trained on dev has weights of dev examples, too
            examples = refit.example_weights(found[: labelled.size], labelled=labelled, further=dev)
        return Learned(weights, examples) if then == "refit" else _selected(weights, examples, primary, labelled)
    except ValueError as error:
        raise FloatingPointError(f"There are no weights to train with again in {directory}: {error}") from error


def _selected(weights, examples, primary, labelled) -> Learned:
    """1 for the tasks and examples that stand out, 0 for the others."""
    tasks = [task for task in weights if task != primary]
    values = np.array([weights[task] for task in tasks])
    chosen = refit.kept(values) if len(tasks) > 2 else values > SMALLEST
    share = 1.0
    if examples is not None and labelled.any():
        shown = refit.kept_examples(examples[: labelled.size][labelled])
        examples[: labelled.size][labelled] = shown
        share = float(shown.mean())
    return Learned({primary: share} | dict(zip(tasks, map(float, chosen), strict=True)), examples)


def method_of(primary: str, tasks: tuple[str, ...], part: str | None, size: int | None) -> Method:
    """The method of a refit before it has its weights: all of them 1.

    Args:
      primary: name of the primary task.
      tasks: names of the auxiliary tasks.
      part: the part of a batch that shows the primary target, `None` where the batch has no parts.
      size: examples of the primary pool; `None` where they have no weights.
    """
    weights = {primary: 1.0 if size is None else np.ones(size)} | dict.fromkeys(tasks, 1.0)
    return methods.get("fixed_weights", weights=weights, ids=partial(_places, part))


def _places(part: str | None, batch):
    return (batch if part is None else batch[part])["index"]


def put_in(state, found: Learned, primary: str, mesh=None):
    """The training state of a refit's method, with what was learned in the place of the weights that are there."""
    given = found.weights | {primary: 1.0 if found.examples is None else found.examples}
    weights = {task: np.asarray(given[task], leaf.dtype) for task, leaf in state.method.items()}
    if mesh is not None:
        return place_state(state._replace(method=weights), mesh)
    return state._replace(method=jax.tree.map(jnp.array, weights))
