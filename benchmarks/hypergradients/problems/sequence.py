"""Fifty steps of an outer level on the hypercleaning problem: the points at which hypergradients are needed in a run.

    meta_{t+1} = meta_t - Adam(learning rate 0.05)(hypergradient at (params_t, meta_t))
    params_t   = argmin inner(., meta_t)

The exact float64 hypergradients drive it, so that every method is asked for the same ones, and no method's errors move
the points. params_0 and meta_0 are those of the problem; params_{t+1} by Newton steps from params_t, to the gradient
norm that the problem itself is solved to, or, where these do not lead there because the minimum has become a saddle
point, by L-BFGS (`facts["jumps"]` counts these). References: dense on the small problem, conjugate gradients to a
residual of 1e-10 on the large one. Neighbouring points are close, which is what warm starts live on.

    small, large   50 points of hypercleaning-small and hypercleaning-large
    short          8 points of hypercleaning-small
"""

import numpy as np

from benchmarks.hypergradients.problems import exact, hypercleaning
from benchmarks.hypergradients.problems.exchange import Sequence

STEPS, LEARNING_RATE, TOLERANCE = 50, 0.05, 1e-10


def make(size: str, seed: int, data_dir=None) -> Sequence:
    """The sequence of a size."""
    steps, base = (8, "small") if size == "short" else (STEPS, size)
    from benchmarks.hypergradients.problems import get

    problem = get("hypercleaning", base, seed) if data_dir is None else hypercleaning.make(base, seed)
    return follow(problem._replace(name=f"sequence-{size}"), steps)


def follow(problem, steps: int) -> Sequence:
    """The outer level's run from `problem`, `steps` points long."""
    level = exact.Level(problem.kind, problem.constants, problem.params, problem.inner_batch, problem.outer_batch)
    flat = level.ravel(problem.params)
    meta = problem.cast("float64").meta
    first = {key: np.zeros_like(leaf) for key, leaf in meta.items()}
    second = {key: np.zeros_like(leaf) for key, leaf in meta.items()}
    points, guess, residuals, jumps = [], None, [], 0
    for t in range(steps):
        if t:
            near, left = level.newton(flat, meta, hypercleaning.GRADIENT_NORM, 8)
            jumps += left > hypercleaning.GRADIENT_NORM
            flat = (
                level.minimise(flat, meta, hypercleaning.GRADIENT_NORM) if left > hypercleaning.GRADIENT_NORM else near
            )
        # The reference belongs to the rounded point, which is the one that methods are given.
        rounded = problem._replace(params=level.unravel(flat), meta=meta).cast(problem.precision)
        here = level.ravel(rounded.params)
        reference, residual, guess = level.hypergradient(here, rounded.meta, TOLERANCE, guess)
        points.append(rounded._replace(reference=reference))
        residuals.append(residual)
        for key, gradient in reference.items():
            first[key] = 0.9 * first[key] + 0.1 * gradient
            second[key] = 0.999 * second[key] + 0.001 * gradient**2
            mean, square = first[key] / (1 - 0.9 ** (t + 1)), second[key] / (1 - 0.999 ** (t + 1))
            meta = {**meta, key: meta[key] - LEARNING_RATE * mean / (np.sqrt(square) + 1e-8)}
    facts = {
        "steps": steps,
        "learning_rate": LEARNING_RATE,
        "largest_reference_residual": max(residuals),
        "jumps": int(jumps),
        "inner_grad_norm": hypercleaning.GRADIENT_NORM,
    }
    return Sequence.of(points, facts)
