"""Hypergradients by differentiating the lower level's training loop itself, the last steps of it or all.

    params_{t+1} = params_t + U_t(field(params_t, meta, batch_t)),   t = 0 .. T-1,   U_t the optimiser's update
    meta_grad = d/d meta outer(params_T(meta), meta)

Reverse mode walks the steps backwards. With c_t the cotangent of the field at step t,

    meta_grad = d_meta outer + sum_t c_t^T d_meta field_t,        u = -sum_t c_t

and at a fixed point u is an approximate solution of J^T u = v: for plain steps, u = step sum_{i<T} (I - step J^T)^i v,
the Neumann series. Each step backwards is taken by one forward-over-reverse derivative of the inner loss, the tangent
along c_t of its gradient in (params, meta): the Hessian is symmetric, so that no gradient has to be transposed, and a
step keeps its params and optimiser state but none of its activations. Forward mode carries d params_t / d meta along
instead: no memory in T, but a tangent for every entry of `meta`.

Not for: lower levels solved to convergence, for which implicit differentiation needs no trajectory; the memory and
the derivative of the optimiser's own hyperparameters.
"""

import math

import jax
import jax.core
import jax.numpy as jnp
import optax

from auxjax._internal import checks, linear_maps, loops, tree_math
from auxjax._internal.precision import accumulation_dtype
from auxjax.hypergrad import inner_step
from auxjax.hypergrad import problem as problems
from auxjax.hypergrad._implicit import linearise
from auxjax.hypergrad.problem import BilevelProblem, Estimator
from auxjax.interface import PyTree, Scalar
from auxjax.solvers import base


