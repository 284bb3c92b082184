"""Products with Jacobians and Hessians, by forward and reverse passes or by reverse passes alone.

    J u     forward: one forward-mode pass      reverse: d/dc <J^T c, u>, a reverse pass of the reverse pass
    J^T c   one reverse pass
    H u     forward: forward over reverse       reverse: d/dx <grad f(x), u>

`jax.custom_vjp` operations have no forward mode. Reverse passes need their backward function to be differentiable in
reverse mode, no more.
"""

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from auxjax._internal import checks

MODES = ("forward", "reverse")


def check(where: str, products: str | None, *others) -> None:
    """Raises a ValueError unless `products` is one of `MODES` or of `others`."""
    checks.one_of(where, (*MODES, *others), products=products)


def jacobian_products(function: Callable, point, products: str) -> tuple:
    """`(function(point), push, pull)`, with `push(u) = J u` and `pull(c) = J^T c`.

    Cost: one evaluation; a pass for every product, and with reverse products two for a `push`.
    """
    if products == "reverse":
        value, pullback = jax.vjp(function, point)
        zero = jax.tree.map(jnp.zeros_like, value)

        def push(u):
            return jax.vjp(lambda c: pullback(c)[0], zero)[1](u)[0]

        return value, push, lambda c: pullback(c)[0]
    value, along = jax.linearize(function, point)
    require_forward_mode(along, point)
    transposed = jax.linear_transpose(along, point)

    def push(u):
        with explain_custom_vjp():
            return along(u)

    return value, push, lambda c: transposed(c)[0]


def hessian_product(gradient: Callable, point: tuple, products: str) -> tuple:
    """`(gradient(*point), product)`, with `product(u) = H u` for u like `point` and H symmetric.

    `gradient` returns a pytree like the tuple `point`.
    """
    if products == "reverse":
        return jax.vjp(gradient, *point)
    value, along = jax.linearize(gradient, *point)

    def product(u):
        with explain_custom_vjp():
            return along(*u)

    return value, product


@contextlib.contextmanager
def explain_custom_vjp():
    """Says what to do where a custom_vjp operation stops forward mode."""
    try:
        yield
    except TypeError as error:
        if "custom_vjp" not in str(error) or "products=" in str(error):
            raise
        raise TypeError(
            "A loss has an operation with jax.custom_vjp (attention kernel, quantiser), which has no forward mode. "
            "Take products by reverse passes alone: TaskModel(products='reverse') for a method; products='reverse' of "
            "implicit, one_step, unrolled, amortise, single_loop, gauss_newton or fisher for a hypergradient by itself."
        ) from error


def require_forward_mode(derivative: Callable, *point) -> None:
    """Raises the error of `explain_custom_vjp` where a derivative by a forward pass, being traced, cannot be computed.

    Inside of a jitted function JAX itself says so when the program is lowered, far from here. Cost: a trace of it.
    """
    if not checks.is_traced(jnp.zeros(())):
        return
    with explain_custom_vjp():
        if _stops(jax.make_jaxpr(derivative)(*point).jaxpr):
            raise TypeError("custom_vjp")


def _stops(jaxpr) -> bool:
    """Whether there is the derivative of a custom_vjp operation in the program."""
    for equation in jaxpr.eqns:
        inside = [
            part
            for value in equation.params.values()
            for part in jax.tree.leaves(value, is_leaf=lambda part: _program(part) is not None)
        ]
        if equation.primitive.name == "custom_lin" or any(_stops(_program(part)) for part in inside if _program(part)):
            return True
    return False


def _program(value):
    """The jaxpr that a parameter of an operation is, closed or not; `None` for any other."""
    found = getattr(value, "jaxpr", value)
    return found if hasattr(found, "eqns") else None
