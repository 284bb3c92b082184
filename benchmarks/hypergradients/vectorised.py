"""Two measurements of auxjax alone: a vmapped sweep of problems, and the memory of unrolled training loops.

sweep    64 small hypercleaning problems with different meta, each solved: one compiled vmapped program against a
         Python loop over the compiled single one; the numbers must be equal
memory   what XLA reserves for intermediate values of `unrolled` (compiled, not run) against the number of steps
"""

import math
import statistics
import time

import jax
import numpy as np
import optax

from auxjax import solvers
from auxjax.hypergrad import BilevelProblem, implicit, unrolled
from benchmarks.hypergradients.problems.exchange import Problem, Sequence

STEPS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
REMATS = (False, True, "sqrt")


def measure_sweep(sweep_of: Sequence, repeats: int) -> list[dict]:
    """Times of the vmapped program and of the loop, per solver: their ratio, and how far their results differ."""
    problem, count = sweep_of.problem, len(sweep_of)
    with jax.enable_x64(problem.precision == "float64"):
        params, metas = jax.device_put((sweep_of.params, sweep_of.meta))
        batches = jax.device_put((problem.inner_batch, problem.outer_batch))
        bilevel = BilevelProblem(inner=problem.inner, outer=problem.outer)
        rows = []
        chosen = {
            "cg K=20": solvers.cg(max_steps=20, rtol=0.0),
            "neumann K=20": solvers.neumann(20),
        }
        for label, solver in chosen.items():
            estimator = implicit(solver)

            def single(params, meta, inner_batch, outer_batch, estimator=estimator):
                return estimator(bilevel, params, meta, inner_batch, outer_batch)[0]

            one = jax.jit(single)
            together = jax.jit(jax.vmap(single, in_axes=(0, 0, None, None)))
            points = [jax.tree.map(lambda leaf, i=i: leaf[i], (params, metas)) for i in range(count)]

            def loop(points=points, one=one):
                return [jax.block_until_ready(one(*point, *batches)) for point in points]

            def sweep(together=together):
                return jax.block_until_ready(together(params, metas, *batches))

            times = _alternate({"loop": loop, "sweep": sweep}, repeats)
            separate = jax.tree.map(lambda *leaves: np.stack(leaves), *loop())
            differ = jax.tree.map(
                lambda a, b: float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b))), sweep(), separate
            )
            ratios = [slow / fast for slow, fast in zip(times["loop"], times["sweep"], strict=True)]
            rows.append(
                {
                    "label": label,
                    "count": count,
                    **{f"{name}_s": statistics.median(values) for name, values in times.items()},
                    "times": times,
                    "ratio": statistics.median(times["loop"]) / statistics.median(times["sweep"]),
                    "ratios": ratios,
                    "disagreement": max(differ.values()),
                }
            )
        return rows


def _alternate(actions: dict, repeats: int) -> dict[str, list[float]]:
    """Times of actions that take turns, after one run of each."""
    times = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(repeats):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return times


def measure_memory(problem: Problem, steps=STEPS, optimizers=("sgd", "adam")) -> list[dict]:
    """Bytes that XLA reserves for intermediate values of unrolled training loops, per optimiser, remat and steps.

    Loops are compiled as loops (`unroll=1`), on abstract arrays: nothing is run.
    """
    bilevel = BilevelProblem(inner=problem.inner, outer=problem.outer)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        (problem.params, problem.meta, problem.inner_batch, problem.outer_batch),
    )
    params_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in problem.params.values())
    rows = []
    with jax.enable_x64(problem.precision == "float64"):
        for name in optimizers:
            optimizer = {"sgd": problem.facts["step"], "adam": optax.adam(1e-3, eps_root=1e-12)}[name]
            for remat in REMATS:
                for count in steps:
                    estimator = unrolled(count, optimizer, remat=remat, unroll=1)

                    def gradient(*arrays, estimator=estimator):
                        return estimator(bilevel, *arrays)[0]

                    compiled = jax.jit(gradient).lower(*arguments).compile()
                    used = compiled.memory_analysis().temp_size_in_bytes
                    rows.append(
                        {
                            "optimizer": name,
                            "remat": str(remat),
                            "steps": count,
                            "bytes": int(used),
                            "params_bytes": params_bytes,
                        }
                    )
    return rows


def growth(rows: list[dict]) -> dict[str, float]:
    """Exponent of the memory in the number of steps, `{"sgd sqrt": 0.5, ...}`.

    From the three largest numbers of steps that are each four times the one before: what does not depend on the steps
    drops out of the two differences, whose ratio is 4 to the exponent.
    """
    exponents = {}
    for key in dict.fromkeys((row["optimizer"], row["remat"]) for row in rows):
        of = {row["steps"]: row["bytes"] for row in rows if (row["optimizer"], row["remat"]) == key}
        for last in sorted(of, reverse=True):
            if last // 4 in of and last // 16 in of:
                later, earlier = of[last] - of[last // 4], of[last // 4] - of[last // 16]
                if later > 0 and earlier > 0:
                    exponents[" ".join(key)] = math.log(later / earlier, 4)
                break
    return exponents