def unrolled(
    num_steps: int,
    optimizer: optax.GradientTransformation | Scalar,
    *,
    opt_state: PyTree = None,
    mode: str = "reverse",
    truncate: int | None = None,
    remat: bool | str = "sqrt",
    batches: str = "same",
    unroll: int | bool | None = None,
    rtol: float = 1e-3,
    products: str | None = None,
) -> Estimator:
    """Estimator of hypergradients through `num_steps` updates of the lower level, starting from `params`.

    `meta_grad = d/d meta outer(params_T(meta), meta)`, `params_0 = params`, which is held fixed

    Args:
      num_steps: T, number of steps.
      optimizer: a step size (a number or a scalar array), or an optax transformation, differentiated in the gradient,
        the state and `params`; where a gradient is exactly 0, at the limit, as in `one_step`.
      opt_state: the optimiser's state at `params`; `None` for a fresh one. It is held fixed.
      mode: `"reverse"`, at a cost that does not depend on the size of `meta`, or `"forward"`, for few entries.
      truncate: differentiate the last `truncate` steps only; the steps before run without derivative, as if they did
        not depend on `meta`. The error at a fixed point falls geometrically in it. `None` for all.
      remat: what reverse mode keeps. `False`: the params, optimiser state and intermediate values of the optimiser of
        every step. `True`: params and state of every step. `"sqrt"`: those of about 2 sqrt(T) steps, the rest being
        computed again from them, for one more gradient per step.
      batches: `"same"`: every step sees `inner_batch`. `"stacked"`: the leaves of `inner_batch` have a leading axis of
        `num_steps`, and step t sees entry t.
      unroll: steps per loop iteration, as in `jax.lax.scan`. `None` unrolls few steps completely on the CPU, where
        convolutions inside loops are many times slower unless `make_step` compiles the program, and loops elsewhere; 1
        needs the least memory.
      rtol: relative residual up to which `converged` is True.
      products: "forward", or "reverse" for losses with `jax.custom_vjp` operations, see `BilevelProblem`: a step
        backwards is then a reverse pass of the inner gradient. Only with `mode="reverse"`. `None` for what the problem
        says.

    Returns:
      `estimator(problem, params, meta, inner_batch, outer_batch, *, key=None, init=None) -> (meta_grad, info)`.

      `meta_grad` is a pytree like `meta`, the whole derivative with its true sign and scale, direct part included.
      `info` is a `HypergradInfo` measured at params_T, with the last inner batch: `solution` is u above, and
      `relative_residual` is `||v - J^T u|| / ||v||`. It judges the estimate as an approximation of the implicit
      hypergradient, and says so only where `inner_grad_norm` is small all along the trajectory; as the derivative of
      the training loop the estimate is exact. In forward mode u is not known: `solution` is zero and
      `relative_residual` NaN, with `converged` False. `key` and `init` are checked and not used. Leaves of `params`
      that are not floating are held fixed, and the optimiser does not see them.

      Cost: T inner gradients, one outer gradient, and for K = `truncate` or T steps, each about two gradients: K
      products with second derivatives in reverse mode, K per entry of `meta` in forward mode. `remat` adds up to one
      gradient per step. One product and one inner gradient more for `info`, which jit drops when nobody reads them.

    Raises:
      TypeError, ValueError: an option of the wrong type or out of range; an `opt_state` of another optimiser, or
        stacked batches of another length (from the estimator).

    Reference: Franceschi, Donini, Frasconi, Pontil, 2017, Forward and Reverse Gradient-Based Hyperparameter
    Optimization, ICML; Shaban, Cheng, Hatch, Boots, 2019, Truncated Back-propagation for Bilevel Optimization, AISTATS;
    Kemaev, Calian, Zintgraf, Farquhar, van Hasselt, 2025, Scalable Meta-Learning via Mixed-Mode Differentiation, ICML.
    """
    optimizer = inner_step.as_optimizer("unrolled", optimizer)
    _check_options(num_steps, mode, truncate, remat, batches)
    checks.number("unrolled", least=0, known=True, rtol=rtol)
    linear_maps.check("unrolled", products, None)
    if products == "reverse" and mode == "forward":
        raise ValueError(
            "unrolled(mode='forward', products='reverse'): expected one of them; the latter avoids forward mode."
        )
    kept = num_steps if truncate is None else truncate

    def estimator(problem: BilevelProblem, params, meta, inner_batch, outer_batch, *, key=None, init=None):
        problem = problems.with_products(problem, products)
        level = problems.make_level("unrolled estimator", problem, params, meta)
        inner_step.check_arguments("unrolled estimator", level, key, init)
        stacked = batches == "stacked"
        if stacked:
            _check_stacked(inner_batch, num_steps)
        run = _trajectory(problem, level, optimizer, inner_batch, stacked, mode, unroll)
        zero = jax.tree.map(jnp.zeros_like, level.theta)
        carry = inner_step.start("unrolled", optimizer, opt_state, level.theta)
        carry = run(carry, level.meta, zero, 0, num_steps - kept, False)

        def final(meta, nudge):
            return run(carry, meta, nudge, num_steps - kept, num_steps, remat if mode == "reverse" else False)[0]

        last_batch = jax.tree.map(lambda leaf: leaf[-1], inner_batch) if stacked else inner_batch
        differentiate = _reverse if mode == "reverse" else _forward
        return differentiate(problem, level, final, zero, last_batch, outer_batch, kept, rtol)

    return estimator


def _trajectory(problem, level, optimizer, inner_batch, stacked, mode, unroll):
    """`run(carry, meta, nudge, first, last, remat)`: steps `first` to `last`, where carry = (theta, opt_state)."""
    one_batch = jax.tree.map(lambda leaf: leaf[0], inner_batch) if stacked else inner_batch
    field = _transposable_field(problem, level, one_batch) if mode == "reverse" else _plain_field(problem, level)

    def run(carry, meta, nudge, first, last, remat):
        def step(carry, batch):
            theta, opt_state = carry
            gradients = field(theta, meta, nudge, batch if stacked else inner_batch)
            return inner_step.advance(optimizer, theta, opt_state, gradients)

        xs = jax.tree.map(lambda leaf: leaf[first:last], inner_batch) if stacked else None
        return _repeat(step, carry, xs, last - first, remat, unroll)

    return run


