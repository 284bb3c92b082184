"""Lower levels whose batch is a stack of mini-batches: the mean problem, and products with one mini-batch at a time.

    inner(params, meta, stack) = mean_i inner(params, meta, stack[i]),      J = mean_i J_i

All solvers then solve with the mean matrix. `neumann(..., fresh_batches=True)` multiplies with one J_i per term
instead, which costs a mini-batch and, over independent mini-batches, has the mean of the full-batch series.

Not for: unrolling, which has `batches="stacked"` of its own.
"""

import dataclasses

import jax
import jax.numpy as jnp

from auxjax.hypergrad import problem as problems
from auxjax.solvers.base import Operator


def count_batches(where: str, stack) -> int:
    """The length of the stack.

    Raises:
      ValueError: no leaves, or leaves whose first axes differ.
    """
    shapes = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(stack)}
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) != 1 or lengths == {()} or lengths == {(0,)}:
        raise ValueError(
            f"{where}(batches='stacked'): inner_batch has leaves of shapes {shapes}; expected one first axis for all "
            "of them, the number of mini-batches."
        )
    return lengths.pop()[0]


def mean_problem(problem: problems.BilevelProblem) -> problems.BilevelProblem:
    """The problem whose lower level is the mean over a stack of mini-batches."""
    name = "inner" if problem.inner is not None else "update_field"
    function = getattr(problem, name)

    def mean(params, meta, stack):
        def alone(batch):
            return problems.split_aux(problem, name, function(params, meta, batch))[0]

        def average(leaf):
            return jnp.mean(leaf, axis=0) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf[0]

        values = jax.tree.map(average, jax.vmap(alone)(stack))
        return (values, ()) if problem.has_aux else values

    return dataclasses.replace(problem, **{name: mean})


def sampled_operator(problem, level, stack, mean: Operator, linearise, count: int) -> Operator:
    """The mean matrix, and its parts.

    Args:
      problem: with the lower level of one mini-batch.
      level: where it stands.
      stack: the mini-batches.
      mean: the mean matrix.
      linearise: `(problem, level, batch) -> (field, matvec, mixed)`.
      count: their number.
    """

    def entry(u, index):
        batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], stack)
        return linearise(problem, level, batch)[1](u)

    return dataclasses.replace(mean, entry=entry, count=count)
