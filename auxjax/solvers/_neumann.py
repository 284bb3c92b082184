"""Truncated Neumann series for A x = b, which watches its residual.

    x_T = step * sum_{i=0..T} (I - step A)^i b

It is computed as T + 1 steps of the Richardson iteration x <- x + step * (b - A x) from x = 0, so that the true
residual of every partial sum is at hand and an initial guess has an obvious meaning. The leading factor `step` belongs
to the series: without it the solution is 1/step too large. The series converges when all eigenvalues of step A lie in
the circle of radius 1 around 1: for a symmetric positive A, when step < 2 / lambda_max. It then satisfies

    ||x_T - A^{-1} b|| <= (1 - step lambda_min)^(T + 1) ||A^{-1} b||          (symmetric A, step <= 1 / lambda_max)

Automatic step. The first few products are a power iteration from b, whose largest growth factor is a lower bound of the
largest singular value of A, in practice close enough that step = 1 / bound stays below 2 / lambda_max. The vectors of
the power iteration also span the first partial sums, so that the estimate costs no extra product. If the residual
should grow later on, that term is taken back and the step is halved. No part of A that b does not excite matters: it
does not enter the series either.

A residual that has grown by less than sqrt(eps) of itself has not grown: on a flat problem, where step A is below eps,
the residual of a convergent series wavers by rounding, which must not decide how many terms there are.

Not for: indefinite matrices, on which the series has no limit; damping, or another curvature, mends that.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from auxjax._internal import checks, convolutions, loops, tree_math
from auxjax._internal.safe_math import inverse_or_zero, positive_or_one
from auxjax.interface import Key, PyTree
from auxjax.solvers import base
from auxjax.solvers.fresh_batches import POWER_STEPS, fresh_series


class _Iterate(NamedTuple):
    """x, its residual b - (A + damping I) x, the norm of that, the step size, and the smallest Rayleigh quotient."""

    x: Any
    residual: Any
    size: jax.Array
    step: jax.Array
    min_curvature: jax.Array


def neumann(
    num_terms: int,
    step_size: float | jax.Array | None = None,
    *,
    damping: float = 0.0,
    rtol: float = 1e-3,
    keep: str = "best",
    fresh_batches: bool = False,
    unroll: int | bool | None = None,
) -> base.Solver:
    """Solver by a truncated Neumann series, with a step size given by hand or found automatically.

    `x = step * sum_{i=0..T} (I - step (A + damping I))^i b`, `T = num_terms`

    With `init`, T + 1 Richardson steps from there: `x = init + step * sum_{i=0..T} (I - step A)^i (b - A init)`.

    Whatever the step, the solution is finite. With a step by hand, the longest partial sum among those with the
    smallest residual is returned, and a series that has grown 1/eps times larger than its start goes no further. With
    the automatic step, terms that make the residual grow are taken back. The first term is always kept, so that x = 0
    is never an answer. `keep="all"` returns the sum of all terms instead.

    Args:
      num_terms: T, number of terms after the first, counted as in the sum above; 0 gives `step * b`.
      step_size: step, a number or a scalar array (such as `1 / estimate.bound` from `power_iteration`; where that is
        not finite no step is made); `None` for one over an estimate of the norm of `A + damping I`.
      damping: multiple of the identity added to A.
      rtol: relative residual up to which `converged` is True. It does not stop the series: a short one on an
        ill-conditioned system has `converged=False` although nothing went wrong.
      keep: "best", as above, or "all": every term is summed whatever becomes of the residual, as in public code, and as
        a series that stands for a number of updates must be. (Under negative curvature, or with a step above 2 /
        lambda_max, "best" may be the first term alone.) Terms that are not finite are left out.
      fresh_batches: multiply with one mini-batch per term, in turn, instead of with their mean; for
        `implicit(..., batches="stacked")`. The answer then fluctuates about the series, and no iterate is taken back.
      unroll: terms per loop iteration, as in `jax.lax.scan`. `None` unrolls short series completely on the CPU, and
        loops elsewhere.

    Returns:
      `solve(matvec, b, *, init=None, key=None) -> (x, SolveInfo)`; no random numbers are drawn, `key` is not used.
      Differentiable (through the series; step sizes and choices between iterates are held fixed).
      Where products are rounded to bfloat16, an automatic series of less than 6 terms stops at a relative residual
      of 0.01 to 0.03: give it more terms there, or a step.
      Cost: T + 1 matrix-vector products with any step, one more with `init`. With fresh batches: T mini-batch products
      (5 more for an automatic step), and one with the mean for the residual, which jit drops when nobody reads it.
      Memory: 4 vectors, 6 more during the automatic choice.

    Raises:
      TypeError, ValueError: an option of the wrong type or out of range.

    Reference: Lorraine, Vicol, Duvenaud, 2020, Optimizing Millions of Hyperparameters by Implicit Differentiation,
    AISTATS, algorithm 3 (whose code leaves out the leading factor).
    """
    checks.count("neumann", 0, num_terms=num_terms)
    checks.number("neumann", least=0, known=True, damping=damping, rtol=rtol)
    checks.one_of("neumann", ("best", "all"), keep=keep)
    whole = keep == "all"
    if step_size is not None:
        _check_step_size(step_size)

    def solve(matvec: base.Matvec, b: PyTree, *, init: PyTree = None, key: Key | None = None):
        system = base.as_vectors(base.make_system("neumann", matvec, b, init, key))
        if fresh_batches:
            _require_entries(system)
            return fresh_series(system, num_terms, step_size, damping, rtol, loops.write_out(num_terms, choice=unroll))
        first = _start(system, damping, step_size)
        # `with_init`: the guess is a candidate; a start from zero is none.
        with_init = init is not None
        if step_size is None:
            used = min(POWER_STEPS, num_terms + 1)
            start_size = first.size
            last = _power_terms(system, first, used, damping, with_init, whole)
            rest = num_terms + 1 - used
            if whole:
                last = _repeat(lambda it: _finite_term(system, it, damping), last, rest, unroll)
            elif rest:  # measures what the power terms' residual was combined to, and so is judged by the start's
                last, _ = _guarded_term(system, (last, start_size), damping)
                last, _ = _repeat(lambda s: _guarded_term(system, s, damping), (last, last.size), rest - 1, unroll)
        elif whole:
            last = _repeat(lambda it: _finite_term(system, it, damping), first, num_terms + 1, unroll)
        else:
            last = _hand_series(system, first, num_terms + 1, damping, with_init, unroll)
        undamped = tree_math.add_scaled(last.residual, damping, last.x) if damping else last.residual
        info = base.make_info(
            base.relative(system, tree_math.norm(undamped)),
            num_terms + 1 + int(with_init),
            base.relative(system, last.size) <= rtol,
            jnp.where(jnp.isfinite(last.min_curvature), last.min_curvature, jnp.zeros_like(last.size)),
        )
        return system.restore(last.x), info

    return solve


def _require_entries(system) -> None:
    if system.entry is None:
        raise ValueError(
            "neumann(fresh_batches=True): expected a mean of mini-batches, got one matrix. Use "
            "implicit(neumann(..., fresh_batches=True), batches='stacked') with stacked inner batches."
        )


def _check_step_size(step_size) -> None:
    if jnp.shape(step_size) != ():
        raise ValueError(f"neumann(step_size=): expected one number and got an array of shape {jnp.shape(step_size)}.")
    if isinstance(step_size, jax.Array):  # a result, mostly of `power_iteration`, whose value is data
        return
    checks.number("neumann", above=0, known=True, step_size=step_size)


def _start(system, damping, step_size) -> _Iterate:
    """The initial guess and its residual: no product without a guess, one with it."""
    dtype = system.norm.dtype
    if system.start is None:
        x, left = jax.tree.map(jnp.zeros_like, system.b), system.b
    else:
        x = system.start
        left, _ = base.residual(system, x, damping)
    step = jax.lax.stop_gradient(jnp.asarray(0.0 if step_size is None else step_size).astype(dtype))
    if isinstance(step_size, jax.Array):  # 1 / 0 where no curvature was met: no step then, and not NaN
        step = jnp.where(jnp.isfinite(step), step, jnp.zeros_like(step))
    size = jax.lax.stop_gradient(tree_math.norm(left))
    return _Iterate(x, left, size, step, jnp.asarray(math.inf, dtype))


def _size(residual, unit):
    """`||residual||`, measured in a unit of about its size: half the work of a norm that has to find one."""
    unit = positive_or_one(unit)
    scaled = jax.lax.stop_gradient(tree_math.scale(1.0 / unit, residual))
    return unit * jnp.sqrt(tree_math.vdot(scaled, scaled))


def _next(system, it: _Iterate, damping) -> _Iterate:
    """One Richardson step, and the Rayleigh quotient along the residual: step A r = r - r_next."""
    x = tree_math.add_scaled(it.x, it.step, it.residual)
    left, _ = base.residual(system, x, damping)
    unit = positive_or_one(it.size)
    before, after = jax.lax.stop_gradient((tree_math.scale(1.0 / unit, it.residual), tree_math.scale(1.0 / unit, left)))
    decrease = tree_math.vdot(before, tree_math.add_scaled(before, -1.0, after))
    # A difference in the last digits is rounding error and says nothing about the curvature.
    eps = float(jnp.finfo(unit.dtype).eps)
    informative = (
        (jnp.abs(decrease) > math.sqrt(eps)) & (it.size > math.sqrt(eps) * system.norm) & jnp.isfinite(decrease)
    )
    quotient = decrease / positive_or_one(it.step) - damping
    min_curvature = jnp.where(informative, jnp.minimum(it.min_curvature, quotient), it.min_curvature)
    return _Iterate(x, left, unit * jnp.sqrt(tree_math.vdot(after, after)), it.step, min_curvature)


def _finite_term(system, it: _Iterate, damping) -> _Iterate:
    """One term, left out if it is not finite."""
    new = _next(system, it, damping)
    return tree_math.select(jnp.isfinite(new.size), new, it)


def _grown(size, least) -> jax.Array:
    """Whether a residual has grown beyond the least one so far, or is not finite: by more than rounding."""
    return ~((size <= (1 + math.sqrt(float(jnp.finfo(size.dtype).eps))) * least) & jnp.isfinite(size))


def _guarded_term(system, state: tuple[_Iterate, jax.Array], damping) -> tuple[_Iterate, jax.Array]:
    """One term of the automatic series, and the least residual: taken back, with half the step, if that has grown."""
    it, least = state
    new = _next(system, it, damping)
    grown = _grown(new.size, least)
    kept = tree_math.select(grown, it, new)
    kept = kept._replace(step=jnp.where(grown, it.step / 2, it.step), min_curvature=new.min_curvature)
    return kept, jnp.where(grown, least, jnp.minimum(least, new.size))


def _hand_series(system, first, terms, damping, with_init, unroll) -> _Iterate:
    """The series with a fixed step: the last iterate of least residual, the start excluded unless it was given."""
    limit = first.size / jnp.finfo(first.size.dtype).eps

    def term(state):
        current, best, least = state
        new = _next(system, current, damping)
        grown = _grown(new.size, least)
        best = tree_math.select(grown, best, new)
        # Beyond the limit the iteration stands still, so that neither it nor its derivative overflows.
        current = tree_math.select(new.size <= limit, new, current)
        return current, best, jnp.where(grown, least, jnp.minimum(least, new.size))

    least = first.size if with_init else jnp.full_like(first.size, math.inf)
    last, best, _ = _repeat(term, (first, first, least), terms, unroll)
    return best._replace(min_curvature=last.min_curvature)


def _power_terms(system, first: _Iterate, steps: int, damping, with_init, keep_whole) -> _Iterate:
    """Chooses the step by a power iteration, and takes the first `steps` terms from its vectors w_j.

    A w_j = a_j w_{j+1}, all of unit length, w_0 = r / ||r||. With B = step A: B^j r = ||r|| step^j a_0 .. a_{j-1} w_j.

        sum_{i<k} (I - B)^i = sum_j (-1)^j C(k, j+1) B^j          (I - B)^k = sum_j (-1)^j C(k, j) B^j

    The binomials of so few terms cost a digit and a half of the products' precision at the worst: nothing in float32,
    most of what there is in bfloat16. The next term, if there is one, measures its residual anew.
    """
    start_size = tree_math.norm(first.residual)
    vectors = [tree_math.scale(1.0 / positive_or_one(start_size), first.residual)]
    growth, quotients = [], []
    for _ in range(steps):
        product = system.matvec(vectors[-1])
        product = tree_math.add_scaled(product, damping, vectors[-1]) if damping else product
        quotients.append(jax.lax.stop_gradient(tree_math.vdot(vectors[-1], product)))
        growth.append(tree_math.norm(product))
        vectors.append(tree_math.scale(1.0 / positive_or_one(growth[-1]), product))

    bound = jax.lax.stop_gradient(jnp.max(jnp.stack(growth)))
    step = inverse_or_zero(bound)
    powers = [start_size]  # size of B^j r
    for factor in growth:
        powers.append(powers[-1] * (factor * step))  # in this order nothing overflows: the bracket is at most 1

    def partial_sum(terms: int) -> _Iterate:
        signed = [-power if j % 2 else power for j, power in enumerate(powers)]
        sums = [step * (math.comb(terms, j + 1) * signed[j]) for j in range(terms)]
        x = tree_math.add_scaled(first.x, 1.0, tree_math.combine(sums, vectors[:terms]))
        rest = [math.comb(terms, j) * signed[j] for j in range(terms + 1)]
        residual = tree_math.combine(rest, vectors[: terms + 1])
        # Where nothing was excited (a zero product), quotients tell nothing.
        seen = jnp.min(jnp.where(jnp.stack(growth) > 0, jnp.stack(quotients) - damping, math.inf))
        return _Iterate(x, residual, _size(residual, first.size), step, seen.astype(step.dtype))

    whole, one_term = partial_sum(steps), partial_sum(1)
    halved = one_term._replace(step=step / 2)
    if with_init:
        halved = tree_math.select(one_term.size <= first.size, halved, first._replace(step=step / 2))
    chosen = whole if keep_whole else tree_math.select(_grown(whole.size, first.size), halved, whole)
    # A product that is not finite makes all vectors useless: stay at the start.
    fine = tree_math.all_finite((chosen.x, chosen.residual))
    return tree_math.select(fine, chosen, first)


def _repeat(body, state, times: int, unroll):
    """`body` applied `times` times; straight-line code where loops are slow."""
    if times == 0:  # which `scan` refuses while jit is disabled
        return state
    step = convolutions.channels_last(body)
    return jax.lax.scan(
        lambda carry, _: (step(carry), None), state, length=times, unroll=loops.write_out(times, choice=unroll)
    )[0]