def _reverse(problem, level, final, zero, last_batch, outer_batch, kept, rtol):
    """Hypergradient and info from the transposed derivative of `final(meta, nudge)`."""
    theta, pull = jax.vjp(final, level.meta, zero)
    there = level._replace(theta=theta)
    outer = problems.outer_gradients(problem, there, outer_batch)
    through, u = (tree_math.scale(-1.0, tree) for tree in pull(outer.v))
    values, matvec, _ = linearise(problem, there, last_batch)
    system = base.make_system("unrolled", matvec, outer.v, None, None)
    report = base.report(system, tree_math.cast_like(u, system.b), 0.0, rtol, kept)
    return problems.conclude(there, outer, level.reduce(through), values, u, report)


def _forward(problem, level, final, zero, last_batch, outer_batch, kept, rtol):
    """Hypergradient and info from the derivatives of `final` along every entry of `meta`."""
    del rtol
    leaves, structure = jax.tree.flatten(level.meta)
    ends = [sum(leaf.size for leaf in leaves[: i + 1]) for i in range(len(leaves))]
    dtype = accumulation_dtype(level.meta)

    def unflatten(flat):
        parts = [flat[end - leaf.size : end] for end, leaf in zip(ends, leaves, strict=True)]
        return structure.unflatten([p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, leaves, strict=True)])

    def value(meta):
        theta = final(meta, zero)
        return problems.outer_loss(problem, level, outer_batch)(theta, level.meta)[0], theta

    def along(direction):
        _, slope, theta = jax.jvp(value, (level.meta,), (unflatten(direction),), has_aux=True)
        return slope.astype(dtype), theta

    linear_maps.require_forward_mode(along, jnp.ones(ends[-1], dtype))
    with linear_maps.explain_custom_vjp():
        slopes, theta = jax.vmap(along, out_axes=(0, None))(jnp.eye(ends[-1], dtype=dtype))
    there = level._replace(theta=theta)
    outer = problems.outer_gradients(problem, there, outer_batch)
    through = level.reduce(unflatten(-slopes))
    values = inner_step.field_values(problem, there, theta, level.meta, last_batch)
    high = accumulation_dtype(outer.v)
    report = base.make_info(jnp.full((), math.nan, high), kept * ends[-1], jnp.asarray(False), jnp.zeros((), high))
    return problems.conclude(there, outer, through, values, zero, report)


def _plain_field(problem, level):
    """The reduced field; `nudge` is a constant."""

    def field(theta, meta, nudge, batch):
        del nudge
        return level.reduce(inner_step.field_values(problem, level, theta, meta, batch))

    return field


def _transposable_field(problem, level, batch):
    """The reduced field plus `nudge = 0`, with its transposed derivative written down.

    Written down for two reasons. It keeps the params and no activations. And where `reduce` is a mean over replicas,
    each transposes its own derivative and the results are averaged, which does not depend on how a collective is
    transposed. The cotangents of everything but `theta` stay local: that of `meta` is averaged once, after the last
    step.

    Args:
      problem: the bilevel problem.
      level: where it stands.
      batch: a batch with the shapes and dtypes of every step's.
    """

    def closed(theta, meta, batch):
        if problem.inner is not None:
            return problems.inner_loss(problem, level, batch)(theta, meta)
        return problems.update_field(problem, level, batch)(theta, meta)

    # A function with a derivative of its own may not close over traced values: they become arguments.
    lower, constants = _hoist(closed, level.theta, level.meta, jax.tree.map(jnp.asarray, batch))

    def plain(theta, meta, nudge, given):
        del nudge  # it is zero, and adding it would cost a pass over the params
        return level.reduce((jax.grad(lower) if problem.inner is not None else lower)(theta, meta, *given))

    def forward(theta, meta, nudge, given):
        return plain(theta, meta, nudge, given), (theta, meta, given)

    def backward(saved, cotangent):
        theta, meta, given = saved
        leaves, structure = jax.tree.flatten(given)
        places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

        def call(theta, meta, floats):
            filled = dict(zip(places, floats, strict=True))
            return lower(theta, meta, *structure.unflatten([filled.get(i, leaf) for i, leaf in enumerate(leaves)]))

        arguments = (theta, meta, [leaves[i] for i in places])
        if problem.inner is None:
            cotangents = jax.vjp(call, *arguments)[1](cotangent)
        elif level.products == "reverse":
            cotangents = jax.vjp(jax.grad(call), *arguments)[1](cotangent)
        else:
            gradients = jax.grad(call, argnums=(0, 1, 2))
            with linear_maps.explain_custom_vjp():
                cotangents = jax.jvp(lambda x: gradients(x, *arguments[1:]), (theta,), (cotangent,))[1]
        at_theta, at_meta, at_floats = cotangents
        filled = dict(zip(places, at_floats, strict=True))
        at_given = structure.unflatten([filled.get(i) for i in range(len(leaves))])
        return level.reduce(at_theta), at_meta, cotangent, at_given

    field = jax.custom_vjp(plain)
    field.defvjp(forward, backward)
    return lambda theta, meta, nudge, batch: field(theta, meta, nudge, (jax.tree.map(jnp.asarray, batch), constants))


