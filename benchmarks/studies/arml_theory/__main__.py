"""ARML's theory on Gaussian tasks: its two surrogates, its weights with and without noise, and the ideal ones.

    python -m benchmarks.studies.arml_theory                      # the whole, to out/arml_theory
    python -m benchmarks.studies.arml_theory --quick --out out/quick
    python -m benchmarks.studies.arml_theory --seeds 0,1,2,3,4,5,6,7 --dims 2,8

The true prior is p* = N(mu*, rho^2 / d I). The primary task's parameters are one draw of p*; its n_0 examples are
linear regression with unit noise. Five auxiliary tasks are regressions, too: the optima of three are near mu*, those of
two are far from it. With equal weights the surrogate prior p_w ~ prod_k p_k^{w_k} is as narrow as p*. Weights
sum to 5. Everything is Gaussian, so benchmarks/studies/arml_theory/gaussian.py has in closed form

    ideal          argmin KL(p* || p_w)
    A7, full       argmin E_{p_J} [log p_0 - log p_w], the paper's first surrogate, p_J moving with the weights
    A7             the same with p_J held fixed at the weights themselves
    Fisher, full   argmin E_{p_J} |g_0 - sum_k w_k g_k|^2, p_J moving with the weights
    Fisher         the same with p_J held fixed at the weights themselves: ARML's fixed point
    Fisher, mode   as Fisher, all samples at the mode of p_J: no noise at all
    Fisher, batch  as Fisher, gradients of mini-batches (batch, mode: of both kinds)

and auxjax.methods.get("arml") is run on the losses: "langevin" (two_stage, full batches), "no noise" (merged, full
batches), "batches" (merged, mini-batches, so gradient noise alone) and "both" (two_stage, mini-batches).

Three settings, the last two up to 32 dimensions:

    alike      all auxiliary tasks have the same noise; losses are negative log-likelihoods, sums over examples
    unequal    noise variances differ ninefold: precisions 3, 1, 1/3 for the near tasks and 3, 1/3 for the far ones
    mean       as alike, but ARML sees mean losses, as training code has it: every task counts as n_0 examples

Reported: |w - w_ideal|_1 / K, between 0 and 2; KL(p* || p_w) - KL(p* || p_ideal) in nats; and, for the paper's Table 5,
the standard deviation of the gradient noise in one Langevin step beside that of the injected noise.
"""

import argparse
import json
import pathlib
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from benchmarks.shared.paths import home_path
from benchmarks.studies.arml_theory import gaussian, plots
from benchmarks.studies.arml_theory.runs import COUNT, MODES, RHO, make_replica, run_arml
from experiments.evaluation.statistics import mean_and_interval
from experiments.reporting import terminal

SETTINGS = ("alike", "unequal", "mean")
CLOSED = {
    "langevin": "Fisher",
    "no noise": "Fisher, mode",
    "batches": "Fisher, batch, mode",
    "both": "Fisher, batch",
}
# What a noise does to the weights: they are compared with and without it.
MOVES = {
    "injected": ("langevin", "no noise"),
    "gradient": ("batches", "no noise"),
    "injected beside gradient": ("both", "batches"),
    "injected, closed form": ("Fisher", "Fisher, mode"),
}
LARGEST = 32  # dimension of the settings other than "alike"


@partial(jax.jit, static_argnames=("batch",))
def closed_forms(tasks, factor, centre, *, batch: int) -> dict:
    """All weights in closed form, the solvers' gaps, and the noise at ARML's fixed point; leading axis: replicas."""

    def single(arguments):
        tasks, factor, centre = arguments
        equal = jnp.ones(COUNT)
        prior = as_prior(tasks, factor)
        covariance = RHO**2 / centre.shape[0] * jnp.eye(centre.shape[0])
        smooth = {
            "ideal": lambda w: gaussian.true_prior_divergence(prior, w, centre, covariance),
            "A7, full": lambda w: gaussian.surrogate_divergence(tasks, w),
            "Fisher, full": lambda w: gaussian.fisher_objective(tasks, w),
        }
        found = {name: gaussian.minimise_on_simplex(value, equal, tolerance=1e-11) for name, value in smooth.items()}
        found["A7"] = gaussian.surrogate_fixed_point(tasks, equal)
        for name, size in (("Fisher", None), ("Fisher, batch", batch)):
            for ending, heat in (("", 1.0), (", mode", 0.0)):
                found[name + ending] = gaussian.fisher_fixed_point(tasks, equal, heat, size)
        weights = {"equal": equal} | {name: value[0] for name, value in found.items()}
        at = weights["Fisher"]
        every = jnp.concatenate([jnp.ones(1), at])
        noise = jnp.sum(jnp.square(every) * gaussian.batch_noise(tasks, at)) / batch
        return {
            "weights": weights,
            "gaps": {name: value[1] for name, value in found.items()},
            "steps": {name: value[2] for name, value in found.items()},
            "noise": noise / centre.shape[0],
            "largest": largest_curvature(tasks),
        } | scales(tasks, batch)

    return jax.lax.map(single, (tasks, factor, centre))


