"""Lower levels that are not quadratic, solved by Newton's method, and five-point differences of the solved problem."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from auxjax import BilevelProblem
from tests.helpers.bilevel_problems import Solved, flatten, split


def logistic(seed=0) -> Solved:
    """Logistic regression with one log-regulariser per feature.

    inner = mean log(1 + exp(-y_i x_i w)) + sum_j exp(meta_j) w_j^2 / 2,      outer = the same mean on other data
    """
    rng = np.random.default_rng(seed)
    n, d = 30, 6
    X, Xv = rng.normal(size=(2, n, d))
    truth = rng.normal(size=d)
    y, yv = (np.sign(x @ truth + rng.normal(size=n)) for x in (X, Xv))
    meta = rng.normal(size=d) - 1.5

    def slopes(inputs, labels, w):
        return -labels / (1 + np.exp(labels * (inputs @ w)))  # derivatives of the losses in the logits

    def hessian(w, log_reg):
        p = 1 / (1 + np.exp(-X @ w))
        return X.T @ ((p * (1 - p))[:, None] * X) / n + np.diag(np.exp(log_reg))

    def solve_inner(log_reg):
        w = np.zeros(d)
        for _ in range(20):
            w = w - np.linalg.solve(hessian(w, log_reg), X.T @ slopes(X, y, w) / n + np.exp(log_reg) * w)
        return w

    w = solve_inner(meta)
    v = Xv.T @ slopes(Xv, yv, w) / n
    u = np.linalg.solve(hessian(w, meta), v)

    def fit(params, batch):
        return jnp.mean(jax.nn.softplus(-batch[1] * (batch[0] @ flatten(params))))

    def inner(params, log_reg, batch):
        return fit(params, batch) + jnp.sum(jnp.exp(log_reg) * flatten(params) ** 2) / 2

    return Solved(
        BilevelProblem(inner=inner, outer=lambda params, log_reg, batch: fit(params, batch)),
        split(w),
        jnp.asarray(meta),
        (jnp.asarray(X), jnp.asarray(y)),
        (jnp.asarray(Xv), jnp.asarray(yv)),
        hessian(w, meta),
        v,
        u,
        -u * np.exp(meta) * w,
        solve_inner,
        lambda w, _: np.mean(np.log1p(np.exp(-yv * (Xv @ w)))),
    )


def two_modules(seed=0) -> Solved:
    """A small tanh network whose two modules, kernel and bias, weigh the auxiliary gradient each in its own way.

    field, module m = d/dw_m mean (f - y)^2 / 2 + exp(meta_m) d/dw_m mean (h - z)^2 / 2 + 0.2 w_m

    with h the first hidden unit and f the sum of both. No loss has this gradient.
    """
    rng = np.random.default_rng(seed)
    X, Xv = (jnp.asarray(rng.normal(size=(20, 2))) for _ in range(2))
    y, z, yv = (jnp.asarray(rng.normal(size=20)) for _ in range(3))

    def hidden(params, x):
        return jnp.tanh(x @ params["kernel"] + params["bias"][None, :])

    def fit(params, x, y):
        return jnp.mean((jnp.sum(hidden(params, x), axis=1) - y) ** 2) / 2

    def update_field(params, meta, batch):
        x, y, z = batch
        primary = jax.grad(fit)(params, x, y)
        auxiliary = jax.grad(lambda p: jnp.mean((hidden(p, x)[:, 0] - z) ** 2) / 2)(params)
        factors = {"kernel": jnp.exp(meta[0]), "bias": jnp.exp(meta[1])}
        return {m: primary[m] + factors[m] * auxiliary[m] + 0.2 * params[m] for m in params}

    def outer(params, meta, batch):
        return fit(params, *batch) + 0.05 * jnp.sum(meta**2)

    def field(w, meta):
        return flatten(update_field(split(w), meta, (X, y, z)))

    def value(w, meta):
        return outer(split(w), meta, (Xv, yv))

    @jax.jit
    def solve_inner(meta):
        w = jnp.zeros(6)
        for _ in range(3):  # far from the solution, Newton's method on a field that is nearly a gradient may go astray
            w = w - jnp.linalg.solve(jax.jacfwd(field)(w, meta) + jnp.eye(6), field(w, meta))
        return jax.lax.fori_loop(
            0, 20, lambda _, w: w - jnp.linalg.solve(jax.jacfwd(field)(w, meta), field(w, meta)), w
        )

    meta = jnp.asarray([0.8, -0.6])
    w = solve_inner(meta)
    jacobian, mixed = (np.asarray(j) for j in jax.jacfwd(field, argnums=(0, 1))(w, meta))
    v, direct = (np.asarray(g) for g in jax.grad(value, argnums=(0, 1))(w, meta))
    u = np.linalg.solve(jacobian.T, v)
    return Solved(
        BilevelProblem(update_field=update_field, outer=outer),
        split(w),
        meta,
        (X, y, z),
        (Xv, yv),
        jacobian,
        v,
        u,
        direct - mixed.T @ u,
        lambda meta: np.asarray(solve_inner(jnp.asarray(meta))),
        jax.jit(value),
    )


def as_field(solved: Solved) -> Solved:
    """The same problem, its inner loss's gradient given as an update field."""
    problem = BilevelProblem(update_field=jax.grad(solved.problem.inner), symmetric=True, outer=solved.problem.outer)
    return solved._replace(problem=problem)


def five_point_differences(solved: Solved, step=1e-3) -> np.ndarray:
    """Differences of fourth order of meta -> outer(params*(meta), meta), the inner problem solved anew each time."""
    meta = np.asarray(solved.meta, np.float64)

    def value(point):
        return float(solved.outer_value(solved.solve_inner(point), point))

    def slope(e):
        near, far = (value(meta + k * e) - value(meta - k * e) for k in (1, 2))
        return (8 * near - far) / (12 * step)

    return np.asarray([slope(e) for e in step * np.eye(meta.size)])


def newton_step(jacobian):
    """An optax transformation whose update is one step of Newton's method, `-J^{-1} g`, from a dense J."""
    inverse = jnp.asarray(np.linalg.inv(jacobian))
    return optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda g, state, params=None: (split(-inverse @ flatten(g)), state)
    )
