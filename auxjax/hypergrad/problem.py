"""Bilevel problems, and what every hypergradient estimator needs of them.

    min over meta of  outer(params*(meta), meta)      where      field(params*(meta), meta) = 0

The lower level is given by the loss `inner` that it minimises, field = d inner / d params, or by the `update_field`
that its optimiser follows, which need not be the gradient of anything (weights per module, gated or stop-gradiented
updates): its Jacobian J = d field / d params is then not symmetric.

Not for: solving the lower level. `params` come from the caller's own training loop.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from auxjax._internal import checks, linear_maps, roles, tree_math
from auxjax.formulas.partition import checked_mask, partition
from auxjax.interface import Key, PyTree, Scalar
from auxjax.solvers.base import Matvec, SolveInfo

Loss: TypeAlias = Callable[[PyTree, PyTree, PyTree], PyTree]  # (params, meta, batch) -> scalar, or (scalar, aux)
Field: TypeAlias = Callable[[PyTree, PyTree, PyTree], PyTree]  # (params, meta, batch) -> a pytree like params


@dataclasses.dataclass(frozen=True, kw_only=True)
class BilevelProblem:
    """A bilevel problem: an inner loss or an update field, and an outer loss.

    Attributes:
      inner: `(params, meta, batch) -> scalar`, the loss that `params` minimise. Its mixed derivative is taken by a
        forward pass through the loss; losses with `jax.custom_vjp` functions need `products="reverse"`.
      update_field: `(params, meta, batch) -> pytree like params`, the direction whose negative the lower level follows,
        zero at its fixed point. Exactly one of `inner` and `update_field`.
      symmetric: whether the Jacobian of `update_field` is symmetric, as it is where the field is the gradient of some
        function. It is taken at its word: solvers for symmetric matrices then take the field too. The Hessian of an
        `inner` loss always is.
      outer: `(params, meta, batch) -> scalar`, the loss that `meta` minimise.
      curvature: a matrix that stays positive far from a minimum, for `implicit(solver, curvature="problem")`, such as
        `gauss_newton(outputs, loss)`; `None` where nobody knows one.
      mask: which leaves of `params` take part: a predicate on the path of a leaf, such as
        `lambda path: "trunk" in path`, a pytree of bools like `params` or a prefix of it, or `None` for all. The others
        are held fixed, as if the lower level did not train them.
      has_aux: whether the functions given return a pair `(value, aux)`, as training losses with metrics or model state
        do. The outer loss's `aux` is in `HypergradInfo.aux`; the lower level's is dropped, so that computing a
        hypergradient changes no model state.
      reduce: pytree -> pytree like it, the mean over replicas where each sees a part of the batch, for instance
        `lambda tree: jax.lax.pmean(tree, "device")` in a pmapped step. It is applied to every gradient, inside every
        matrix-vector product and to the mixed derivative: all replicas then solve the one global system. Under jit
        with sharded arrays, and on one device, leave it `None`: the losses are means over the global batch already.
      products: how products with Jacobians are taken. "forward": by forward passes where these are cheaper. "reverse":
        by reverse passes alone, for losses with `jax.custom_vjp` functions (attention kernels, quantisers), which have
        no forward mode and whose backward functions can be differentiated. Estimators have that option, too.

    Raises:
      TypeError: an attribute is not a function.
      ValueError: both or none of `inner` and `update_field`; other `products`.

    Batches are any pytrees, or `None` for problems that carry their own data.
    """

    inner: Loss | None = None
    update_field: Field | None = None
    outer: Loss
    mask: Callable[[str], object] | PyTree = None
    has_aux: bool = False
    reduce: Callable[[PyTree], PyTree] | None = None
    symmetric: bool = False
    products: str = "forward"
    curvature: "Curvature | None" = None

    def __post_init__(self):
        if (self.inner is None) == (self.update_field is None):
            got = "none" if self.inner is None else "both"
            raise ValueError(
                f"BilevelProblem got {got} of inner= and update_field=; expected exactly one. Give inner=, a scalar "
                "loss, or update_field=, the direction of the lower level's update, if that is not a gradient."
            )
        for name in ("has_aux", "symmetric"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"BilevelProblem({name}=): expected True or False, got {type(value).__name__}.")
        functions = {name: getattr(self, name) for name in ("inner", "update_field", "reduce")}
        given = {name: value for name, value in functions.items() if value is not None}
        checks.function("BilevelProblem", **given, outer=self.outer)
        if self.curvature is not None:
            expected = "gauss_newton(...), fisher(...) or None"
            roles.curvature("BilevelProblem", expected, curvature=self.curvature)
        linear_maps.check("BilevelProblem", self.products)


class HypergradInfo(NamedTuple):
    """How good a hypergradient is. Everything but `solution` is a scalar array.

    Attributes:
      relative_residual: `||v - J^T u|| / ||v||` with v the outer gradient in `params`, u the `solution` and J undamped;
        0 when v = 0.
      num_matvecs: int32, products with J^T.
      converged: whether the solver reached its `rtol` on the system it solved, damping included.
      direct_norm: norm of the outer loss's own gradient in `meta`.
      implicit_norm: norm of the part that passes through `params`.
      inner_grad_norm: norm of the field; the hypergradient is exact where it is zero.
      solution: u, a pytree like `params`; pass it as `init` to start the next solve from it.
      min_curvature: smallest Rayleigh quotient of J^T that the solver met; negative far from a minimum.
      outer_loss: the outer loss where its gradient was taken.
      aux: what the outer loss returned beside its value, with `has_aux`; `()` without. Not averaged over replicas.
    """

    relative_residual: jax.Array
    num_matvecs: jax.Array
    converged: jax.Array
    direct_norm: jax.Array
    implicit_norm: jax.Array
    inner_grad_norm: jax.Array
    solution: PyTree
    min_curvature: Scalar = 0.0
    outer_loss: Scalar = 0.0
    aux: PyTree = ()


class Estimator(Protocol):
    """`(problem, params, meta, inner_batch, outer_batch, *, key=None, init=None) -> (meta_grad, HypergradInfo)`.

    What `implicit(...)`, `one_step(...)` and the others make. One of one's own takes these arguments; it may use
    neither `key` nor `init`.
    """

    def __call__(
        self,
        problem: BilevelProblem,
        params: PyTree,
        meta: PyTree,
        inner_batch: PyTree,
        outer_batch: PyTree,
        /,
        *,
        key: Key | None = None,
        init: PyTree = None,
    ) -> tuple[PyTree, HypergradInfo]:
        """The hypergradient, a pytree like `meta`, and the report on it."""
        ...


class OuterValue(NamedTuple):
    """The outer loss at one point: its gradients in `theta` and, at fixed params, in `meta`, its value and its aux."""

    v: PyTree
    direct: PyTree
    loss: jax.Array
    aux: PyTree


class Level(NamedTuple):
    """A problem at one point, as a function of the floating leaves of `params` alone.

    Attributes:
      theta: `params` with `None` in place of every leaf that is not floating (counters, keys) or masked out.
      meta: outer variables as arrays.
      merge: puts the leaves of such a tree back into `params`.
      reduce: the problem's reduction, the identity by default.
      products: as the problem has it.
    """

    theta: PyTree
    meta: PyTree
    merge: Callable[[PyTree], PyTree]
    reduce: Callable[[PyTree], PyTree]
    products: str = "forward"


class Curvature(Protocol):
    """`(level, inner_batch) -> matvec`, what `gauss_newton(...)` and `fisher(...)` make."""

    def __call__(self, level: Level, inner_batch: PyTree, /) -> Matvec:
        """The product with the matrix that takes the place of J^T: an `Operator`, or a plain function."""
        ...


def make_level(where: str, problem: BilevelProblem, params, meta) -> Level:
    """Checks `problem`, `params` and `meta`, and separates what can be differentiated from what cannot.

    Raises:
      TypeError: no `BilevelProblem`; complex params; a leaf of `meta` that is not floating.
      ValueError: nothing floating in `params` or nothing at all in `meta`.
    """
    if not isinstance(problem, BilevelProblem):
        raise TypeError(f"{where}: expected a BilevelProblem first, got {type(problem).__name__}.")
    for path, leaf in jax.tree.leaves_with_path(meta):
        if not _is_float(leaf):
            raise TypeError(
                f"{where}: meta has a leaf of type {_describe(leaf)} at {jax.tree_util.keystr(path)!r}; outer "
                "variables are floating arrays. Close over what is not to be differentiated, or put it in the batch."
            )
    taking_part = jax.tree.map(lambda _: True, params)
    if problem.mask is not None:
        mask = checked_mask("BilevelProblem(mask=)", params, problem.mask)
        chosen, put_back = partition(jax.tree.map(lambda _: False, params), mask)
        taking_part = put_back([True] * len(chosen))
    for (path, leaf), part in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(taking_part), strict=True):
        if part and jnp.issubdtype(_dtype(leaf), jnp.complexfloating):
            raise TypeError(
                f"{where}: params have a complex leaf at {jax.tree_util.keystr(path)!r}; expected real ones."
            )
    theta = jax.tree.map(lambda leaf: jnp.asarray(leaf) if _is_float(leaf) else None, params)
    for name, tree in (("params", theta), ("meta", meta)):
        if not jax.tree.leaves(tree):
            raise ValueError(f"{where}: {name} have no floating leaves; there is nothing to differentiate.")
    if problem.mask is not None:
        theta = jax.tree.map(lambda part, leaf: leaf if part else None, taking_part, theta)
        if not jax.tree.leaves(theta):
            raise ValueError(f"{where}: BilevelProblem(mask=) chooses no floating leaf of params.")

    def merge(tree):
        return jax.tree.map(lambda new, old: old if new is None else new, tree, params, is_leaf=_is_none)

    reduce = (lambda tree: tree) if problem.reduce is None else problem.reduce
    return Level(theta, jax.tree.map(jnp.asarray, meta), merge, reduce, problem.products)


def with_products(problem: BilevelProblem, products: str | None) -> BilevelProblem:
    """The problem with an estimator's option `products`; as it is for `None`."""
    given = products is not None and isinstance(problem, BilevelProblem)  # anything else `make_level` refuses
    return dataclasses.replace(problem, products=products) if given else problem