def as_prior(tasks, factor):
    """The tasks with their auxiliary log-likelihoods as they are, and not as ARML sees them."""
    undo = jnp.concatenate([jnp.ones(1), jnp.full(COUNT, 1.0) / factor])
    return tasks._replace(precision=undo[:, None, None] * tasks.precision, linear=undo[:, None] * tasks.linear)


def largest_curvature(tasks):
    """Largest eigenvalue of the joint Hessian at equal weights."""
    return jnp.linalg.eigvalsh(gaussian.distribution(tasks, jnp.ones(COUNT), primary=1.0).precision)[-1]


def scales(tasks, batch: int) -> dict:
    """What ARML is started and stepped with: the joint mode at equal weights, and the size of the Gram matrix there."""
    equal = jnp.ones(COUNT)
    gram = gaussian.expected_gram(tasks, equal)[1:, 1:]
    noise = gaussian.batch_noise(tasks, equal)[1:] / batch
    return {
        "start": gaussian.distribution(tasks, equal, primary=1.0).mean,
        "gram": jnp.linalg.eigvalsh(gram)[-1],
        "gram_batch": jnp.linalg.eigvalsh(gram + jnp.diag(noise))[-1],
    }


@jax.jit
def excess_divergence(tasks, factor, centre, weights: dict, ideal) -> dict:
    """KL(p* || p_w) - KL(p* || p_ideal) of every kind of weights; leading axis: replicas."""

    def single(arguments):
        tasks, factor, centre, weights, ideal = arguments
        prior = as_prior(tasks, factor)
        covariance = RHO**2 / centre.shape[0] * jnp.eye(centre.shape[0])
        divergence = partial(gaussian.true_prior_divergence, prior, mean=centre, covariance=covariance)
        return {name: divergence(weights=value) - divergence(weights=ideal) for name, value in weights.items()}

    return jax.lax.map(single, (tasks, factor, centre, weights, ideal))


def measure(dim: int, options: argparse.Namespace, follow) -> list[dict]:
    """One row per replica of this dimension."""
    settings = [setting for setting in options.settings if setting == "alike" or dim <= LARGEST]
    cells = [(setting, n, seed) for setting in settings for n in options.primary for seed in options.seeds]
    replicas = [make_replica(seed, dim, n, setting, max(options.primary)) for setting, n, seed in cells]
    tasks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[replica.tasks for replica in replicas])
    factors, centres = (jnp.array([getattr(r, name) for r in replicas]) for name in ("factor", "centre"))
    mark = follow(f"d = {dim}, closed forms", 1)
    mark(0)
    closed = jax.tree.map(np.asarray, closed_forms(tasks, factors, centres, batch=options.batch))
    mark(1)
    weights = closed["weights"]
    for mode in MODES:
        weights[mode] = run_arml(mode, replicas, closed, options, follow(f"d = {dim}, {mode}", options.steps))
    excess = excess_divergence(tasks, factors, centres, weights, weights["ideal"])
    rows = []
    for place, (setting, primary, seed) in enumerate(cells):
        step = options.step_size / closed["largest"][place]
        rows.append(
            {
                "setting": setting,
                "dim": dim,
                "primary": primary,
                "seed": seed,
                "weights": {name: value[place].tolist() for name, value in weights.items()},
                "distance": {
                    name: float(np.abs(value[place] - weights["ideal"][place]).sum() / COUNT)
                    for name, value in weights.items()
                },
                "from_closed": {
                    mode: float(np.abs(weights[mode][place] - weights[name][place]).sum() / COUNT)
                    for mode, name in CLOSED.items()
                },
                "moved": {
                    name: float(np.abs(weights[a][place] - weights[b][place]).sum() / COUNT)
                    for name, (a, b) in MOVES.items()
                },
                "excess": {name: float(value[place]) for name, value in excess.items()},
                "gaps": {name: float(value[place]) for name, value in closed["gaps"].items()},
                "gradient_noise": float(step * np.sqrt(closed["noise"][place])),
                "injected_noise": float(np.sqrt(2 * step)),
            }
        )
    return rows


