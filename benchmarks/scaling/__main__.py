"""What a training step of every method costs on N devices: its communication, measured, and a model up to 1,024 chips.

    python -m benchmarks.scaling --out out/scaling
    python -m benchmarks.scaling --out out/scaling --methods stl,jtds
    python -m benchmarks.scaling --out out/scaling --from benchmarks/results/scaling.json    # tables and plots again

Measured, exactly and without running anything: the inner and the outer update of every method are compiled for four
devices, batches split and the state on every device, and the collectives are read out of the compiled program
(`benchmarks.scaling.collectives`). The same program is compiled for two sizes of the params, of the outer variables,
of the batch and of the method's own number (terms of a solver, tasks, ...), so that

    bytes = a(number) P + m M + s B + rest

P bytes of params, M of outer variables, B examples of the global batch. Beside it: FLOPs of both updates on one device,
as XLA counts them for a convolutional network, over those of single-task training.

Modelled (`benchmarks.scaling.model`): time of a step from these numbers and vendors' figures.
"""

import argparse
import json
import sys
from functools import partial

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

import auxjax
from auxjax.methods import Context
from auxjax.training.parallel import data_mesh, shard_batch
from benchmarks.scaling import collectives
from benchmarks.scaling.cases import ROWS, Case, Row, Sizes, make_case
from benchmarks.shared.machine import describe_machine
from benchmarks.shared.paths import home_path
from experiments import cli
from experiments.reporting import terminal

DEVICES = 4
TASKS = 2


# Without LLVM's optimisations the programs compile in half the time; their collectives are the same.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
REDUCTIONS = ("sharded", "explicit")


def lower_updates(row: Row, case: Case, sizes: Sizes, num_devices: int, reduction: str = "sharded") -> tuple[dict, int]:
    """Lowers the updates of a method for so many devices: `({"inner": lowered, "outer": lowered}, M in bytes)`.

    Args:
      row: the method.
      case: model, params and batch.
      sizes: of the case.
      num_devices: how many share the batch.
      reduction: "sharded": `make_step(mesh=)`, where the compiler puts in the communication. "explicit": every device
        computes on its part of the batch and `make_step(axis_name=)` averages gradients and products.

    Raises:
      ValueError: the method refuses explicit reductions.
    """
    mesh = data_mesh(num_devices)
    method = auxjax.methods.get(row.method, **row.options(sizes))
    optimizer = optax.with_extra_args_support(optax.sgd(1e-3, momentum=0.9))
    how = {"mesh": mesh} if reduction == "sharded" else {"axis_name": "data"}
    context = Context(case.model, optimizer, *([] if reduction == "sharded" else [_average]))
    init, _ = auxjax.make_step(case.model, method, optimizer)  # the state is made once and copied to all devices
    _, inner_update = auxjax.make_step(case.model, method._replace(outer=None), optimizer, donate=False, **how)
    state = jax.eval_shape(partial(init, jax.random.key(0)), case.params, case.batch)
    everywhere, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    state = jax.tree.map(partial(_placed, everywhere), state)
    batch = jax.tree.map(partial(_placed, split), case.batch)

    def outer_update(state, inner, outer):
        if reduction == "sharded":
            inner, outer = shard_batch((inner, outer), mesh)
        return method.outer(context, state, inner, outer, jax.random.fold_in(state.key, state.step))

    def program(update, batches):
        if reduction == "explicit":
            specs = (PartitionSpec(), *(PartitionSpec("data") for _ in range(batches)))
            update = jax.shard_map(update, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
        return jax.jit(update, out_shardings=everywhere).lower(state, *[batch] * batches)

    programs = {"inner": program(inner_update, 1)}
    if method.outer is not None:
        programs["outer"] = program(outer_update, 2)
    return programs, size_in_bytes(getattr(state.method, "meta", ()))


def _average(tree):
    return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, "data"), tree)


