"""Many small hypercleaning problems that differ in `meta`, each solved: what a sweep over outer variables computes.

    meta_k = meta + 0.5 N(0, 1),    params_k = argmin inner(., meta_k),    k = 1 .. 64 (or 8)

Solved from the params of the first problem by Newton steps, or L-BFGS where these do not lead to a minimum, to the
gradient norm that the problem itself is solved to; references by the dense solve.
"""

import numpy as np

from benchmarks.hypergradients.problems import exact, hypercleaning
from benchmarks.hypergradients.problems.exchange import Sequence

SPREAD = 0.5


def make(size: str, seed: int, data_dir=None) -> Sequence:
    """As many problems as `size` says, in the form of a sequence."""
    del data_dir
    return vary(hypercleaning.make("small", seed), int(size), seed)


def vary(problem, count: int, seed: int) -> Sequence:
    """`count` problems around one."""
    rng = np.random.default_rng(seed)
    level = exact.Level(problem.kind, problem.constants, problem.params, problem.inner_batch, problem.outer_batch)
    start, wanted = level.ravel(problem.params), hypercleaning.GRADIENT_NORM
    points = []
    for _ in range(count):
        meta = {key: leaf + SPREAD * rng.standard_normal(leaf.shape) for key, leaf in problem.meta.items()}
        flat, left = level.newton(start, meta, wanted, 8)
        if left > wanted:
            flat = level.minimise(start, meta, wanted)
        point = problem._replace(params=level.unravel(flat), meta=meta)
        points.append(point._replace(reference=level.hypergradient(flat, meta)[0]))
    return Sequence.of(points, {"count": count, "spread": SPREAD})