def floating_part(where: str, tree, level: Level):
    """The leaves of `tree`, a pytree like `params`, in the places of the floating leaves of `params`.

    Raises:
      ValueError: `tree` has another structure than `params`.
    """
    params = level.merge(level.theta)
    if jax.tree.structure(tree) != jax.tree.structure(params):
        checks.like(where, tree, params, "params")
    return jax.tree.map(lambda wanted, leaf: None if wanted is None else leaf, level.theta, tree, is_leaf=_is_none)


def like_params(tree, level: Level):
    """A pytree like `params` from one like `level.theta`; zeros in the other places."""

    def fill(new, old):
        if new is not None or old is None:
            return new
        return jnp.zeros(jnp.shape(old), _dtype(old) if _is_float(old) else jnp.float32)

    return jax.tree.map(fill, tree, level.merge(level.theta), is_leaf=_is_none)


def outer_loss(problem: BilevelProblem, level: Level, batch):
    """The outer loss as a function `(theta, meta) -> (scalar, aux)`, checked."""

    def loss(theta, meta):
        value, aux = split_aux(problem, "outer", problem.outer(level.merge(theta), meta, batch))
        return check_scalar("BilevelProblem(outer=)", value), aux

    return loss


def outer_gradients(problem: BilevelProblem, level: Level, batch) -> OuterValue:
    """The outer loss and its gradients, reduced. Cost: one gradient."""
    loss = jax.value_and_grad(outer_loss(problem, level, batch), argnums=(0, 1), has_aux=True)
    (value, aux), gradients = loss(level.theta, level.meta)
    v, direct = level.reduce(gradients)
    return OuterValue(v, direct, level.reduce(value), aux)