def _hoist(function, *arguments):
    """`(function(*arguments, constants), constants)`: the values that `function` closes over, as one more argument."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    structure = jax.tree.structure(shape)

    def call(*arguments):
        *arguments, constants = arguments
        return structure.unflatten(jax.core.eval_jaxpr(closed.jaxpr, constants, *jax.tree.leaves(arguments)))

    return call, list(closed.consts)


def _repeat(body, carry, xs, times: int, remat, unroll):
    """`carry` after `body(carry, x)` for every x, keeping for reverse mode what `remat` says."""
    unroll = loops.write_out(times, loops.SHORT_OF_STEPS, unroll)
    whole = unroll is True

    def checkpoint(function):
        # Inside a loop nothing can be merged with the first computation; in straight-line code it must be prevented.
        return jax.checkpoint(function, prevent_cse=bool(whole))

    def loop(function, carry, xs, length, unroll):
        if length == 0:  # which `scan` refuses while jit is disabled
            return carry
        return jax.lax.scan(lambda c, x: (function(c, x), None), carry, xs, length=length, unroll=unroll or 1)[0]

    inner_unroll = True if whole else unroll
    if remat != "sqrt" or times < 4:
        return loop(checkpoint(body) if remat is True else body, carry, xs, times, inner_unroll)

    length = math.isqrt(times)
    count, rest = divmod(times, length)

    def segment(carry, xs, length=length):
        return loop(checkpoint(body), carry, xs, length, inner_unroll)

    def rows(leaf):
        return leaf[rest:].reshape(count, length, *leaf.shape[1:])

    if rest:
        head = jax.tree.map(lambda leaf: leaf[:rest], xs)
        carry = checkpoint(lambda c, x: segment(c, x, rest))(carry, head)
    return loop(checkpoint(segment), carry, jax.tree.map(rows, xs), count, True if whole else 1)


def _check_options(num_steps, mode, truncate, remat, batches) -> None:
    checks.count("unrolled", 1, num_steps=num_steps)
    if truncate is not None:
        checks.count("unrolled", 1, truncate=truncate)
        if truncate > num_steps:
            raise ValueError(f"unrolled(truncate={truncate}): expected at most num_steps = {num_steps}.")
    checks.one_of("unrolled", ("reverse", "forward"), mode=mode)
    checks.one_of("unrolled", ("same", "stacked"), batches=batches)
    checks.one_of("unrolled", (True, False, "sqrt"), remat=remat)


def _check_stacked(batch, num_steps: int) -> None:
    for path, leaf in jax.tree.leaves_with_path(batch):
        if jnp.shape(leaf)[:1] != (num_steps,):
            raise ValueError(
                f"unrolled(batches='stacked'): inner_batch has a leaf of shape {jnp.shape(leaf)} at "
                f"{jax.tree_util.keystr(path)!r}; expected a leading axis of num_steps = {num_steps}."
            )
