"""What every linear solver shares: the system A x = b on pytrees, its checks, and the report on the solution.

    solve(matvec, b, *, init=None, key=None) -> (x, SolveInfo)

`matvec` is a linear function x -> A x of pytrees like `b`. With `damping` d the system solved is (A + d I) x = b. The
residual in `SolveInfo` is always that of A x = b itself, damping left out, so that solvers and dampings can be
compared by it. Solvers compute in at least float32 and return `x` in the dtypes of `b`.

Not for: rectangular systems.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.flatten_util import ravel_pytree

from auxjax._internal import checks, tree_math
from auxjax._internal.safe_math import positive_or_one
from auxjax.interface import Key, PyTree, Scalar


class SolveInfo(NamedTuple):
    """Report on one linear solve. All fields are scalar arrays.

    Attributes:
      relative_residual: `||b - A x|| / ||b||` of the returned `x`, without damping; 0 when b = 0.
      num_matvecs: int32, all products with A, those for the step size and for the residual included.
      converged: whether the system that was solved, damping included, has a relative residual of at most `rtol`.
      min_curvature: smallest Rayleigh quotient `<p, A p> / <p, p>` among the directions p the solver looked at. A
        negative one proves that A is not positive definite; a positive one proves nothing. 0 when b = 0.
    """

    relative_residual: jax.Array
    num_matvecs: jax.Array
    converged: jax.Array
    min_curvature: Scalar = 0.0


Matvec: TypeAlias = Callable[[PyTree], PyTree]  # a linear function x -> A x, plain or an `Operator`


class Solver(Protocol):
    """`(matvec, b, *, init=None, key=None) -> (x, SolveInfo)`, what `cg()` and the others make.

    A solver of one's own takes these arguments; it may use neither `init` nor `key`.
    """

    def __call__(
        self, matvec: Matvec, b: PyTree, /, *, init: PyTree = None, key: Key | None = None
    ) -> tuple[PyTree, SolveInfo]:
        """An approximate solution of `A x = b`, a pytree like `b`, and the report on it."""
        ...


class Preparation(Protocol):
    """`(matvec, b, previous, key) -> prepared`, what `power_iteration()` and `nystrom_preparation(...)` make."""

    def __call__(self, matvec: Matvec, b: PyTree, previous: PyTree, key: Any, /) -> PyTree:
        """What serves several solves, a pytree of arrays.

        `previous` is what was made last, or `None`. `key` is a typed PRNG key or `None`, which some refuse: no one type
        of it would do for all.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Operator:
    """A matrix with what a solver cannot see from its products; called, it multiplies. Plain functions do as well.

    Attributes:
      matvec: `x -> A x`.
      averages: a mean over replicas is taken inside, which JAX's transpose of `matvec` would leave out.
      entry: `(x, index) -> A_index x`, where A is the mean of several matrices, such as those of mini-batches.
      count: number of matrices that A is the mean of.
      transpose: `x -> A^T x`, with the mean over replicas inside if `matvec` has one; `None` for JAX's transpose of
        `matvec`.
      symmetric: True for a matrix known to be its own transpose (a Hessian), False for one known not to be (the
        Jacobian of an update field), which solvers for symmetric matrices refuse; `None` where nobody knows.
    """

    matvec: Matvec
    averages: bool = False
    entry: Callable[[PyTree, Any], PyTree] | None = None
    count: int = 1
    transpose: Matvec | None = None
    symmetric: bool | None = None

    def __call__(self, x):
        return self.matvec(x)


class System(NamedTuple):
    """One linear system in the solver's precision: one dtype, at least float32, for all leaves.

    Attributes:
      matvec: `x -> A x`, undamped, in the precision of `b`.
      b: right-hand side.
      start: initial guess in the precision of `b`, or `None` for zero.
      norm: `||b||`, constant under differentiation.
      restore: casts a solution to the dtypes of the right-hand side that came in.
      entry: `(x, index) -> A_index x` of an `Operator` that is a mean, else `None`.
      count: number of its matrices, 1 for any other.
      transpose: `x -> A^T x` in the precision of `b`, where an `Operator` gives it, else `None`.
      vector: a pytree like the right-hand side that came in to a vector as this system has them.
      tree: the reverse.
    """

    matvec: Matvec
    b: PyTree
    start: PyTree
    norm: jax.Array
    restore: Matvec
    entry: Callable[[PyTree, Any], PyTree] | None = None
    count: int = 1
    transpose: Matvec | None = None
    vector: Callable[[PyTree], PyTree] = lambda tree: tree
    tree: Callable[[PyTree], PyTree] = lambda tree: tree