def conclude(level: Level, outer: OuterValue, through, field, u, solve_info: SolveInfo):
    """The hypergradient `direct - through` and its `HypergradInfo`.

    Args:
      outer: the outer loss and its gradients, reduced.
      through: `u^T d_meta field`, reduced.
      field: the lower level's field, not reduced yet.
      u: solution of `J^T u = v`, like `level.theta`.
      solve_info: report on u.
    """
    meta_grad = jax.tree.map(lambda a, b: a - b, outer.direct, through)

    def size(tree):
        return jax.lax.stop_gradient(tree_math.norm(tree))

    info = HypergradInfo(
        solve_info.relative_residual,
        solve_info.num_matvecs,
        solve_info.converged,
        direct_norm=size(outer.direct),
        implicit_norm=size(through),
        inner_grad_norm=size(level.reduce(field)),
        solution=like_params(u, level),
        min_curvature=solve_info.min_curvature,
        outer_loss=jax.lax.stop_gradient(outer.loss),
        aux=outer.aux,
    )
    return meta_grad, info


def inner_loss(problem: BilevelProblem, level: Level, batch):
    """The inner loss as a function `(theta, meta) -> scalar`, checked."""

    inner = problem.inner
    assert inner is not None

    def loss(theta, meta):
        value, _ = split_aux(problem, "inner", inner(level.merge(theta), meta, batch))
        return check_scalar("BilevelProblem(inner=)", value)

    return loss


