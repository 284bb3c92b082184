"""Convolutions at full speed inside of loops on the CPU.

XLA's CPU compiler has fast kernels for convolutions whose channels come last. It brings others into that form, such as
the one that is the gradient in a kernel, but not inside of `scan`, `while_loop` and `cond`, where these run 10 to 30
times slower. So their transpositions are written into the program before XLA sees it.

Not for: programs that are differentiated afterwards, whose derivatives JAX writes by itself.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from jax.extend import core
from jax.extend.core.primitives import conv_general_dilated_p

LOOPS = ("scan", "while", "cond")
DEVICES = ("pmap", "shard_map", "xla_pmap")  # on each of them a program of its own; what it loops over is left as it is


def channels_last(body: Callable) -> Callable:
    """The body of a loop with all its convolutions channels last; same numbers.

    On other backends, and while jit is disabled, the function itself.

    Args:
      body: a function of pytrees of arrays, such as what `jax.lax.scan` repeats.
    """
    return _rewritten(body, in_loop=True)


def channels_last_in_loops(function: Callable) -> Callable:
    """A function that is about to be compiled, with the convolutions of its loops channels last; same numbers.

    Args:
      function: of pytrees of arrays.
    """
    return _rewritten(function, in_loop=False)


def _rewritten(function: Callable, *, in_loop: bool) -> Callable:
    @wraps(function)
    def run(*args, **named):
        without_jit = jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]
        if jax.default_backend() != "cpu" or without_jit:
            return function(*args, **named)
        # As one equation, that of a call, which is all that there is to evaluate: tracing does not take twice as long.
        closed, shapes = jax.make_jaxpr(jax.jit(function), return_shape=True)(*args, **named)
        evaluate = core.jaxpr_as_fun(core.ClosedJaxpr(_rewrite(closed.jaxpr, in_loop), closed.consts))
        return jax.tree.unflatten(jax.tree.structure(shapes), evaluate(*jax.tree.leaves((args, named))))

    return run


def _rewrite(jaxpr, in_loop: bool):
    """A jaxpr with other equations in place of its convolutions; itself if it has none."""
    if not has_convolution(jaxpr):
        return jaxpr
    return jaxpr.replace(eqns=[_of_equation(equation, in_loop) for equation in jaxpr.eqns])


def has_convolution(jaxpr) -> bool:
    """Whether a jaxpr has a convolution, nested calls and loops included."""
    return any(
        equation.primitive is conv_general_dilated_p
        or any(map(has_convolution, core.jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )


def _of_equation(equation, in_loop: bool):
    if equation.primitive is conv_general_dilated_p:
        return _transposed(equation) if in_loop else equation
    if equation.primitive.name in DEVICES:
        return equation
    in_loop = in_loop or equation.primitive.name in LOOPS
    return equation.replace(params={name: _of_param(value, in_loop) for name, value in equation.params.items()})


def _of_param(value: Any, in_loop: bool) -> Any:
    """A parameter of an equation, rewritten if it is a jaxpr, or a tuple with such."""
    if isinstance(value, core.ClosedJaxpr):
        return core.ClosedJaxpr(_rewrite(value.jaxpr, in_loop), value.consts)
    if isinstance(value, core.Jaxpr):
        return _rewrite(value, in_loop)
    if isinstance(value, tuple) and any(isinstance(part, core.ClosedJaxpr | core.Jaxpr) for part in value):
        parts: list[Any] = [_of_param(part, in_loop) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _transposed(equation):
    """The equation of a call that transposes, convolves with channels last, and transposes back."""
    numbers = equation.params["dimension_numbers"]
    rank = len(numbers.lhs_spec)
    spatial = tuple(range(1, rank - 1))
    last = (0, rank - 1, *spatial)  # where batch, channels and space are in [n, ..., c]
    kernel = (rank - 1, rank - 2, *range(rank - 2))  # where output and input channels are in [..., i, o]
    if (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) == (last, kernel, last):
        return equation
    params = equation.params | {"dimension_numbers": jax.lax.ConvDimensionNumbers(last, kernel, last)}

    def convolve(lhs, rhs):
        lhs = jax.lax.transpose(lhs, _channels_last(numbers.lhs_spec))
        rhs = jax.lax.transpose(rhs, (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]))
        out = conv_general_dilated_p.bind(lhs, rhs, **params)
        there = _channels_last(numbers.out_spec)
        return jax.lax.transpose(out, [there.index(place) for place in range(rank)])

    types = [_type_of(variable.aval) for variable in equation.invars]
    call = jax.make_jaxpr(jax.jit(convolve))(*types).eqns[0]
    return call.replace(invars=equation.invars, outvars=equation.outvars)


def _channels_last(spec):
    """The axes of an array with this specification in the order batch, space, channels."""
    return (spec[0], *spec[2:], spec[1])


def _type_of(aval) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an abstract value, and the device axes along which it varies."""
    varies = getattr(aval, "vma", None)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, **({"vma": varies} if varies else {}))
