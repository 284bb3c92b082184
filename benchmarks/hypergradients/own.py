"""What auxjax offers for the benchmark: `entries(kind) -> {label: make}`, as `worker.py` wants it.

A label says method and setting. K counts steps of a solver, T those of an unrolled training loop, tol is the relative
residual of the linear system.

    neumann K=20             automatic step; `hand step` the step that the problem prescribes, as its peers need it
    cg tol=1e-5              at most 5000 steps; `warm` starts from the last solution, `extrapolated` from where the
                             last two point, `projected` from the best combination of the last three
    cg+nystrom40 tol=1e-5    preconditioned with a sketch of rank 40, made anew each time; `every 10` runs
    unrolled T=20            with `remat=False`; `remat` True; `sqrt`; `last 5 of` truncated
    cg K=20 certified        returns the report (residual, convergence, norms) with the hypergradient

Every other entry returns the hypergradient alone, as the peers' do, and the solution where the next run starts from it;
the report of the same estimate comes from a second program, which is not timed.
"""

from collections.abc import Callable

import jax
import numpy as np

from auxjax import solvers
from auxjax.hypergrad import BilevelProblem, amortise, finite_difference, implicit, one_step, unrolled
from auxjax.version import __version__
from benchmarks.hypergradients.peers.settings import TOLERANCES, tolerance_label
from benchmarks.hypergradients.problems.exchange import LeftOut

NAME, VERSION = "auxjax", __version__
STEPS = (5, 10, 20, 40, 80)
TERMS = (*STEPS, 160, 320, 640, 1280)
MOST_STEPS, DENSE, RANK = 5000, 2000, 40
MOST_MINRES_STEPS = 1000  # it keeps the tridiagonal matrix of so many rows for its report


def available() -> None:
    """It is what the benchmark belongs to."""
    return None


def entries(kind: str) -> dict[str, Callable]:
    """Everything that is measured, `{label: make}`; `make(problem, options) -> (run, num_products, report)`."""
    del kind  # the same for all problems; what does not fit one is left out when it is made
    return _of_steps() | _of_tolerance() | _warm() | _others()


def _of_steps() -> dict[str, Callable]:
    """Solvers with a fixed number of steps."""
    made = {}
    for k in TERMS:
        made[f"neumann K={k}"] = _entry(lambda problem, k=k: implicit(solvers.neumann(k)), dropped=0)
    for k in STEPS:
        made[f"neumann hand step K={k}"] = _entry(
            lambda problem, k=k: implicit(solvers.neumann(k, problem.facts["step"])), dropped=0
        )
        made[f"cg K={k}"] = _entry(_solver("cg", max_steps=k, rtol=0.0))
    for k in (20, 80):
        made[f"minres K={k}"] = _entry(_solver("minres", max_steps=k, rtol=0.0))
        made[f"gmres K={k}"] = _entry(_solver("gmres", max_steps=k, rtol=0.0))
    for k in (10, 40):  # two products per step
        made[f"bicgstab K={k}"] = _entry(_solver("bicgstab", max_steps=k, rtol=0.0))
        made[f"normal_cg K={k}"] = _entry(_solver("normal_cg", max_steps=k, rtol=0.0))
        made[f"nystrom rank={k}"] = _entry(
            lambda problem, k=k: implicit(solvers.nystrom(k, damping=_damping(problem))), dropped=1
        )
    made["neumann K=20 certified"] = _entry(lambda problem: implicit(solvers.neumann(20)), certified=True)
    made["cg K=20 certified"] = _entry(_solver("cg", max_steps=20, rtol=0.0), certified=True)
    return made


def _of_tolerance() -> dict[str, Callable]:
    """Solvers that stop at a tolerance."""
    made = {}
    for tolerance in TOLERANCES:
        label = f"tol={tolerance_label(tolerance)}"
        made[f"cg {label}"] = _entry(_solver("cg", max_steps=MOST_STEPS, rtol=tolerance))
        made[f"minres {label}"] = _entry(_solver("minres", max_steps=MOST_MINRES_STEPS, rtol=tolerance))
        made[f"cg+nystrom{RANK} {label}"] = _entry(lambda problem, rtol=tolerance: _preconditioned(rtol))
    return made


def _warm() -> dict[str, Callable]:
    """Entries that carry something from run to run."""
    made = {}
    for k in TERMS:
        made[f"neumann K={k} warm"] = _entry(lambda problem, k=k: implicit(solvers.neumann(k)), warm=True, dropped=0)
    for tolerance in TOLERANCES:
        label = f"tol={tolerance_label(tolerance)}"
        made[f"cg {label} warm"] = _amortised(tolerance, None, True)
        made[f"cg {label} warm extrapolated"] = _amortised(tolerance, None, "extrapolate")
        made[f"cg {label} warm projected"] = _amortised(tolerance, None, "project")
        for every in (10, 50):
            made[f"cg+nystrom{RANK} {label} warm projected every {every}"] = _amortised(tolerance, every, "project")
    return made


def _others() -> dict[str, Callable]:
    """Methods with one setting, and training loops."""
    made = {
        "dense": _entry(lambda problem: implicit(solvers.dense()), dropped=0, most=DENSE),
        "identity": _entry(lambda problem: implicit(solvers.identity(scale=problem.facts["step"]))),
        "one_step": _entry(lambda problem: one_step(problem.facts["step"])),
        "finite_difference": _entry(lambda problem: finite_difference(problem.facts["step"]), dropped=0),
    }
    for steps in (20, 80):
        for suffix, remat in (("", False), (" remat", True), (" sqrt", "sqrt")):
            made[f"unrolled{suffix} T={steps}"] = _entry(
                lambda problem, steps=steps, remat=remat: unrolled(steps, problem.facts["step"], remat=remat)
            )
    made["unrolled last 5 of T=20"] = _entry(lambda problem: unrolled(20, problem.facts["step"], truncate=5))
    return made