def make_system(where: str, matvec: Matvec, b: PyTree, init: PyTree, key: Key | None) -> System:
    """Checks the arguments of a solve and casts them to at least float32.

    Args:
      where: name of the solver, for messages.
      matvec: linear function of pytrees like `b`.
      b: pytree of floating arrays.
      init: pytree like `b`, or `None`.
      key: typed PRNG key, or `None`.

    Raises:
      TypeError: `matvec` is not a function, `key` is an old-style key, or `b` has leaves that are not real floats.
      ValueError: `b` has no leaves, or `init`, `matvec(b)` or `matvec.transpose(b)` has another structure or other
        shapes than `b`.
    """
    checks.function(f"{where} solve", "a function x -> A x", matvec=matvec)
    if key is not None:
        checks.key(f"{where} solve", key)
    b = checks.floating(f"{where} solve(b=)", b)
    checks.like(f"{where} solve(matvec=) returned a pytree that", jax.eval_shape(matvec, b), b, "b")
    high = _differentiated_as_one(tree_math.upcast(b))
    start = None
    if init is not None:
        checks.like(f"{where} solve(init=)", init, b, "b")
        start = tree_math.cast_like(jax.tree.map(jnp.asarray, init), high)

    def in_high(function):
        return lambda x, *index: tree_math.cast_like(function(tree_math.cast_like(x, b), *index), high)

    norm = jax.lax.stop_gradient(tree_math.norm(high))
    if start is not None:  # the solution for b = 0 is 0, wherever the last one was; nor is NaN a start
        usable = (norm != 0) & tree_math.all_finite(start)
        start = tree_math.select(usable, start, jax.tree.map(jnp.zeros_like, start))
    entry, count, transpose = None, 1, None
    if isinstance(matvec, Operator):
        if matvec.entry is not None:
            entry, count = in_high(matvec.entry), matvec.count
        if matvec.transpose is not None:
            answer = jax.eval_shape(matvec.transpose, b)
            checks.like(f"{where} solve(matvec=): its transpose returned a pytree that", answer, b, "b")
            transpose = in_high(matvec.transpose)
    return System(in_high(matvec), high, start, norm, lambda x: tree_math.cast_like(x, b), entry, count, transpose)


def as_vectors(system: System) -> System:
    """The system with one array `[n]` in the place of its leaves on a CPU; elsewhere the system itself.

    Iterations then are a few kernels per step and not a few per leaf and step, which take long to compile. A product
    copies its argument and its answer once more. Not on accelerators, where params may be split over devices.
    """
    explicit = jax.sharding.get_abstract_mesh().explicit_axes  # leaves that are split differently do not join
    if jax.default_backend() != "cpu" or len(jax.tree.leaves(system.b)) == 1 or explicit:
        return system
    b, tree = ravel_pytree(system.b)

    def vector(x):
        return ravel_pytree(x)[0]

    def of_vectors(function):
        return function and (lambda x, *index: vector(function(tree(x), *index)))

    return System(
        matvec=of_vectors(system.matvec),
        b=b,
        start=None if system.start is None else vector(system.start),
        norm=system.norm,
        restore=lambda x: system.restore(tree(x)),
        entry=of_vectors(system.entry),
        count=system.count,
        transpose=of_vectors(system.transpose),
        vector=vector,
        tree=tree,
    )


@jax.custom_jvp
def _differentiated_as_one(tree):
    """The tree itself, whose leaves all have tangents if one has: `custom_linear_solve` fails where only some have."""
    return tree


def _differentiated_as_one_jvp(primals, tangents):
    absent = lambda tangent: isinstance(tangent, SymbolicZero)  # noqa: E731
    present = [tangent for tangent in jax.tree.leaves(tangents[0], is_leaf=absent) if not absent(tangent)]
    zero = 0.0 * jnp.sum(present[0])  # a function of a tangent, or it would be taken for none again
    filled = [jnp.broadcast_to(zero, t.shape) if absent(t) else t for t in jax.tree.leaves(tangents[0], is_leaf=absent)]
    return primals[0], jax.tree.unflatten(jax.tree.structure(primals[0]), filled)


_differentiated_as_one.defjvp(_differentiated_as_one_jvp, symbolic_zeros=True)


def require_symmetric(where: str, matvec: Matvec) -> None:
    """Raises ValueError for an `Operator` that is known not to be symmetric; plain functions pass.

    Args:
      where: name of the solver, for messages.
      matvec: what the solver was given.
    """
    if isinstance(matvec, Operator) and matvec.symmetric is False:
        raise ValueError(
            f"{where} solve(matvec=): expected a symmetric matrix, got one with symmetric=False, as the Jacobian of an "
            "update field has; use gmres, bicgstab, normal_cg, dense or neumann. If the field is the gradient of some "
            "function, say so: BilevelProblem(update_field=, symmetric=True)."
        )


def residual(system: System, x, damping: float):
    """Residual of the damped system and the undamped product: `(b - A x - damping x, A x)`. Cost: one product."""
    product = system.matvec(x)
    plain = tree_math.add_scaled(system.b, -1.0, product)
    return (tree_math.add_scaled(plain, -damping, x) if damping else plain), product


def relative(system: System, size: jax.Array) -> jax.Array:
    """`size / ||b||`, and 0 when b = 0."""
    zero = system.norm == 0
    return jnp.where(zero, jnp.zeros_like(size), size / jnp.where(zero, jnp.ones_like(size), system.norm))


def rayleigh(x, product) -> jax.Array:
    """Rayleigh quotient `<x, A x> / <x, x>`, and 0 when x = 0; safe against underflow of the squares."""
    size = tree_math.norm(x)
    safe = positive_or_one(size)
    direction = tree_math.scale(1.0 / safe, x)
    return tree_math.vdot(direction, product) / safe


def report(system: System, x, damping: float, rtol: float, num_matvecs, min_curvature=None) -> SolveInfo:
    """Measures a solution with one product and reports on it; `num_matvecs` are those before."""
    left, product = residual(system, x, damping)
    plain = tree_math.add_scaled(system.b, -1.0, product)
    solved = relative(system, tree_math.norm(left))
    seen = rayleigh(x, product)
    return make_info(
        relative(system, tree_math.norm(plain)),
        jnp.asarray(num_matvecs, jnp.int32) + jnp.int32(1),
        solved <= rtol,
        seen if min_curvature is None else jnp.minimum(seen, min_curvature),
    )


def make_info(relative_residual, num_matvecs, converged, min_curvature) -> SolveInfo:
    """A `SolveInfo` of constants: reports are not differentiated."""
    info = SolveInfo(relative_residual, jnp.asarray(num_matvecs, jnp.int32), converged, min_curvature)
    return jax.tree.map(jax.lax.stop_gradient, info)
