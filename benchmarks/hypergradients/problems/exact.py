"""Float64: lower levels solved to the end, reference hypergradients, and facts about the Hessian.

Independent of auxjax, which is measured against what is computed here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

from benchmarks.hypergradients.problems import losses
from benchmarks.hypergradients.problems.exchange import Problem

DENSE = 2000  # up to so many params the Hessian is formed
BLOCK = 50  # rows of the Hessian computed at once
REFERENCE_TOLERANCE = 1e-13


class Level:
    """Inner and outer loss of one problem in float64, as compiled functions of flat params.

    All of them are methods on flat NumPy vectors and take `meta` as the last argument.
    """

    def __init__(self, kind: str, constants: dict, like: dict, inner_batch: dict, outer_batch: dict):
        with jax.enable_x64(True):
            inner, outer = losses.get(kind, constants)
            wide = {key: jnp.asarray(leaf, jnp.float64) for key, leaf in like.items()}
            flat, self._unravel = ravel_pytree(wide)
            self.size = flat.size
            self._last = None
            self._batches = (_double(inner_batch), _double(outer_batch))

            def lower(flat, meta, batch):
                return inner(self._unravel(flat), meta, batch)

            def upper(flat, meta, batch):
                return outer(self._unravel(flat), meta, batch)

            def product(flat, x, meta, batch):
                return jax.jvp(lambda f: jax.grad(lower)(f, meta, batch), (flat,), (x,))[1]

            def solve(flat, b, meta, batch, guess, tolerance):
                linear = jax.linearize(lambda f: jax.grad(lower)(f, meta, batch), flat)[1]
                return jax.scipy.sparse.linalg.cg(linear, b, guess, tol=tolerance, maxiter=20 * self.size)[0]

            def products(flat, directions, meta, batch):
                return jax.vmap(lambda x: product(flat, x, meta, batch))(directions)

            def mixed(flat, u, meta, batch):
                return jax.grad(lambda m: jax.jvp(lambda f: lower(f, m, batch), (flat,), (u,))[1])(meta)

            self._compiled = {
                "lower": jax.jit(jax.value_and_grad(lower)),
                "upper": jax.jit(jax.grad(upper, argnums=(0, 1))),
                "product": jax.jit(product),
                "solve": jax.jit(solve),
                "products": jax.jit(products),
                "mixed": jax.jit(mixed),
            }

    def _call(self, name: str, *arguments, outer: bool = False):
        arguments = list(arguments)
        with jax.enable_x64(True):
            place = 1 if name in ("lower", "upper") else 2
            arguments[place] = _double(arguments[place])
            arguments.insert(place + 1, self._batches[int(outer)])
            return jax.tree.map(np.asarray, self._compiled[name](*arguments))

    def ravel(self, params: dict) -> np.ndarray:
        """Params as one float64 vector."""
        with jax.enable_x64(True):
            return np.array(ravel_pytree(_double(params))[0])

    def unravel(self, flat) -> dict:
        """Params from one vector, as float64 NumPy arrays."""
        with jax.enable_x64(True):
            return {key: np.asarray(leaf) for key, leaf in self._unravel(jnp.asarray(flat)).items()}

    def value_and_gradient(self, flat, meta):
        """Inner loss and its gradient in the params."""
        value, gradient = self._call("lower", flat, meta)
        return float(value), np.array(gradient)

    def product(self, flat, x, meta):
        """Hessian-vector product of the inner loss."""
        return self._call("product", flat, x, meta)

    def hessian(self, flat, meta):
        """Hessian of the inner loss, [n, n]. Blocks of rows are computed one by one: loops are slow inside of XLA.

        The last one is kept: solving and its eigenvalues want the same.
        """
        point = (flat.tobytes(), *(leaf.tobytes() for leaf in meta.values()))
        if self._last is not None and self._last[0] == point:
            return self._last[1]
        blocks = np.array_split(np.eye(self.size), -(-self.size // BLOCK))
        matrix = np.concatenate([self._call("products", flat, block, meta) for block in blocks])
        self._last = (point, 0.5 * (matrix + matrix.T))
        return self._last[1]

    def solve(self, flat, b, meta, tolerance: float, guess=None):
        """Solution of H x = b: dense where that is small, else by conjugate gradients from `guess` to `tolerance`."""
        if self.size <= DENSE:
            return np.linalg.solve(self.hessian(flat, meta), b)
        return self._call("solve", flat, b, meta, np.zeros_like(b) if guess is None else guess, tolerance)

    def minimise(self, flat, meta, tolerance: float):
        """A minimum of the inner loss, to a gradient norm of at most `tolerance`: L-BFGS, then Newton steps.

        Raises:
          RuntimeError: it was not reached.
        """
        flat, size = self.newton(self._quasi_newton(np.asarray(flat, np.float64), meta, tolerance), meta, tolerance)
        if size > tolerance:
            raise RuntimeError(f"no minimum was reached: gradient norm {size:.1e}, expected {tolerance:.1e}")
        return flat

    def newton(self, flat, meta, tolerance: float, steps: int = 20):
        """Newton steps with a search along each: the last point, and the norm of the gradient there.

        They end at the tolerance, after `steps`, or where a step does not lead down.
        """
        for _ in range(steps):
            value, gradient = self.value_and_gradient(flat, meta)
            if np.linalg.norm(gradient) <= tolerance:
                break
            step = self.solve(flat, gradient, meta, 1e-3)
            scales = 0.5 ** np.arange(12) if np.vdot(step, gradient) > 0 else ()
            better = (s for s in scales if self.value_and_gradient(flat - s * step, meta)[0] <= value + 1e-14)
            scale = next(better, None)
            if scale is None:
                break
            flat = flat - scale * step
        return flat, float(np.linalg.norm(self.value_and_gradient(flat, meta)[1]))

    def _quasi_newton(self, flat, meta, tolerance: float):
        def stop(intermediate_result):
            if np.linalg.norm(self.value_and_gradient(intermediate_result.x, meta)[1]) <= tolerance:
                raise StopIteration

        options = {"maxiter": 20_000, "maxfun": 40_000, "maxcor": 30, "ftol": 0.0, "gtol": tolerance / 100}
        return scipy.optimize.minimize(
            self.value_and_gradient, flat, args=(meta,), jac=True, method="L-BFGS-B", options=options, callback=stop
        ).x

    def hypergradient(self, flat, meta, tolerance: float = REFERENCE_TOLERANCE, guess=None):
        """The exact hypergradient, the relative residual of its linear system, and the solution of that.

        Raises:
          RuntimeError: the linear solve did not reach ten times the tolerance.
        """
        v, direct = self._call("upper", flat, meta, outer=True)
        u = self.solve(flat, v, meta, tolerance, guess)
        residual = np.linalg.norm(v - self.product(flat, u, meta)) / np.linalg.norm(v)
        if not residual <= 10 * tolerance and self.size > DENSE:
            raise RuntimeError(f"the reference has a residual of {residual:.1e}; expected {tolerance:.1e}")
        through = self._call("mixed", flat, u, meta)
        return {key: direct[key] - through[key] for key in direct}, float(residual), u

    def facts(self, flat, meta) -> dict:
        """Eigenvalues of the Hessian: all where it is small, else the two ends by Lanczos."""
        if self.size <= DENSE:
            eigenvalues = np.linalg.eigvalsh(self.hessian(flat, meta))
            low, high = eigenvalues[0], eigenvalues[-1]
            extra = {"negative": int(np.sum(eigenvalues < 0)), "smallest_size": float(np.min(np.abs(eigenvalues)))}
            size = np.max(np.abs(eigenvalues))
            condition = size / extra["smallest_size"]
        else:
            operator = scipy.sparse.linalg.LinearOperator(
                (self.size, self.size), matvec=lambda x: self.product(flat, np.ravel(x), meta), dtype=np.float64
            )
            start = np.random.default_rng(0).standard_normal(self.size)
            low, high = (
                scipy.sparse.linalg.eigsh(
                    operator, k=1, which=which, tol=1e-3, v0=start, ncv=40, return_eigenvectors=False
                )[0]
                for which in ("SA", "LA")
            )
            extra, size = {}, max(abs(low), abs(high))
            condition = size / abs(low)
        gradient = float(np.linalg.norm(self.value_and_gradient(flat, meta)[1]))
        return {
            "lambda_min": float(low),
            "lambda_max": float(high),
            "condition": float(condition),
            "inner_grad_norm": gradient,
            "step": float(1 / size),
            **extra,
        }


def finish(
    name: str, kind: str, size: str, precision: str, parts: dict, constants: dict, *, solve=None, facts=None
) -> Problem:
    """A `Problem` from its parts: the lower level solved, everything rounded, the reference at the rounded point.

    Args:
      name, kind, size, precision, constants: as in `Problem`.
      parts: params (the start of the solve), meta, inner_batch, outer_batch.
      solve: gradient norm to which the lower level is solved from `params`; `None` to leave them as they are.
      facts: facts that go before those computed here.
    """
    words = (name, kind, size)
    problem = Problem(*words, "float64", **parts, constants=constants, reference={}, facts={}).cast(precision)
    level = Level(kind, constants, problem.params, problem.inner_batch, problem.outer_batch)
    if solve is not None:
        flat = level.minimise(level.ravel(problem.params), problem.meta, solve)
        problem = problem._replace(params=level.unravel(flat)).cast(precision)
    flat = level.ravel(problem.params)
    reference, residual, _ = level.hypergradient(flat, problem.meta)
    known = {
        "num_params": level.size,
        "num_meta": sum(leaf.size for leaf in problem.meta.values()),
        **level.facts(flat, problem.meta),
        "reference_residual": residual,
        "reference_norm": float(np.sqrt(sum(np.sum(leaf**2) for leaf in reference.values()))),
    }
    return problem._replace(reference=reference, facts={**known, **(facts or {})})


def _double(tree: dict) -> dict:
    return {
        key: jnp.asarray(leaf, jnp.float64) if np.issubdtype(leaf.dtype, np.floating) else jnp.asarray(leaf)
        for key, leaf in tree.items()
    }