def _solver(name: str, **options) -> Callable:
    return lambda problem: implicit(getattr(solvers, name)(**options))


def _damping(problem) -> float:
    """What the low-rank approximation takes for the curvature it does not see: 1 % of the largest."""
    return 0.01 * abs(problem.facts["lambda_max"])


def _preconditioned(rtol: float):
    """Estimator by preconditioned conjugate gradients, with a sketch of its own for every solve."""

    def solve(matvec, b, *, init=None, key=None):
        sketch = solvers.nystrom_preconditioner(matvec, b, RANK, damping=0.0, key=key)
        x, info = solvers.cg(max_steps=MOST_STEPS, rtol=rtol, preconditioner=sketch)(matvec, b, init=init)
        return x, info._replace(num_matvecs=info.num_matvecs + np.int32(RANK))

    return implicit(solve)


def _entry(build: Callable, *, warm: bool = False, certified: bool = False, dropped: int = 1, most=None) -> Callable:
    """`make` for an estimator that needs nothing but `init`.

    Args:
      build: `problem -> estimator`.
      warm: start from the last solution.
      certified: return and time the report as well.
      dropped: products that only the report needs.
      most: largest number of params for which it is sensible.
    """

    def make(problem, options):
        if most is not None and problem.facts["num_params"] > most:
            raise LeftOut(f"for at most {most} params; this problem has {problem.facts['num_params']}")
        estimate, inform = _compile(problem, build(problem), options, warm, certified, dropped)
        return _runner(problem, estimate, inform, warm)

    return make


def _amortised(rtol: float, every: int | None, warm_start: bool | str) -> Callable:
    """`make` for conjugate gradients that carry their start from run to run and, with `every`, a preconditioner."""

    def make(problem, options):
        bilevel = BilevelProblem(inner=problem.inner, outer=problem.outer)
        batches = jax.device_put((problem.inner_batch, problem.outer_batch))
        key = jax.random.key(options.get("seed", 0))

        def solver(sketch=None):
            return solvers.cg(max_steps=MOST_STEPS, rtol=rtol, preconditioner=sketch)

        carried = amortise(solver(), warm_start=warm_start)
        if every is not None:
            prepare = solvers.nystrom_preparation(RANK, damping=0.0)
            carried = amortise(solver, prepare=prepare, every=every, warm_start=warm_start)

        @jax.jit
        def init(params, meta, inner_batch, outer_batch):
            return carried.init(bilevel, params, meta, inner_batch, outer_batch, key=key)

        @jax.jit
        def update(params, meta, inner_batch, outer_batch, state):
            point = (params, meta, inner_batch, outer_batch)
            gradient, info, state = carried.update(bilevel, *point, state, key=key)
            return gradient, info.num_matvecs - 1, state

        kept = {"state": None, "count": 0}

        def estimate(params, meta, start, restart):
            del start
            if restart:
                kept.update(state=init(params, meta, *batches), count=0)
            gradient, products, kept["state"] = update(params, meta, *batches, kept["state"])
            sketched = RANK if every is not None and kept["count"] % every == 0 else 0
            kept["count"] += 1
            return gradient, (), products + sketched

        return _runner(problem, estimate, None, True)

    return make


def _compile(problem, estimator, options, warm: bool, certified: bool, dropped: int):
    """The estimator on the problem's batches: what is timed, and what reports on the same estimate.

    Returns:
      `estimate(params, meta, init, restart) -> (gradient, solution or report or None, number of products)`, whose
      program has no more outputs than it must, and `inform(params, meta, init) -> HypergradInfo`.
    """
    bilevel = BilevelProblem(inner=problem.inner, outer=problem.outer)
    batches = jax.device_put((problem.inner_batch, problem.outer_batch))
    key = jax.random.key(options.get("seed", 0))

    def whole(params, meta, inner_batch, outer_batch, init):
        return estimator(bilevel, params, meta, inner_batch, outer_batch, key=key, init=init)

    @jax.jit
    def timed(*arguments):
        gradient, info = whole(*arguments)
        more = info.solution if warm else info._replace(solution=None) if certified else None
        return gradient, more, info.num_matvecs - (0 if certified else dropped)

    @jax.jit
    def told(*arguments):
        return whole(*arguments)[1]._replace(solution=None)

    def estimate(params, meta, init, restart):
        del restart  # it carries nothing but `init`
        return timed(params, meta, *batches, init)

    return estimate, lambda params, meta, init: told(params, meta, *batches, init)


def _runner(problem, estimate: Callable, inform: Callable | None, warm: bool):
    """`(run, num_products, report)` as `worker.py` wants them."""
    here = jax.device_put((problem.params, problem.meta))
    last = {"solution": None, "arguments": None, "products": None}

    def run(other=None, restart=False):
        params, meta = here if other is None else (other.params, other.meta)
        init, cold = None, restart or last["solution"] is None
        if warm:
            init = jax.tree.map(np.zeros_like, params) if cold else last["solution"]
        gradient, solution, last["products"] = estimate(params, meta, init, cold)
        if warm:
            last["solution"] = solution
        last["arguments"] = (params, meta, init)
        return jax.tree.map(np.asarray, gradient)

    def report():
        told = inform(*last["arguments"])._asdict() if inform else {}
        return {key: float(value) for key, value in told.items() if value is not None and np.ndim(value) == 0}

    return run, lambda: int(last["products"]), report
