"""Nash bargaining between task gradients: the weights of an update that all tasks agree on.

    G a = p / a    (elementwise),    G_jk = <g_j, g_k>,  a > 0

The update sum_k a_k g_k maximises the product of the tasks' gains <g_k, d>^p_k over directions d of unit length: a task
has bargaining power p_k. The solution is the minimum of the strictly convex  a^T G a / 2 - sum_k p_k log a_k, and a^T G
a = sum_k p_k: the update has length 1 for powers that sum to 1, however long the gradients are.

Not for: gradients themselves; see `auxjax.formulas.task_gradients`.
"""

import jax
import jax.numpy as jnp

_STEPS = 30  # of Newton's method; some 10 reach rounding error
_HALVINGS = 12


def bargaining_weights(gram: jax.Array, powers: jax.Array, *, damping: float | None = None) -> jax.Array:
    """The weights that solve `G a = p / a`.

    Args:
      gram: `[K, K]`, inner products of the tasks' gradients.
      powers: `[K]`, p, all positive.
      damping: added to the diagonal of G after it has been scaled to 1. Where gradients oppose each other exactly, no
        update helps all tasks and the weights would be infinite; with damping they are of the size 1 / sqrt(damping).
        `None` for 1e-6, or 1,000 times the rounding error of the dtype where that is more (1.2e-4 in float32): with
        less, the rounding of G would decide about these weights.

    Returns:
      `[K]`, a, positive; 0 for a task whose gradient is 0. Differentiable in both arguments, by the implicit function
      theorem: `(G + diag(p / a^2)) da = dp / a - dG a`.

    Raises:
      ValueError: shapes that do not fit.

    Cost: about 30 dense solves of size K.
    Reference: Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya, 2022, Multi-Task Learning as a Bargaining
    Game, ICML, claim 3.1; with powers: Shamsian, Navon, Glazer, Kawaguchi, Chechik, Fetaya, 2023, Auxiliary Learning as
    an Asymmetric Bargaining Game, ICML.
    """
    if gram.ndim != 2 or gram.shape != (*powers.shape, *powers.shape):
        raise ValueError(
            f"bargaining_weights(gram{list(gram.shape)}, powers{list(powers.shape)}): expected [K, K] and [K]."
        )
    powers = powers.astype(gram.dtype)
    damping = max(1e-6, 1e3 * float(jnp.finfo(gram.dtype).eps)) if damping is None else damping
    squares = jnp.diagonal(gram)
    silent = squares <= 0
    lengths = jnp.sqrt(jnp.where(silent, jnp.ones_like(squares), squares))
    # To unit diagonal, which makes the solver blind to the gradients' scales.
    cosines = gram / (lengths[:, None] * lengths[None, :])
    eye = jnp.eye(len(powers), dtype=gram.dtype)
    cosines = cosines + eye * (damping + silent.astype(gram.dtype))[None, :]
    scaled = _solve(cosines, powers)
    return jnp.where(silent, jnp.zeros_like(scaled), scaled / lengths)


@jax.custom_jvp
def _solve(matrix, powers):
    """Damped Newton steps, each the best of some halvings of the longest one that stays inside."""

    def value(x):
        return x @ matrix @ x / 2 - powers @ jnp.log(x)

    def newton(_, x):
        gradient = matrix @ x - powers / x
        step = -jnp.linalg.solve(matrix + jnp.diag(powers / x**2), gradient)
        longest = jnp.minimum(1.0, 0.9 / jnp.maximum(jnp.max(-step / x), 1e-12))
        sizes = jnp.concatenate([longest * 0.5 ** jnp.arange(_HALVINGS, dtype=x.dtype), jnp.zeros((1,), x.dtype)])
        tried = x[None, :] + sizes[:, None] * step[None, :]
        return tried[jnp.argmin(jax.vmap(value)(tried))]

    # Newton's quadratic convergence ends in steps that change the value by less than rounding; those are taken whole.
    x = jax.lax.fori_loop(0, _STEPS, newton, jnp.sqrt(powers))
    for _ in range(2):
        step = -jnp.linalg.solve(matrix + jnp.diag(powers / x**2), matrix @ x - powers / x)
        x = jnp.where(jnp.all(jnp.abs(step) < 0.1 * x), x + step, x)
    return x


@_solve.defjvp
def _solve_jvp(primals, tangents):
    matrix, powers = primals
    d_matrix, d_powers = tangents
    x = _solve(matrix, powers)
    return x, jnp.linalg.solve(matrix + jnp.diag(powers / x**2), d_powers / x - d_matrix @ x)
