"""A function whose roots and quotients have finite derivatives: 0 where theirs have none.

    d sqrt(x) = dx / (2 sqrt(x)),  0 at x = 0            d (a / b) = (da - a / b db) / b,  0 at b = 0

Reverse mode multiplies the infinite slope of a root at 0 with a factor that is 0 there, and gets NaN. What is computed
with a root at 0 mostly has a derivative all the same: Adam's m / (sqrt(v) + eps) at m = v = 0 has dm / eps, since m is
the factor of the root's slope; a norm that decides by `where` whether to clip has the one of the branch that is taken.
Both come out with any finite number in place of the infinite slope. Values, and derivatives elsewhere, are JAX's own.

Not for: roots and quotients inside loops and functions with derivatives of their own, which stay as they are; functions
that have no derivative at 0, such as a vector divided by its length.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.extend.core import Literal


def finite_slopes(function: Callable) -> Callable:
    """The function of pytrees of arrays, positional arguments only, with finite derivatives of roots and quotients.

    Cost: it is traced once more, and computes what it did.
    """

    def call(*arguments):
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        found = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(arguments))
        return jax.tree.structure(shapes).unflatten(found)

    return call


def _evaluate(jaxpr: Any, constants: Sequence, arguments: Sequence) -> list:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        found = _apply(equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(equation: Any, given: list) -> Sequence:
    primitive, params = equation.primitive, equation.params
    finite = _FINITE.get(primitive.name)
    if finite is not None and not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
        finite = None  # a quotient of integers
    if finite is None and primitive.name not in ("jit", "pjit", "cond"):
        found = primitive.bind(*given, **primitive.get_bind_params(params))
        return found if primitive.multiple_results else [found]
    arrays = [
        jnp.asarray(value, cast(Any, atom.aval).dtype) if isinstance(atom, Literal) else value
        for value, atom in zip(given, equation.invars, strict=True)
    ]
    if finite is not None:
        return [finite(*arrays)]
    if primitive.name == "cond":
        return jax.lax.switch(arrays[0], [partial(_branch, branch) for branch in params["branches"]], *arrays[1:])
    return _branch(params["jaxpr"], *arrays)


def _branch(closed: Any, *operands) -> list:
    return _evaluate(closed.jaxpr, closed.consts, operands)


@jax.custom_jvp
def _sqrt(x):
    return jnp.sqrt(x)


@_sqrt.defjvp
def _sqrt_jvp(primals, tangents):
    root = _sqrt(primals[0])
    return root, tangents[0] * jnp.where(root == 0, jnp.zeros_like(root), 0.5 / _nonzero(root))


@jax.custom_jvp
def _rsqrt(x):
    return jax.lax.rsqrt(x)


@_rsqrt.defjvp
def _rsqrt_jvp(primals, tangents):
    (x,) = primals
    slope = -0.5 * (_rsqrt(_nonzero(x)) / _nonzero(x))
    return _rsqrt(x), tangents[0] * jnp.where(x == 0, jnp.zeros_like(x), slope)


@jax.custom_jvp
def _divide(a, b):
    return a / b


@_divide.defjvp
def _divide_jvp(primals, tangents):
    (a, b), (da, db) = primals, tangents
    slope = da / _nonzero(b) + -db * a * jax.lax.integer_pow(_nonzero(b), -2)
    return _divide(a, b), jnp.where(b == 0, jnp.zeros_like(slope), slope)


def _nonzero(x):
    return jnp.where(x == 0, jnp.ones_like(x), x)


_FINITE = {"sqrt": _sqrt, "rsqrt": _rsqrt, "div": _divide}
