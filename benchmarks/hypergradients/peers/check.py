"""Checks the adaptors to other libraries, by hand: `python -m benchmarks.hypergradients.peers.check`.

    1. twins       every loss in torch against the one in JAX: value, gradients, Hessian-vector product
    2. truncated   a fixed number of products, against the same truncation on a dense Hessian in NumPy
    3. converged   methods run to the end, against the reference of the problem
    4. defects     what is known to be wrong in a library, measured anew; shown, and no failure of the check

Everything is in float64, except for the last part where it says so. Exit code 1 if anything in 1 to 3 is off; a library
that is not there is reported and skips its rows. The libraries are those of requirements.txt beside this file.
"""

import argparse
import functools
import sys
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich
import rich.table

from benchmarks.hypergradients import peers, problems
from benchmarks.hypergradients.peers import defects, dense, torch_losses
from benchmarks.shared.paths import home_path

TWINS = 1e-10
PROBLEMS = ("ridge", "quadratics", "hypercleaning-small")

# library -> label -> (what the same truncation is called in `dense`, its products, largest relative difference)
TRUNCATED = {
    "betty": {"neumann K=20": ("neumann", 20, 1e-10)},
    "torchopt": {"neumann K=20": ("neumann", 20, 1e-10), "cg K=20": ("cg", 20, 1e-6)},
    "hypertorch": {
        "neumann K=20": ("neumann", 20, 1e-10),
        "fixed_point K=20": ("neumann", 19, 1e-10),
        "cg K=20": ("cg", 20, 1e-6),
    },
    "hypergrad": {"neumann K=20": ("neumann", 20, 1e-10)},
    "higher": {"unrolled T=20": ("neumann", 19, 1e-3)},  # its steps leave params that are solved to 1e-7
    "jaxopt": {"cg K=20": ("cg", 20, 1e-6)},
    "lineax": {"cg K=20": ("cg", 20, 1e-6), "cg scaled K=20": ("cg", 20, 1e-6)},
    "optimistix": {"cg K=20": ("cg", 20, 1e-6), "cg scaled K=20": ("cg", 20, 1e-6)},
}
# library -> label -> largest relative error
CONVERGED = {
    "torchopt": {"cg tol=1e-6": 1e-4, "cg tol=1e-6 warm": 1e-4},
    "hypertorch": {"cg tol=1e-6": 1e-4},
    "jaxopt": {f"{name} tol=1e-6": 1e-4 for name in ("cg", "gmres", "bicgstab")} | {"default": 1e-2, "lu": 1e-8},
    "lineax": {f"{name} tol=1e-6": 1e-4 for name in ("cg", "cg scaled", "gmres", "bicgstab", "normal_cg")}
    | {"cg tol=1e-6 warm": 1e-4, "lu": 1e-8},
    "optimistix": {f"{name} tol=1e-6": 1e-4 for name in ("cg", "cg scaled", "gmres", "bicgstab")} | {"default": 1e-8},
}


class Row(NamedTuple):
    """One thing that was compared."""

    part: str
    what: str
    problem: str
    error: float
    bound: float

    @property
    def good(self) -> bool:
        return self.error <= self.bound  # false for a nan