def summarise(rows: list[dict]) -> list[dict]:
    """Means and half widths of 95 % intervals over seeds, by setting, dimension and number of primary examples."""

    def entry(values):
        mean, half = mean_and_interval(values)
        return {"mean": mean, "half_width": half if len(values) > 1 else None}

    found = []
    for group in dict.fromkeys((row["setting"], row["dim"], row["primary"]) for row in rows):
        same = [row for row in rows if (row["setting"], row["dim"], row["primary"]) == group]
        record = dict(zip(("setting", "dim", "primary"), group, strict=True)) | {"seeds": len(same)}
        for name in ("distance", "excess", "from_closed", "moved"):
            record[name] = {kind: entry([row[name][kind] for row in same]) for kind in same[0][name]}
        record["noise_ratio"] = entry([row["gradient_noise"] / row["injected_noise"] for row in same])
        equal = sum(row["excess"]["equal"] for row in same)
        record["share"] = {kind: sum(row["excess"][kind] for row in same) / equal for kind in same[0]["excess"]}
        found.append(record)
    return found


def show(summary: list[dict]) -> None:
    """Prints two tables for each setting, of means over seeds."""
    kinds = ("equal", "A7, full", "A7", "Fisher, full", "Fisher", "Fisher, mode", *MODES)
    titles = {"distance": "|w - w_ideal|_1 / K", "excess": "KL(p* || p_w) - KL(p* || p_ideal), nats"}
    for setting in dict.fromkeys(record["setting"] for record in summary):
        for quantity, title in titles.items():
            table = Table(title=f"{setting}: {title}", title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
            for heading in ("d", "n_0", *kinds):
                table.add_column(heading.replace(", ", "\n"), justify="right")
            for record in sorted(
                (r for r in summary if r["setting"] == setting), key=lambda r: (r["dim"], r["primary"])
            ):
                cells = [f"{record[quantity][kind]['mean']:.3g}" for kind in kinds]
                table.add_row(str(record["dim"]), str(record["primary"]), *cells)
            terminal.show(table)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""

    def integers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.arml_theory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--seeds", type=integers, metavar="S,S,...", help="default 0,1,2,3,4")
    add("--dims", type=integers, metavar="D,D,...", help="default 2,8,32,128")
    add("--primary", type=integers, metavar="N,N,...", help="numbers of primary examples; default 4,16,64,256,1024")
    add("--settings", type=lambda text: tuple(text.split(",")), default=SETTINGS, help=f"of {','.join(SETTINGS)}")
    add("--steps", type=int, help="updates of params and weights (default 3000)")
    add("--batch", type=int, default=16, help="examples per task of a mini-batch (default 16)")
    add("--step-size", type=float, default=0.1, help="times the largest curvature (default 0.1)")
    add("--rate", type=float, default=0.05, help="of the weights, times the Gram matrix's largest eigenvalue")
    add("--key", type=int, default=0, help="seed of noise and batches (default 0)")
    add("--quick", action="store_true", help="seeds 0,1, dimensions 2,8, 4 and 64 examples, 300 steps")
    add("--out", type=home_path, default=pathlib.Path("out/arml_theory"), help="folder (default out/arml_theory)")
    options = parser.parse_args(arguments)
    usual = {"seeds": (0, 1), "dims": (2, 8), "primary": (4, 64), "steps": 300} if options.quick else {}
    usual = {
        "seeds": tuple(range(5)),
        "dims": (2, 8, 32, 128),
        "primary": (4, 16, 64, 256, 1024),
        "steps": 3000,
    } | usual
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if unknown := sorted(set(options.settings) - set(SETTINGS)):
        parser.error(f"--settings {unknown[0]}: expected {', '.join(SETTINGS)}")
    for name, least in (("seeds", 0), ("dims", 1), ("primary", 1)):
        if not getattr(options, name) or min(getattr(options, name)) < least:
            parser.error(f"--{name}: expected numbers of at least {least}")
    if min(options.steps, options.batch) < 1 or not 0 < options.step_size < 1 or not 0 < options.rate < 1:
        parser.error("expected --steps and --batch of at least 1, and --step-size and --rate between 0 and 1")
    return options


def main(arguments: list[str] | None = None) -> dict:
    """Runs everything; returns what it writes to arml_theory.json."""
    options = parse(arguments)
    began, rows = time.perf_counter(), []
    with jax.enable_x64(True), terminal.progress() as follow:
        for dim in options.dims:
            rows += measure(dim, options, follow)
    summary = summarise(rows)
    show(summary)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    seconds = round(time.perf_counter() - began, 1)
    result = {"settings": settings, "jax": jax.__version__, "seconds": seconds, "summary": summary, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "arml_theory.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    terminal.show_files("Files", [path, *plots.draw_all(result, options.out)])
    return result


if __name__ == "__main__":
    main()
