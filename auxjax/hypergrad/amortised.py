"""Hypergradients that carry their work from one outer step to the next.

    state = init(problem, params, meta, inner_batch, outer_batch, key=)
    meta_grad, info, state = update(problem, params, meta, inner_batch, outer_batch, state, key=)

Between two outer steps the params and the weights move a little, and so do the solution of the linear system, the
largest curvature and the preconditioner. `warm_started` keeps the solution; `amortise` also keeps whatever a `prepare`
function makes, a step-size estimate or a preconditioner, and renews it every so many steps; `single_loop` takes one
step of the linear system per outer step, so that params, solution and meta converge together. The state is a pytree
of arrays: it lives in the training state, and checkpoints hold it.

Not for: a single hypergradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from auxjax._internal import checks, linear_maps, roles, tree_math
from auxjax._internal.safe_math import inverse_or_zero
from auxjax.hypergrad import problem as problems
from auxjax.hypergrad._implicit import check_curvature, curvature_operator, implicit, linearise
from auxjax.hypergrad.problem import Curvature, Estimator
from auxjax.interface import PyTree
from auxjax.solvers._neumann import neumann
from auxjax.solvers.base import Preparation, Solver
from auxjax.solvers.galerkin import galerkin
from auxjax.solvers.power_iteration import power_iteration


class Amortised(NamedTuple):
    """A hypergradient estimator with state, as two pure functions.

    Attributes:
      init: `(problem, params, meta, inner_batch, outer_batch, *, key=None) -> state`.
      update: `(problem, params, meta, inner_batch, outer_batch, state, *, key=None) -> (meta_grad, info, state)`.
    """

    init: Callable[..., PyTree]
    update: Callable[..., tuple[PyTree, problems.HypergradInfo, PyTree]]


class AmortisedState(NamedTuple):
    """State of `amortise`.

    Attributes:
      solution: u of the last step, a pytree like `params`, zero before the first; `()` without warm starts.
      changes: how far u moved in the last steps, the newest first, a tuple of pytrees like `params`, zero at first; one
        if u is extrapolated, `history - 1` if projected, else none.
      prepared: what `prepare` made, or `()`.
      count: int32, steps taken.
    """

    solution: PyTree
    changes: tuple
    prepared: PyTree
    count: jax.Array


def warm_started(estimator: Estimator) -> Amortised:
    """Any estimator, started from its own last solution.

    Args:
      estimator: `implicit(...)` or another function of that kind.

    Returns:
      An `Amortised` whose state is the solution, zero at first.

    Raises:
      TypeError: `estimator` is not a function.
    """
    roles.estimator("warm_started", "an estimator such as implicit(cg())", estimator=estimator)

    def init(problem, params, meta, inner_batch, outer_batch, *, key=None):
        del inner_batch, outer_batch, key
        return _zero_solution("warm_started init", problem, params, meta)

    def update(problem, params, meta, inner_batch, outer_batch, state, *, key=None):
        gradient, info = estimator(problem, params, meta, inner_batch, outer_batch, key=key, init=state)
        return gradient, info, info.solution

    return Amortised(init, update)


def amortise(
    solver: Solver | Callable[[Any], Solver],
    *,
    prepare: Preparation | None = None,
    every: int = 1,
    curvature: Curvature | str | None = None,
    warm_start: bool | str = "extrapolate",
    history: int = 3,
    damping: float = 0.0,
    products: str | None = None,
) -> Amortised:
    """Implicit differentiation whose solver keeps its start, its step size or its preconditioner.

    Args:
      solver: a solver such as `cg(rtol=1e-3)`; with `prepare`, a function from what that made to a solver, such as
        `lambda sketch: cg(preconditioner=sketch)` or `lambda estimate: neumann(20, step_size=1 / estimate.bound)`.
      prepare: `(matvec, b, previous, key) -> prepared`, a pytree of arrays, where `previous` is what it made last or
        `None`: `power_iteration()`, or `nystrom_preparation(rank, damping=)`. The matrix is that of the current step.
      every: outer steps between two calls of `prepare`. With more than 1 the call is behind a `lax.cond`, in which
        convolutions are slow on a CPU unless `make_step` compiles the program.
      curvature: as in `implicit`.
      warm_start: `"extrapolate"`: start from the last solution and its last change once more, which is near the next
        one where meta moves smoothly, as momentum makes it. `"project"`: from the combination of the last `history`
        solutions that solves the new system best, `W (W^T A W)^-1 W^T v`, the Galerkin solution; for precise solves.
        Where A is positive definite nothing in that span, the extrapolation included, is nearer in the energy norm. It
        costs `history` products. `True`: from the last solution. `False`: from zero.
      history: number of solutions that `"project"` keeps.
      damping: the solver's, if it has one, which `"project"` must know.
      products: as in `implicit`.

    Returns:
      An `Amortised` with an `AmortisedState`. Cost: that of the solver, and every so many steps that of `prepare`.
      `num_matvecs` counts the products of the start and not those of `prepare`.

    Raises:
      TypeError: `solver` or `prepare` is not a function, or `every` or `history` not an integer.
      ValueError: `every` or `history` below 1, a negative `damping`, another `warm_start`; in `update`, a state of
        another `warm_start` or `history`.

    Reference: Arbel, Mairal, 2022, Amortized Implicit Differentiation for Stochastic Bilevel Optimization, ICLR;
    Fischer, 1998, Projection Techniques for Iterative Solution of Ax = b with Successive Right-Hand Sides.
    """
    if prepare is None:
        roles.solver("amortise", "a solver such as cg(), or prepare= as well", solver=solver)
    else:
        checks.function("amortise", solver=solver, prepare=prepare)
    if curvature is not None:
        check_curvature("amortise", curvature)
    linear_maps.check("amortise", products, None)
    checks.count("amortise", 1, every=every, history=history)
    checks.number("amortise", least=0, known=True, damping=damping)
    checks.one_of("amortise", (True, False, "extrapolate", "project"), warm_start=warm_start)
    num_changes = 1 if warm_start == "extrapolate" else history - 1 if warm_start == "project" else 0
    # Without `prepare` the solver is one; with it, what makes one.
    solver_of = (lambda _: cast(Solver, solver)) if prepare is None else cast(Callable[[Any], Solver], solver)

    def system_at(problem, params, meta, inner_batch, outer_batch):
        level = problems.make_level("amortise", problem, params, meta)
        v = problems.outer_gradients(problem, level, outer_batch).v
        if curvature is None:
            return level, linearise(problem, level, inner_batch)[1], v
        return level, curvature_operator(curvature, problem, level, inner_batch), v

    def prepared_at(point, previous, key):
        if prepare is None:
            return ()
        _, matvec, v = system_at(*point)
        return prepare(matvec, v, previous, key)

    def start_at(point, state):
        """Where the solver starts, and the products that took."""
        if warm_start == "project":
            level, matvec, v = system_at(*point)
            known = [problems.floating_part("amortise(state)", u, level) for u in (state.solution, *state.changes)]
            start = jax.lax.stop_gradient(galerkin(matvec, v, known, damping=damping))
            return problems.like_params(start, level), len(known)
        if warm_start == "extrapolate":
            return tree_math.add_scaled(state.solution, 1.0, state.changes[0]), 0
        return (state.solution if warm_start else None), 0

    def init(problem, params, meta, inner_batch, outer_batch, *, key=None):
        _check_key(key)
        problem = problems.with_products(problem, products)
        point = (problem, params, meta, inner_batch, outer_batch)
        start = _zero_solution("amortise init", problem, params, meta)
        made = prepared_at(point, None, key)
        changes = tuple(jax.tree.map(jnp.zeros_like, start) for _ in range(num_changes))
        return AmortisedState(start if warm_start else (), changes, made, jnp.zeros((), jnp.int32))

    def update(problem, params, meta, inner_batch, outer_batch, state, *, key=None):
        _check_key(key)
        problem = problems.with_products(problem, products)
        point = (problem, params, meta, inner_batch, outer_batch)
        if len(state.changes) != num_changes:
            raise ValueError(
                f"amortise(warm_start={warm_start!r}, history={history}).update(state=) keeps {num_changes} changes of "
                f"the solution and got a state with {len(state.changes)}. Make the state with the same options."
            )
        made = state.prepared
        if prepare is not None:

            def renew(made):
                return prepared_at(point, made, key)

            due = (state.count > 0) & (state.count % every == 0)
            made = renew(made) if every == 1 else jax.lax.cond(due, renew, lambda made: made, made)
        guess, made_before = start_at(point, state)
        gradient, info = implicit(solver_of(made), curvature=curvature)(
            problem, params, meta, inner_batch, outer_batch, key=key, init=guess
        )
        info = info._replace(num_matvecs=info.num_matvecs + jnp.int32(made_before))
        return gradient, info, _advance(state, info.solution, made)

    return Amortised(init, update)


def single_loop(
    step_size: float | None = None,
    *,
    damping: float = 0.0,
    curvature: Curvature | str | None = None,
    products: str | None = None,
) -> Amortised:
    """One step of the linear system per outer step: params, solution and meta advance together.

    `u <- u + step_size (v - J^T u)`,   `meta_grad = d_meta outer - u^T d_meta field`

    The gradient is taken with the new u; the published algorithm, SOBA, takes it with the old one.

    For training loops that alternate one (or a few) inner updates with an outer one. The solution is behind by as much
    as the problem moves meanwhile: `relative_residual` says how far. A step that would make the residual on this batch
    larger is not taken.

    Args:
      step_size: step on the linear system; `None` for one over a running estimate of the largest curvature, at one
        product more per outer step.
      damping: multiple of the identity added to the curvature.
      curvature: as in `implicit`.
      products: as in `implicit`.

    Returns:
      An `Amortised`. Cost: two products per outer step, one of them for the residual.

    Reference: Dagreou, Ablin, Vaiter, Moreau, 2022, A Framework for Bilevel Optimization that Enables Stochastic and
    Global Variance Reduction Algorithms, NeurIPS, algorithm 1 (SOBA).
    """
    checks.number("single_loop", least=0, known=True, damping=damping)
    options: dict[str, Any] = {"curvature": curvature, "products": products, "warm_start": True}
    if step_size is not None:
        return amortise(neumann(0, step_size, damping=damping), **options)

    def solver(estimate):
        bound = estimate.bound + jnp.asarray(damping, estimate.bound.dtype)
        return neumann(0, inverse_or_zero(bound), damping=damping)

    return amortise(solver, prepare=power_iteration(), **options)


def _advance(state: AmortisedState, solution, made) -> AmortisedState:
    """The state after one more solution; before the second there is no change."""
    changes = state.changes
    if changes:
        known = (state.count > 0).astype(jnp.float32)
        change = jax.tree.map(lambda new, old: known.astype(new.dtype) * (new - old), solution, state.solution)
        changes = (change, *changes[:-1])
    kept = solution if jax.tree.leaves(state.solution) else ()
    return AmortisedState(kept, changes, made, state.count + jnp.int32(1))


def _zero_solution(where: str, problem, params, meta):
    """Zeros like `params`."""
    level = problems.make_level(where, problem, params, meta)
    return problems.like_params(jax.tree.map(jnp.zeros_like, level.theta), level)


def _check_key(key) -> None:
    if key is not None:
        checks.key("amortised estimator", key)