def main() -> int:
    """Runs all parts, prints the tables, returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cache", type=home_path, default=problems.CACHE, help="folder of the built problems")
    parser.add_argument("--seed", type=int, default=0, help="of the problems")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # the libraries' own, about what they will do in the future
    jax.config.update("jax_enable_x64", True)

    def get(name):
        return problems.get(name, seed=arguments.seed, cache=arguments.cache)

    rows = twins(get)
    missing = {name: why for name in peers.NAMES if (why := peers.get(name).available()) is not None}
    for name in PROBLEMS:
        rows += libraries(get(name).cast("float64"), missing)
    table = rich.table.Table("part", "what", "problem", "error", "bound", "", title="Adaptors to other libraries")
    for row in rows:
        verdict = "ok" if row.good else "[red]OFF"
        table.add_row(row.part, row.what, row.problem, f"{row.error:.1e}", f"{row.bound:.0e}", verdict)
    rich.print(table)
    for name, why in missing.items():
        rich.print(f"not here: {name}: {why}")
    rich.print(defects.table(get, missing))
    off = sum(not row.good for row in rows)
    rich.print(f"{len(rows)} compared, {off} off")
    return int(off > 0)


def twins(get) -> list[Row]:
    """Part 1."""
    found = []
    for name in ("ridge", "quadratics", "logistic", "hypercleaning-small", "convnet"):
        found += _twin(get(name).cast("float64"))
    return found + _twin(_small_data_cleaning())


def _small_data_cleaning():
    """The losses of data cleaning on random data, so that no data set is needed."""
    rng = np.random.default_rng(0)
    batch = {"x": rng.standard_normal((50, 12)), "y": rng.integers(0, 10, 50).astype(np.int32)}
    empty = {key: {} for key in problems.Problem._fields}
    return problems.Problem(**empty)._replace(
        name="data_cleaning",
        kind="data_cleaning",
        precision="float64",
        params={"w": rng.standard_normal((12, 10))},
        meta={"logits": rng.standard_normal(50)},
        inner_batch=batch,
        outer_batch=batch,
        constants={"decay": 0.2},
    )


def _twin(problem) -> list[Row]:
    """Both losses of one problem, off the minimum: differences in value, gradients and a Hessian-vector product."""
    import torch

    rng = np.random.default_rng(1)
    moved = {key: leaf + 0.1 * rng.standard_normal(leaf.shape) for key, leaf in problem.params.items()}
    problem = problem._replace(params=moved)
    tangent = {key: rng.standard_normal(leaf.shape) for key, leaf in problem.params.items()}
    theirs = torch_losses.get(problem.kind, problem.constants)
    worst = {"value": 0.0, "gradient in params": 0.0, "gradient in meta": 0.0, "Hessian-vector product": 0.0}
    for loss, twin, batch in zip(
        (problem.inner, problem.outer), theirs, (problem.inner_batch, problem.outer_batch), strict=True
    ):
        gradient = jax.grad(loss, argnums=(0, 1))
        value = loss(problem.params, problem.meta, batch)
        in_params, in_meta = gradient(problem.params, problem.meta, batch)
        wide = {key: jnp.asarray(leaf) for key, leaf in problem.params.items()}
        in_wide = functools.partial(jax.grad(loss), meta=problem.meta, batch=batch)
        product = jax.jvp(in_wide, (wide,), (tangent,))[1]

        params = torch_losses.layout(problem.kind, problem.params)
        meta = torch_losses.layout(problem.kind, problem.meta)
        data = torch_losses.layout(problem.kind, batch, batch=True)
        for tensor in (*params.values(), *meta.values()):
            tensor.requires_grad_()
        torch_value = twin(params, meta, data)
        leaves = (*params.values(), *meta.values())
        grads = torch.autograd.grad(torch_value, leaves, create_graph=True, materialize_grads=True)
        grads = dict(zip((*params, *meta), grads, strict=True))
        along = torch_losses.layout(problem.kind, tangent)
        ends, starts = [grads[key] for key in params], [along[key] for key in params]
        products = torch.autograd.grad(ends, list(params.values()), starts, materialize_grads=True)
        found = (
            _relative(torch_value.detach().numpy(), np.asarray(value)),
            _difference(problem.kind, grads, in_params),
            _difference(problem.kind, grads, in_meta),
            _difference(problem.kind, dict(zip(params, products, strict=True)), product),
        )
        worst = {key: max(before, new) for (key, before), new in zip(worst.items(), found, strict=True)}
    return [Row("twin", what, problem.name, error, TWINS) for what, error in worst.items()]


def _difference(kind: str, tensors: dict, tree: dict) -> float:
    """Largest relative difference of the arrays in a JAX tree and their twins."""
    wanted = torch_losses.layout(kind, tree)
    return max(_relative(tensors[key].detach().numpy(), wanted[key].numpy()) for key in wanted)


def libraries(problem, missing: dict) -> list[Row]:
    """Parts 2 and 3 on one problem."""
    rows = []
    system = dense.system(problem)
    for name in peers.NAMES:
        if name in missing:
            continue
        entries = peers.get(name).entries(problem.kind)
        for label, (method, products, bound) in TRUNCATED.get(name, {}).items():
            solution = {
                "neumann": lambda k: dense.neumann(system, k, problem.facts["step"]),
                "cg": lambda k: dense.cg(system, k),
            }[method](products)
            wanted = dense.hypergradient(system, solution)
            error = _relative(_flat(entries[label](problem, {})[0]()), wanted)
            rows.append(Row("truncated", f"{name}: {label}", problem.name, error, bound))
        for label, bound in CONVERGED.get(name, {}).items():
            if label in entries:
                error = _relative(_flat(entries[label](problem, {})[0]()), _flat(problem.reference))
                rows.append(Row("converged", f"{name}: {label}", problem.name, error, bound))
    return rows


def _flat(tree: dict) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(tree[key], np.float64)) for key in sorted(tree)])


def _relative(value, wanted) -> float:
    """Relative difference; absolute where the expected value is zero."""
    size = np.linalg.norm(wanted)
    return float(np.linalg.norm(np.asarray(value) - wanted) / (size if size > 0 else 1.0))


if __name__ == "__main__":
    sys.exit(main())
