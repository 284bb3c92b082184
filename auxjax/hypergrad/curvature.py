"""Curvature matrices that stay positive far from a minimum, in place of the Hessian of the inner loss.

    Gauss-Newton        G = J_z^T (d2L/dz2) J_z + d2L/dparams2                z = outputs(params), inner = L(z, params)
    empirical Fisher    F = J_l^T diag(dL/dl_i) J_l + d2L/dparams2            l = losses(params),  inner = L(l, params)

The Hessian adds sum_j dL/dz_j times the second derivative of the outputs. It has both signs away from a minimum and
vanishes where the outputs fit the data, or are linear in the params. Without it the system is positive (semi)definite,
conjugate gradients and Neumann series cannot blow up, and the hypergradient is that of the locally linearised network.
Explicit terms in the params, such as weight decay, are in L and keep their exact Hessian.

For a softmax with cross-entropy, a Gaussian with squared error, and every other exponential family in its natural
parameters, G is the Fisher information of the model's own predictions. The empirical one takes the labels of the batch;
with labels drawn from the model it is the Fisher information in expectation.

Not for: the mixed derivative, which stays exact.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from auxjax._internal import checks, linear_maps
from auxjax.hypergrad.problem import Curvature, Level, check_scalar
from auxjax.interface import PyTree
from auxjax.solvers.base import Operator


def gauss_newton(
    outputs: Callable[[PyTree, PyTree, PyTree], PyTree],
    loss: Callable[[PyTree, PyTree, PyTree, PyTree], PyTree],
    *,
    products: str | None = None,
) -> Curvature:
    """Generalised Gauss-Newton matrix as the curvature of `implicit(solver, curvature=)`.

    `G u = J_z^T L_zz J_z u + L_zp u + (mixed terms)`: the Hessian of `L(J_z params, params)` with J_z held fixed

    Args:
      outputs: `(params, meta, batch) -> z`, a pytree of floating arrays such as the logits.
      loss: `(z, params, meta, batch) -> scalar`, convex in z for G to be positive semidefinite. The problem's inner
        loss is `loss(outputs(params, meta, batch), params, meta, batch)`: it is the caller who keeps them equal.
      products: "forward", or "reverse" for functions with `jax.custom_vjp` operations: J_z u is then the derivative of
        `c -> J_z^T c` by one more reverse pass. `None` for what the estimator or the problem says.

    Returns:
      `curvature(level, batch) -> matvec`, an `Operator` known to be symmetric. Cost of a product: one forward-mode
      and one reverse pass through the outputs, linearised once, and a Hessian product of `loss` in its first two
      arguments.

    Raises:
      TypeError: an argument is not a function; outputs that are not floating (when traced).

    Reference: Schraudolph, 2002, Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent; Martens,
    2020, New Insights and Perspectives on the Natural Gradient Method, section 8.
    """
    checks.function("gauss_newton", outputs=outputs, loss=loss)
    linear_maps.check("gauss_newton", products, None)

    def curvature(level: Level, batch: PyTree):
        def network(theta):
            return checks.floating(
                "gauss_newton(outputs=): what it returns", outputs(level.merge(theta), level.meta, batch)
            )

        def value(z, theta):
            return check_scalar("gauss_newton(loss=)", loss(z, level.merge(theta), level.meta, batch))

        how = level.products if products is None else products
        z, push, pull = linear_maps.jacobian_products(network, level.theta, how)
        hessian = linear_maps.hessian_product(jax.grad(value, argnums=(0, 1)), (z, level.theta), how)[1]

        def matvec(u):
            at_z, at_theta = hessian((push(u), u))
            return level.reduce(jax.tree.map(jnp.add, pull(at_z), at_theta))

        return Operator(matvec, symmetric=True)

    return curvature


def fisher(
    losses: Callable[[PyTree, PyTree, PyTree], PyTree],
    loss: Callable[[PyTree, PyTree, PyTree, PyTree], PyTree],
    *,
    products: str | None = None,
) -> Curvature:
    """Empirical Fisher matrix as the curvature of `implicit(solver, curvature=)`.

    `F u = sum_i (dL/dl_i) g_i <g_i, u> + L_pp u`, g_i the gradient of example i's loss

    Args:
      losses: `(params, meta, batch) -> l`, a pytree of per-example losses, such as `[n]` or `{task: [n_task]}`.
      loss: `(l, params, meta, batch) -> scalar`, growing in every l_i for F to be positive semidefinite: a mean, or a
        weighted mean with weights >= 0. The problem's inner loss is `loss(losses(...), params, meta, batch)`.
      products: as `gauss_newton` has it.

    Returns:
      `curvature(level, batch) -> matvec`, an `Operator` known to be symmetric. Cost of a product: one forward-mode
      and one reverse pass through the losses, linearised once. Its rank is at most the number of examples: without
      explicit terms in the params it needs damping.

    Raises:
      TypeError: an argument is not a function; losses that are not floating (when traced).

    Reference: Martens, 2020, New Insights and Perspectives on the Natural Gradient Method, JMLR, section 11; Kunstner,
    Balles, Hennig, 2019, Limitations of the Empirical Fisher Approximation, NeurIPS, on where the two differ.
    """
    checks.function("fisher", losses=losses, loss=loss)
    linear_maps.check("fisher", products, None)

    def curvature(level: Level, batch: PyTree):
        def each(theta):
            return checks.floating("fisher(losses=): what it returns", losses(level.merge(theta), level.meta, batch))

        def value(values, theta):
            return check_scalar("fisher(loss=)", loss(values, level.merge(theta), level.meta, batch))

        how = level.products if products is None else products
        values, push, pull = linear_maps.jacobian_products(each, level.theta, how)
        slopes = jax.grad(value)(values, level.theta)

        def slope(theta):
            return (jax.grad(value, argnums=1)(values, theta),)

        explicit = linear_maps.hessian_product(slope, (level.theta,), how)[1]

        def matvec(u):
            weighted = jax.tree.map(jnp.multiply, slopes, push(u))
            return level.reduce(jax.tree.map(jnp.add, pull(weighted), explicit((u,))[0]))

        return Operator(matvec, symmetric=True)

    return curvature
