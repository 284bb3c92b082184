"""For the adaptors to JAX libraries: a `run` around a compiled hypergradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def runner(problem, hypergradient: Callable, *, warm: bool = False, num_products=None):
    """`(run, num_products)` of an entry.

    Args:
      problem: where to start.
      hypergradient: `(inner, outer, params, meta, start) -> (gradient in meta, solution, number of products)`, where
        the losses are `(params, meta) -> scalar` and `start` is an approximate solution of H u = d outer / d params.
        It is compiled once; the batches are arguments of the compiled function, not constants. What is not known of
        solution and number may be `None`.
      warm: hand the last solution to the next run; otherwise `start` is always `None`.
      num_products: what to tell; by default what `hypergradient` tells.
    """
    jax.config.update("jax_enable_x64", problem.precision == "float64")
    batches = jax.device_put((problem.inner_batch, problem.outer_batch))
    here = jax.device_put((problem.params, problem.meta))
    losses = problem.inner, problem.outer
    last = {"start": None, "products": None}

    @jax.jit
    def compiled(params, meta, inner_batch, outer_batch, start):
        inner, outer = losses
        return hypergradient(
            lambda params, meta: inner(params, meta, inner_batch),
            lambda params, meta: outer(params, meta, outer_batch),
            params,
            meta,
            start,
        )

    def run(problem=None, restart: bool = False):
        params, meta = here if problem is None else (problem.params, problem.meta)
        start = None
        if warm:
            cold = restart or last["start"] is None
            start = jax.tree.map(np.zeros_like, params) if cold else last["start"]
        gradient, solution, last["products"] = compiled(params, meta, *batches, start)
        if warm:
            last["start"] = solution
        return jax.tree.map(np.asarray, gradient)

    def products():
        return None if last["products"] is None else int(last["products"])

    return run, products if num_products is None else num_products


def norm(tree) -> jax.Array:
    """Euclidean norm of a pytree."""
    return jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)))


def size(tree) -> int:
    """Number of numbers in a pytree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
