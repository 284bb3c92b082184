"""Solvers compiled once for all tests that use them with the same options and shapes."""

import functools

import jax


@functools.cache
def compiled(factory, **options):
    """`(matrix, b, init=None) -> (x, SolveInfo)`, jitted."""
    solve = factory(**options)
    return jax.jit(lambda matrix, b, init=None: solve(lambda x: matrix @ x, b, init=init))
