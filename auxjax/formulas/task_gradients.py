"""Inner products between the gradients of many tasks, without forming the gradients.

At one point of the parameters there are K + 1 losses with gradients g_0, ..., g_K. Methods compare them:

    <g_k, d> for all k     the derivative of the vector of losses along d: one forward-mode pass      `products`
    sum_k w_k g_k          the vector of losses pulled back: one reverse pass                         `combine`
    <g_j, g_k>             the whole Gram matrix: K + 1 reverse and as many forward-mode passes,
                           in chunks, so that only a chunk of gradients is in memory                  `gram_matrix`
    ||g_k||^2              its diagonal: K + 1 reverse passes, in chunks                              `squared_norms`

The first two do not grow with K, and serve ARML, OL_AUX and the sign test of gradient cosine similarity. The others do,
and serve where single norms are needed: GradNorm, the cosine itself, Nash bargaining. All can be had per module, a
module being a group of leaves.

Gradients are compared on the trunk, the leaves all tasks share: the others' gradients in one task's head are zero.

Not for: gradients of single examples, and second derivatives.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from auxjax._internal import linear_maps
from auxjax._internal.precision import accumulation_dtype
from auxjax.formulas.partition import Modules, partition


class TaskGradients(NamedTuple):
    """The gradients of K + 1 losses at one point, as two linear maps. Its functions belong inside one trace.

    A direction is a list of leaves, those of `params` that `trunk` chooses, in their order.

    Attributes:
      losses: `[K + 1]`.
      products: `direction -> [K + 1]`, `<g_k, direction>` for every task; one forward-mode pass.
      combine: `[K + 1] -> direction`, `sum_k w_k g_k`; one reverse pass.
      merge: `direction -> params`, with the direction's leaves in the place of the trunk's.
    """

    losses: jax.Array
    products: Callable[[Sequence], jax.Array]
    combine: Callable[[jax.Array], list]
    merge: Callable[[Sequence], Any]


def task_gradients(
    losses_fn: Callable,
    params,
    *,
    trunk=None,
    reduce: Callable = lambda tree: tree,
    where: str = "task_gradients",
    products: str = "forward",
) -> TaskGradients:
    """Linearises a vector of losses once, for any number of products with its gradients.

    Args:
      losses_fn: function of `params` to `[K + 1]` losses, by custom the primary one first.
      params: pytree.
      trunk: pytree of bools like `params` or a prefix of it; only chosen leaves take part, the others are held fixed.
        None: all floating-point leaves.
      reduce: pytree -> pytree, the mean over replicas that each see a part of the batch, applied to losses, products
        and combinations; the identity everywhere but inside a pmapped step.
      where: the name that error messages give the caller.
      products: "forward", or "reverse" for losses with `jax.custom_vjp` operations: `<g_k, d>` is then the derivative
        of `<sum_k w_k g_k, d>` in w, two reverse passes.

    Returns:
      `TaskGradients(losses, products, combine, merge)`.

    Raises:
      TypeError: `losses_fn` does not return floating point, or `trunk` is not made of bools.
      ValueError: `losses_fn` does not return a vector, or `trunk` chooses nothing.

    Cost: one evaluation of the losses. Under jit the linearisation compiles to what a vjp and a jvp compile to.
    """
    linear_maps.check(where, products)
    losses_of, selected, merge = on_trunk(where, losses_fn, params, trunk)
    losses, push, pull = linear_maps.jacobian_products(losses_of, selected, products)

    def products_along(direction):
        along = [jnp.asarray(step).astype(leaf.dtype) for step, leaf in zip(direction, selected, strict=True)]
        return reduce(push(along))

    def combine(weights):
        return reduce(pull(weights.astype(losses.dtype)))

    return TaskGradients(reduce(losses), products_along, combine, merge)


def squared_norms(tasks: TaskGradients, *, modules: Modules | None = None, chunk: int = 8) -> jax.Array:
    """`||g_k||^2` of every task.

    Args:
      tasks: from `task_gradients`.
      modules: group the trunk's leaves: from `auxjax.formulas.partition.modules_by_path`, with the same trunk.
      chunk: gradients that are in memory at a time.

    Returns:
      `[K + 1]`, or `[M, K + 1]` with modules, accumulated in at least float32.

    Cost: K + 1 reverse passes.
    """

    def of_chunk(basis):
        gradients = jax.vmap(tasks.combine)(basis)
        return jax.vmap(lambda gradient: _squares(gradient, modules))(gradients)

    found = _in_chunks(of_chunk, tasks, chunk)
    return found if modules is None else found.T


def gram_matrix(tasks: TaskGradients, *, modules: Modules | None = None, chunk: int = 8) -> jax.Array:
    """`<g_j, g_k>` of every pair of tasks.

    Args:
      tasks: from `task_gradients`.
      modules: as in `squared_norms`; the sum over modules is the matrix without.
      chunk: gradients that are in memory at a time.

    Returns:
      `[K + 1, K + 1]`, or `[M, K + 1, K + 1]` with modules.

    Cost: K + 1 reverse passes and as many forward-mode ones, times M with modules.
    """

    def of_chunk(basis):
        gradients = jax.vmap(tasks.combine)(basis)
        if modules is None:
            return jax.vmap(tasks.products)(gradients)
        return jax.vmap(partial(module_products, tasks, modules=modules))(gradients)

    found = _in_chunks(of_chunk, tasks, chunk)
    found = found if modules is None else jnp.moveaxis(found, 0, 1)
    return (found + jnp.swapaxes(found, -1, -2)) / 2


def module_products(tasks: TaskGradients, direction: Sequence, modules: Modules) -> jax.Array:
    """`<g_k, d>` restricted to each module's leaves.

    Args:
      tasks: from `task_gradients`.
      direction: list of leaves, such as `tasks.combine(...)`.
      modules: from `auxjax.formulas.partition.modules_by_path`, with the same trunk.

    Returns:
      `[M, K + 1]`. Cost: M forward-mode passes.
    """
    pick = jnp.eye(len(modules.names), dtype=tasks.losses.dtype)

    def product(row):
        return tasks.products(scale_modules(direction, row, modules))

    return jax.vmap(product)(pick)


def scale_modules(direction: Sequence, factors: jax.Array, modules: Modules) -> list:
    """The direction with every leaf multiplied by its module's factor.

    Args:
      direction: list of leaves.
      factors: `[M]`.
      modules: which leaf is in which module.
    """
    return [leaf * factors[index].astype(leaf.dtype) for leaf, index in zip(direction, modules.of_leaf, strict=True)]


def _squares(gradient: Sequence, modules: Modules | None) -> jax.Array:
    dtype = accumulation_dtype(gradient)
    squares = [jnp.sum(jnp.square(leaf.astype(dtype))) for leaf in gradient]
    if modules is None:
        return jnp.sum(jnp.stack(squares))
    return jnp.zeros((len(modules.names),), dtype).at[jnp.array(modules.of_leaf)].add(jnp.stack(squares))


def _in_chunks(of_chunk: Callable, tasks: TaskGradients, chunk: int) -> jax.Array:
    """`of_chunk(rows of the identity)`, a few rows at a time, in straight-line code.

    Written out and not looped: convolutions in loops are slow on the CPU, and a chunk is one batched program.
    """
    if chunk < 1:
        raise ValueError(f"gradients in chunks of chunk={chunk}; expected at least 1 at a time.")
    count = tasks.losses.shape[0]
    basis = jnp.eye(count, dtype=tasks.losses.dtype)
    return jnp.concatenate([of_chunk(basis[start : start + chunk]) for start in range(0, count, chunk)])


def on_trunk(where: str, losses_fn: Callable, params, trunk):
    """The losses as a function of the chosen leaves, these leaves, and the function that puts leaves in their place."""
    if trunk is None:
        trunk = jax.tree.map(lambda leaf: bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating)), params)
    selected, merge = partition(params, trunk)

    def losses_of(leaves):
        losses = losses_fn(merge(leaves))
        shape = getattr(losses, "shape", None)
        if shape is None or len(shape) != 1:
            got = f"shape {shape}" if shape is not None else f"a {type(losses).__name__}"
            raise ValueError(
                f"{where}(losses_fn) returns {got}; expected a vector of scalar losses, the primary one first. "
                "Use jnp.stack([primary, first_auxiliary, ...])."
            )
        if not jnp.issubdtype(losses.dtype, jnp.floating):
            raise TypeError(f"{where}(losses_fn) returns dtype {losses.dtype}; expected floating point.")
        return losses

    return losses_of, [jnp.asarray(leaf) for leaf in selected], merge