def update_field(problem: BilevelProblem, level: Level, batch):
    """The update field as a function `(theta, meta) -> pytree like theta`, checked."""

    given = problem.update_field
    assert given is not None

    def field(theta, meta):
        field, _ = split_aux(problem, "update_field", given(level.merge(theta), meta, batch))
        where = "BilevelProblem(update_field=) returned a pytree that"
        values = floating_part(where, field, level)
        checks.like(where, values, theta, "params")
        return jax.tree.map(lambda value, leaf: jnp.asarray(value).astype(leaf.dtype), values, theta)

    return field


def split_aux(problem: BilevelProblem, name: str, value):
    """`(value, aux)` of what a function of the problem returned; aux is `()` without `has_aux`."""
    if not problem.has_aux:
        return value, ()
    if not (isinstance(value, tuple) and len(value) == 2):
        raise TypeError(
            f"BilevelProblem({name}=, has_aux=True) returned {type(value).__name__}; expected a pair (value, aux) from "
            "each of the functions given."
        )
    return value


def check_scalar(what: str, value):
    """Returns a loss as an array, and raises unless it is one floating number; messages call it `what`."""
    shapes = jax.tree.map(jnp.shape, value)
    if jax.tree.structure(value) != jax.tree.structure(0) or shapes != ():
        raise ValueError(
            f"{what} returned {shapes if jax.tree.leaves(value) else value!r}; expected one number of shape (). Take "
            "the mean over the batch. Auxiliary outputs are for the losses of a BilevelProblem(has_aux=True) alone."
        )
    if not _is_float(value):
        raise TypeError(f"{what} returned a value of type {_describe(value)}; expected a float.")
    return value


def _is_none(leaf) -> bool:
    return leaf is None


def _is_float(leaf) -> bool:
    return jnp.issubdtype(_dtype(leaf), jnp.floating)


def _dtype(leaf):
    # Key arrays have dtypes that `result_type` refuses.
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _describe(leaf) -> str:
    return f"{_dtype(leaf)}{list(jnp.shape(leaf))}"
