"""Gaussian tasks on which every quantity of ARML's theory has a closed form.

Task k has the likelihood p_k(theta) ~ exp(-theta^T P_k theta / 2 + h_k^T theta); task 0 is the primary one, whose P_0
may be singular. With weights w >= 0, sum w = K, the surrogate prior p_w ~ prod_k p_k^{w_k} and the joint posterior
p_J ~ p_0 p_w are Gaussian, too, and so are in closed form

    true_prior_divergence      KL(p* || p_w), what ARML wants to minimise (convex in w)
    surrogate_divergence       E_{p_J} [log p_0 - log p_w], the paper's first surrogate (A7)
    surrogate_fixed_point      weights that minimise the latter with p_J held fixed at these very weights
    fisher_objective           E_{p_J} || grad log p_0 - sum_k w_k grad log p_k ||^2, the second (A11)
    fisher_fixed_point         the same for it

ARML follows the last: its gradient in w knows nothing of how the samples depend on w. `heat` scales the covariance of
the samples: 1 is the posterior and 0 is its mode alone, where training without noise ends.

Reference: Shi et al., Auxiliary Task Reweighting for Minimum-data Learning (NeurIPS 2020), equations A5, A7 and A11.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from auxjax.formulas.simplex import project_simplex, simplex_quadratic_program


class GaussianTasks(NamedTuple):
    """K + 1 Gaussian likelihoods, the primary one first, each a sum over examples (x_i, y_i) of unit noise.

    Attributes:
      precision: `[K + 1, d, d]`, P_k = sum_i x_i x_i^T.
      linear: `[K + 1, d]`, h_k = sum_i y_i x_i.
      spread, tilt, level: `[K + 1, d, d]`, `[K + 1, d]`, `[K + 1]`, the same sums of x x^T, y x and y^2 with weights
        |x_i|^2, each times the number of examples: what the noise of mini-batch gradients depends on.
    """

    precision: jax.Array
    linear: jax.Array
    spread: jax.Array
    tilt: jax.Array
    level: jax.Array


class Gaussian(NamedTuple):
    """A normal distribution: `mean` `[d]`, `precision` and `covariance` `[d, d]`, `linear` = precision mean."""

    mean: jax.Array
    precision: jax.Array
    covariance: jax.Array
    linear: jax.Array


def moments(x, y, sizes) -> GaussianTasks:
    """The sums over examples, from `x` `[K + 1][n, d]`, `y` `[K + 1][n]` and the number of examples of each task."""
    norms = [np.sum(np.square(rows), axis=1) for rows in x]
    triples = list(zip(x, y, norms, strict=True))
    sizes = np.asarray(sizes, float)
    return GaussianTasks(
        precision=np.stack([a.T @ a for a in x]),
        linear=np.stack([a.T @ b for a, b in zip(x, y, strict=True)]),
        spread=np.stack([a.T @ (c[:, None] * a) for a, _, c in triples]) * sizes[:, None, None],
        tilt=np.stack([a.T @ (c * b) for a, b, c in triples]) * sizes[:, None],
        level=np.array([np.sum(c * b * b) for _, b, c in triples]) * sizes,
    )


def distribution(tasks: GaussianTasks, weights, *, primary: float) -> Gaussian:
    """The joint posterior (`primary=1`) or the surrogate prior (`primary=0`)."""
    every = jnp.concatenate([jnp.full((1,), primary, weights.dtype), weights])
    precision, linear = jnp.tensordot(every, tasks.precision, 1), every @ tasks.linear
    covariance = jnp.linalg.inv(precision)
    covariance = (covariance + covariance.T) / 2
    return Gaussian(covariance @ linear, precision, covariance, linear)


def log_determinant(precision) -> jax.Array:
    """log det of a positive definite matrix."""
    return 2 * jnp.sum(jnp.log(jnp.diagonal(jnp.linalg.cholesky(precision))))


def true_prior_divergence(tasks: GaussianTasks, weights, mean, covariance) -> jax.Array:
    """KL(p* || p_w) for p* = N(mean, covariance)."""
    prior = distribution(tasks, weights, primary=0.0)
    gap = mean - prior.mean
    energy = jnp.sum(prior.precision * covariance) + gap @ prior.precision @ gap
    return (energy - mean.shape[0] - log_determinant(prior.precision) - log_determinant(covariance)) / 2


def surrogate_divergence(tasks: GaussianTasks, weights, sampled=None) -> jax.Array:
    """E_{p_J} [log p_0 - log p_w], up to the normaliser of p_0, which does not depend on the weights.

    p_J is that of the weights `sampled`, by default the same ones.
    """
    joint = distribution(tasks, weights if sampled is None else sampled, primary=1.0)
    prior = distribution(tasks, weights, primary=0.0)
    precision, linear = prior.precision - tasks.precision[0], prior.linear - tasks.linear[0]  # of p_w / p_0
    energy = (jnp.sum(precision * joint.covariance) + joint.mean @ precision @ joint.mean) / 2 - linear @ joint.mean
    size = joint.mean.shape[0]
    normaliser = (prior.linear @ prior.mean - log_determinant(prior.precision) + size * jnp.log(2 * jnp.pi)) / 2
    return energy + normaliser


def expected_gram(tasks: GaussianTasks, weights, heat: float = 1.0) -> jax.Array:
    """`[K + 1, K + 1]`: E <g_j, g_k> of the gradients g_k = P_k theta - h_k, theta ~ N(m_J, heat P_J^-1)."""
    joint = distribution(tasks, weights, primary=1.0)
    count = tasks.linear.shape[0]
    means = tasks.precision @ joint.mean - tasks.linear
    widths = (tasks.precision @ joint.covariance).reshape(count, -1) @ tasks.precision.reshape(count, -1).T
    return means @ means.T + heat * widths


def batch_noise(tasks: GaussianTasks, weights, heat: float = 1.0) -> jax.Array:
    """`[K + 1]`: E tr Cov of the gradient of task k from one example, drawn evenly, theta as in `expected_gram`.

    `n_k sum_i |x_i|^2 E (x_i theta - y_i)^2 - E |g_k|^2`; a mini-batch of B, drawn with replacement, has 1 / B of it.
    """
    joint = distribution(tasks, weights, primary=1.0)
    widths = jnp.sum(tasks.spread * joint.covariance[None], axis=(1, 2))
    squares = (tasks.spread @ joint.mean) @ joint.mean - 2 * tasks.tilt @ joint.mean + tasks.level + heat * widths
    means = tasks.precision @ joint.mean - tasks.linear
    full = jnp.sum(jnp.square(means), axis=1)
    full = full + heat * jnp.sum((tasks.precision @ joint.covariance) * tasks.precision, axis=(1, 2))
    return squares - full


def residual(tasks: GaussianTasks, joint: Gaussian, weights):
    """`R` `[d, d]` and `r` `[d]`: sum_k w_k g_k - g_0 is R (theta - m_J) + r."""
    every = jnp.concatenate([-jnp.ones((1,), weights.dtype), weights])
    matrix = jnp.tensordot(every, tasks.precision, 1)
    return matrix, matrix @ joint.mean - every @ tasks.linear


def fisher_objective(tasks: GaussianTasks, weights, heat: float = 1.0) -> jax.Array:
    """E || g_0 - sum_k w_k g_k ||^2, the samples moving with the weights."""
    joint = distribution(tasks, weights, primary=1.0)
    matrix, mean = residual(tasks, joint, weights)
    return mean @ mean + heat * jnp.sum((matrix @ joint.covariance) * matrix)


def partial_gradient(tasks: GaussianTasks, weights, heat: float = 1.0, batch: float | None = None) -> jax.Array:
    """Half the gradient of E || g_0 - sum_k w_k g_k ||^2 in w, the distribution of the samples held fixed: G w - b.

    With mini-batches of size `batch`, drawn for every task by itself, each G_kk grows by the noise of its gradient.
    """
    joint = distribution(tasks, weights, primary=1.0)
    matrix, mean = residual(tasks, joint, weights)
    products = jnp.sum(tasks.precision[1:] * (heat * (joint.covariance @ matrix))[None], axis=(1, 2))
    products = products + (tasks.precision[1:] @ joint.mean - tasks.linear[1:]) @ mean
    return products if batch is None else products + batch_noise(tasks, weights, heat)[1:] * weights / batch


def best_response(tasks: GaussianTasks, weights, heat: float = 1.0, batch: float | None = None) -> jax.Array:
    """The exact minimiser over the simplex with the samples of p_J at `weights`."""
    gram = expected_gram(tasks, weights, heat)
    noisy = gram[1:, 1:]
    if batch is not None:
        noisy = noisy + jnp.diag(batch_noise(tasks, weights, heat)[1:] / batch)
    return simplex_quadratic_program(noisy, gram[1:, 0], float(weights.shape[0]))


def minimise_on_simplex(value: Callable, start, *, tolerance: float = 1e-10, most: int = 60):
    """A local minimiser of a smooth function over {w >= 0, sum w = K}: Newton's method with a quadratic program.

    `w <- argmin_v  g^T (v - w) + (v - w)^T (|H| + mu I) (v - w) / 2`, mu adapted so that the value falls. |H| has the
    absolute eigenvalues of the Hessian. Stops when `max_v g^T (w - v)`, a bound on value - minimum where the function
    is convex, is at most `tolerance` times the value, or `tolerance` where the value is below 1.

    Returns:
      The weights `[K]`, the gap `max_v g^T (w - v)`, the number of steps.
    """
    total = float(start.shape[0])

    def derivatives(weights):
        current, gradient = jax.value_and_grad(value)(weights)
        return current, gradient, jax.hessian(value)(weights)

    def gap(weights, gradient):
        return gradient @ weights - total * jnp.min(gradient)

    def going_on(carry):
        weights, (current, gradient, _), _, step = carry
        return (gap(weights, gradient) > tolerance * jnp.maximum(jnp.abs(current), 1.0)) & (step < most)

    def body(carry):
        weights, (current, gradient, hessian), damping, step = carry
        sizes, vectors = jnp.linalg.eigh((hessian + hessian.T) / 2)
        sizes = jnp.maximum(jnp.abs(sizes), 1e-12 * jnp.max(jnp.abs(sizes)))
        model = (vectors * sizes[None, :]) @ vectors.T + damping * jnp.max(sizes) * jnp.eye(weights.shape[0])
        moved = simplex_quadratic_program(model, model @ weights - gradient, total)
        new = derivatives(moved)
        better = new[0] <= current + 1e-14 * (1 + jnp.abs(current))
        state = jax.tree.map(lambda a, b: jnp.where(better, a, b), (moved, new), (weights, carry[1]))
        return *state, jnp.where(better, jnp.where(damping < 1e-8, 0.0, damping / 10), 10 * damping + 1e-6), step + 1

    weights, (_, gradient, _), _, steps = jax.lax.while_loop(
        going_on, body, (start, derivatives(start), jnp.zeros(()), jnp.zeros((), jnp.int32))
    )
    return weights, gap(weights, gradient), steps


def fixed_point_on_simplex(field: Callable, start, *, tolerance: float = 1e-11, most: int = 300):
    """Weights where `-field` points out of {w >= 0, sum w = K}: where projected steps along it come to rest.

    Implicit Euler steps of the flow dw/dt = -field(w), each linearised and solved exactly by trying all supports, with
    a length that grows as the residual falls: it ends in Newton's method for variational inequalities.

    Returns:
      The weights `[K]`, the residual `|w - project(w - field / scale)|_1`, the number of steps.
    """
    count = start.shape[0]
    total = float(count)
    supports = jnp.array([s for s in itertools.product((0.0, 1.0), repeat=count) if any(s)], start.dtype)
    scale = jnp.linalg.norm(jax.jacfwd(field)(start))

    def evaluate(weights):
        found = field(weights) / scale
        residual = jnp.sum(jnp.abs(weights - project_simplex(weights - found, total)))
        return found, jax.jacfwd(field)(weights) / scale, residual

    def candidate(support, matrix, constant):
        """Solves matrix v + constant = y 1 on the support, sum v = K; returns v and how far it is from a solution."""
        inside = support[:, None] * matrix * support[None, :] + jnp.diag(1 - support)
        system = jnp.block([[inside, -support[:, None]], [support[None, :], jnp.zeros((1, 1), matrix.dtype)]])
        found = jnp.linalg.solve(system, jnp.concatenate([-support * constant, jnp.full((1,), total, matrix.dtype)]))
        v, level = found[:-1], found[-1]
        slack = (1 - support) * (matrix @ v + constant - level)
        wrong = jnp.sum(jnp.maximum(-v, 0.0)) + jnp.sum(jnp.maximum(-slack, 0.0))
        return v, jnp.where(jnp.isfinite(wrong), wrong, jnp.inf)

    def going_on(carry):
        # At rest a long step is either Newton's and stays, or leads to another solution and was taken back.
        _, (_, _, residual), length, step, better = carry
        return ((residual > tolerance) | (better & (length < 1e6))) & (step < most)

    def body(carry):
        weights, (found, slope, residual), length, step, _ = carry
        matrix = slope + jnp.eye(count, dtype=slope.dtype) / length
        choices, wrong = jax.vmap(candidate, (0, None, None))(supports, matrix, found - matrix @ weights)
        moved = project_simplex(choices[jnp.argmin(wrong)], total)
        new = evaluate(moved)
        better = (new[2] <= 1.5 * residual) | (new[2] <= tolerance)
        state = jax.tree.map(lambda a, b: jnp.where(better, a, b), (moved, new), (weights, carry[1]))
        return *state, jnp.where(better, 5 * length, length / 5), step + 1, better

    weights, (_, _, residual), _, steps, _ = jax.lax.while_loop(
        going_on, body, (start, evaluate(start), jnp.ones(()), jnp.zeros((), jnp.int32), jnp.array(True))
    )
    return weights, residual, steps


def fisher_fixed_point(tasks: GaussianTasks, start, heat: float = 1.0, batch: float | None = None):
    """The weights in which ARML comes to rest: see `fixed_point_on_simplex` and `partial_gradient`."""
    return fixed_point_on_simplex(lambda weights: partial_gradient(tasks, weights, heat, batch), start)


def surrogate_fixed_point(tasks: GaussianTasks, start):
    """The weights that minimise (A7) over samples of p_J at themselves: p_w is then as near to p_J as it can be."""

    def field(weights):
        return jax.grad(lambda moving: surrogate_divergence(tasks, moving, weights))(weights)

    return fixed_point_on_simplex(field, start)