def _placed(sharding, leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def size_in_bytes(tree) -> int:
    """Of all arrays of a pytree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def point(row: Row, sizes: Sizes, reduction: str, heads: bool = True) -> dict:
    """Traffic of both updates at one point: `{"P": , "M": , "B": , "inner": Traffic, "outer": Traffic}`."""
    case = make_case(sizes, sizes.knob if row.tasks else TASKS, heads)
    programs, meta = lower_updates(row, case, sizes, DEVICES, reduction)
    traffic = {
        level: collectives.read(lowered.compile(compiler_options=FAST).as_text()) for level, lowered in programs.items()
    }
    return {"P": size_in_bytes(case.params), "M": meta, "B": sizes.batch, **traffic}


def flops(row: Row, knob: int) -> dict[str, float]:
    """FLOPs of both updates on one device, for the convolutional network, before XLA merges what is computed twice."""
    sizes = Sizes(width=32, meta=1000 if row.method == "n_jtds" else 32, batch=32, knob=knob, network="convnet")
    case = make_case(sizes, knob if row.tasks else TASKS)
    programs, _ = lower_updates(row, case, sizes, 1)
    return {level: max(float(lowered.cost_analysis()["flops"]), 0.0) for level, lowered in programs.items()}


def measure_row(row: Row) -> dict:
    """All of a method's numbers: `{"inner": {...}, "outer": {...}}`."""
    low, high = row.values
    base = Sizes(knob=low)
    points = {"base": base, "width": base._replace(width=64)}
    if row.knob:
        points |= {"knob": base._replace(knob=high), "knob and width": base._replace(knob=high, width=64)}
    more = {"batch": base._replace(batch=32)} | ({"meta": base._replace(meta=64)} if row.has_meta else {})
    found = {"sharded": {name: point(row, sizes, "sharded") for name, sizes in (points | more).items()}}
    if row.replicas:
        found["explicit"] = {name: point(row, sizes, "explicit") for name, sizes in points.items()}
    work = {knob: flops(row, knob) for knob in dict.fromkeys((low, high))}
    result = {}
    for level in work[low]:
        per_unit = (work[high][level] - work[low][level]) / ((high - low) or 1)
        result[level] = {reduction: fit(of, level, row) for reduction, of in found.items()}
        result[level] |= {"flops": work[low][level], "flops_per_unit": per_unit}
    return result


def fit(points: dict, level: str, row: Row) -> dict:
    """Slopes of the bytes of every kind in P, M, B and the row's number, and what is left.

    Args:
      points: `{"base": , "width": , ...}`, each from `point`.
      level: "inner" or "outer".
      row: the method.
    """
    base, unit = points["base"], (row.values[1] - row.values[0]) or 1
    traffic = {name: one[level] for name, one in points.items()}
    kinds = [kind for kind in collectives.KINDS if any(kind in one.bytes for one in traffic.values())]

    def slope(kind, name, size, origin="base"):
        if name not in points:
            return 0.0
        moved = traffic[name].bytes.get(kind, 0) - traffic[origin].bytes.get(kind, 0)
        return moved / (points[name][size] - points[origin][size])

    found = {}
    for kind in kinds:
        a, m, s = slope(kind, "width", "P"), slope(kind, "meta", "M"), slope(kind, "batch", "B")
        more = (slope(kind, "knob and width", "P", "knob") - a) / unit if row.knob else 0.0
        total = traffic["base"].bytes.get(kind, 0)
        rest = total - a * base["P"] - m * base["M"] - s * base["B"]
        found[kind] = {"params": a, "params_per_unit": more, "meta": m, "examples": s, "rest": rest}
    deeper = (traffic["knob"].depth - traffic["base"].depth) / unit if row.knob else 0.0
    return {
        "bytes": found,
        "depth": traffic["base"].depth,
        "depth_per_unit": deeper,
        "counts": dict(traffic["base"].counts),
        "looped_bytes": traffic["base"].looped_bytes,
        "unknown_loops": traffic["base"].unknown_loops,
    }


def measure(labels: list[str]) -> dict:
    """Measures these rows: what the JSON file holds."""
    found = {}
    with terminal.progress() as follow:
        on_step = follow("compiling", len(labels))
        for place, label in enumerate(labels):
            on_step(place)
            found[label] = measure_row(ROWS[label])
            jax.clear_caches()  # programs of other methods are of no more use and take memory
        on_step(len(labels))
    return {"devices": DEVICES, "machine": describe_machine(), "rows": assemble(found)}


def assemble(found: dict[str, dict]) -> list[dict]:
    """Rows of the JSON file from `measure_row` of every label; FLOPs become work, over the inner update of "stl"."""
    reference, rows = found["stl"]["inner"]["flops"], []
    for label in [label for label in ROWS if label in found]:
        row, levels = ROWS[label], {}
        for level, numbers in found[label].items():
            work = {"work": numbers["flops"] / reference, "work_per_unit": numbers["flops_per_unit"] / reference}
            levels[level] = {name: numbers[name] for name in REDUCTIONS if name in numbers} | work
        about = {"row": label, "method": row.method, "group": row.group}
        rows.append(about | {"knob": row.knob, "value": row.values[0], "default": row.default} | levels)
    return rows


def rows_of(text: str) -> list[str]:
    """Labels of the rows of these methods; "stl", what work is measured in, is always there."""
    wanted = text.split(",")
    for name in wanted:
        if name not in {row.method for row in ROWS.values()}:
            raise argparse.ArgumentTypeError(
                f"there is no method {name!r}; there are {', '.join(auxjax.methods.names())}"
            )
    return [label for label, row in ROWS.items() if row.method in ("stl", *wanted)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", metavar="DIR", type=home_path, help="put scaling.json, tables in Markdown and plots here")
    add("--methods", type=rows_of, default=list(ROWS), metavar="M,M,...", help="these and stl only (default: all)")
    add("--from", dest="source", metavar="FILE", type=home_path, help="read an earlier scaling.json, measure nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; bad input ends with one message on standard error and status 2."""
    options = parse(arguments)

    def run() -> None:
        result = json.loads(options.source.read_text()) if options.source else measure(options.methods)
        # Here and not above: this import sets up matplotlib, which `--help` and the measurement need not wait for.
        from benchmarks.scaling import report

        report.show(result)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "scaling.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            terminal.show_files("Files", report.write(result, options.out))

    return cli.guarded(run)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
