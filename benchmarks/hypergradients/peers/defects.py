"""What is known to be wrong in other libraries, measured in the installed versions: `table(get, missing)`.

Every function below measures one thing and returns sentences with numbers, the same quantity for the library and for
what it should be. They call the adaptors' entries, or the library itself where the adaptor avoids the defect. Nothing
here judges: a defect that is gone shows as two numbers that agree.
"""

import numpy as np
import rich.table

from benchmarks.hypergradients import peers
from benchmarks.hypergradients.peers import dense


def table(get, missing: dict) -> rich.table.Table:
    """All that can be measured with the libraries that are here."""
    shown = rich.table.Table("library", "version", "what", "measured", title="Known defects, measured", show_lines=True)
    for name, what, measure in _CASES:
        if name in missing:
            continue
        try:
            measured = measure(get)
        except Exception as error:  # a library that fails here is a finding, not a failure of the check
            measured = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        shown.add_row(name, peers.get(name).VERSION, what, measured)
    return shown


def _cg_old_residual(name: str):
    """CG whose new direction is made from the residual before the step."""

    def measure(get):
        problem = get("hypercleaning-small")
        exact = _truncated_cg_error(problem, 20)
        found = {k: _error(peers.get(name).entries(problem.kind)[f"cg K={k}"], problem) for k in (20, 40)}
        return f"error {_percent(found[20])} after 20 steps, {_percent(found[40])} after 40; CG: {_percent(exact)}"

    return measure


def _betty_cg_scale(get) -> str:
    """CG with `cg_alpha`, which scales the curvature and the solution but not the update of the residual."""
    from benchmarks.hypergradients.peers import betty, torch_point

    problem = get("hypercleaning-small")
    errors = {}
    for alpha in (1.0, 0.5):
        point = torch_point.load(problem, {})
        upper, kept = betty.build(point, {"type": "cg", "cg_iterations": 20, "cg_alpha": alpha})
        upper.one_step_descent()
        errors[alpha] = _relative(torch_point.arrays(point, kept), problem.reference)
    return f"error {_percent(errors[1.0])} at cg_alpha 1, {_percent(errors[0.5])} at 0.5; the same if it were a scale"


def _betty_darts(get) -> str:
    """Finite difference that does not put the params back."""
    import torch

    from benchmarks.hypergradients.peers import betty, torch_point

    point = torch_point.load(get("hypercleaning-small"), {})
    before = [tensor.clone() for tensor in point.params]
    upper, _ = betty.build(point, {"type": "darts"})
    upper.one_step_descent()
    moved = torch.cat([(new - old).ravel() for new, old in zip(point.params, before, strict=True)]).norm()
    return f"params moved by {float(moved):.1e} in one call (darts_alpha = 1e-2); nothing should move"


def _torchopt_dense(get) -> str:
    """Dense solve with each tensor's own block of the Hessian."""
    problem = get("hypercleaning-small")
    error = _error(peers.get("torchopt").entries(problem.kind)["dense"], problem)
    return f"error {_percent(error)} with 4 tensors of params; a dense solve: below 1e-10"


def _torchopt_limit(get) -> str:
    """The default number of steps, from the shape of the unknown and not from its size."""
    del get
    import torch
    import torchopt

    unknown, count = torch.ones(30, 40, dtype=torch.float64), [0]

    def matvec(x):
        count[0] += 1
        return x * torch.linspace(1, 1e12, x.numel(), dtype=x.dtype).reshape(x.shape)

    torchopt.linalg.cg(matvec, unknown, rtol=1e-300)
    return f"stops after {count[0] - 1} steps for a 30 x 40 unknown; documented: 10 x 1200"


def _hypertorch_last_step(get) -> str:
    """CG that returns the iterate before the one that met the tolerance."""
    problem = get("hypercleaning-small")
    run, products = peers.get("hypertorch").entries(problem.kind)["cg tol=1e-1"](problem, {})
    error = _relative(run(), problem.reference)
    made = products()
    exact = _truncated_cg_error(problem, made)
    return f"error {_percent(error)} after {made} products; CG after {made}: {_percent(exact)}"


def _lineax_breakdown(name: str, method: str):
    """Solvers of lineax that give up on a flat loss in float32, where the solution can be had."""

    def measure(get):
        problem = get("logistic")
        entries = peers.get("lineax").entries(problem.kind)
        found = _error(entries[f"{method} tol=1e-5"], problem)
        other = _error(entries["cg scaled tol=1e-5"], problem)
        return f"{name}: error {_percent(found)}; its CG on the same system times a number: {_percent(other)}"

    return measure


def _jaxopt_default(get) -> str:
    """The default, normal CG at a tolerance of 1e-5: the residual of the squared system says little."""
    problem = get("logistic")
    entries = peers.get("jaxopt").entries(problem.kind)
    found, other = _error(entries["default"], problem), _error(entries["cg tol=1e-5"], problem)
    return f"error {_percent(found)} as it comes; solve_cg at the same tolerance: {_percent(other)}"


def _hypergrad_nystrom(get) -> str:
    """Nystrom with the damping as the curvature of everything outside its columns."""
    problem = get("hypercleaning-small")
    entries = peers.get("hypergrad").entries(problem.kind)
    found = [
        f"{_percent(_error(entries[f'nystrom rank=20 rho={rho}'], problem))} at rho {rho}" for rho in ("0.1", "0.01")
    ]
    return "error " + ", ".join(found) + "; 100 % is not a gradient at all"


_CASES = (
    ("betty", "CG turns to its new direction with the old residual", _cg_old_residual("betty")),
    ("betty", "cg_alpha, called a scale, changes the result", _betty_cg_scale),
    ("betty", "darts leaves the params displaced", _betty_darts),
    ("torchopt", "solve_inv() uses each tensor's own block of the matrix only", _torchopt_dense),
    ("torchopt", "default limit of CG counts the axes' lengths, not the numbers", _torchopt_limit),
    ("hypertorch", "CG drops the step that met its tolerance", _hypertorch_last_step),
    ("hypergrad", "CG turns to its new direction with the old residual", _cg_old_residual("hypergrad")),
    ("hypergrad", "Nystrom at rank 20 of 320", _hypergrad_nystrom),
    ("jaxopt", "default solver in float32", _jaxopt_default),
    ("lineax", "CG is NaN unless p'Hp > 200 eps n r'r (float32)", _lineax_breakdown("CG", "cg")),
    (
        "lineax",
        "BiCGStab gives up early (float32, flat loss)",
        _lineax_breakdown("BiCGStab", "bicgstab"),
    ),
)


def _truncated_cg_error(problem, steps: int) -> float:
    """Error of correct CG after some steps."""
    system = dense.system(problem)
    return _relative_flat(dense.hypergradient(system, dense.cg(system, steps)), _flat(problem.reference))


def _error(make, problem) -> float:
    run, _ = make(problem, {})
    return _relative(run(), problem.reference)


def _relative(result: dict, reference: dict) -> float:
    return _relative_flat(_flat(result), _flat(reference))


def _relative_flat(result, reference) -> float:
    return float(np.linalg.norm(result - reference) / np.linalg.norm(reference))


def _flat(tree: dict) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(tree[key], np.float64)) for key in sorted(tree)])


def _percent(error: float) -> str:
    return f"{100 * error:.3g} %"
