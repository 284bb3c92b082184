"""What a loop costs on a CPU whose body has convolutions: as it stands, with its channels last, and written out.

    python -m benchmarks.loop_forms

Ten products of a small ConvNet's Hessian with a vector, as a solver takes them. Each form is compiled, and then all
take turns in one process; ratios are formed within a turn. `auxjax._internal.convolutions` makes the second form.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from auxjax._internal.convolutions import channels_last
from auxjax.models import ConvNet
from benchmarks.shared.command import measure_and_show
from benchmarks.shared.machine import describe_machine
from benchmarks.shared.paths import home_path
from benchmarks.shared.timing import median_interval
from experiments import cli

PRODUCTS = 10
FORMS = ("loop", "loop, channels last", "written out")


def programs(side: int, channels: tuple[int, ...], batch: int) -> tuple[dict, jax.Array]:
    """`{form: function of a vector}`, and a vector to start from."""
    network = ConvNet(heads={"y": 10}, channels=channels)
    images = jax.random.normal(jax.random.key(0), (batch, side, side, 3))
    labels = jnp.arange(batch) % 10
    flat, unravel = ravel_pytree(network.init(jax.random.key(1), images)["params"])

    def loss(flat):
        logits = network.apply({"params": unravel(flat)}, images).heads["y"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def product(vector):
        found = jax.jvp(jax.grad(loss), (flat,), (vector,))[1]
        return found / jnp.linalg.norm(found)

    def repeat(body, unroll):
        return jax.jit(
            lambda start: jax.lax.scan(lambda v, _: (body(v), None), start, length=PRODUCTS, unroll=unroll)[0]
        )

    found = repeat(product, 1), repeat(channels_last(product), 1), repeat(product, PRODUCTS)
    return dict(zip(FORMS, found, strict=True)), jax.random.normal(jax.random.key(2), flat.shape)


def measure(options: argparse.Namespace) -> dict:
    """Compiles and times the forms."""
    made, start = programs(options.side, tuple(options.channels), options.batch)
    first, times = {}, {form: [] for form in made}
    for turn in range(options.turns + 1):
        for form, function in made.items():
            began = time.perf_counter()
            jax.block_until_ready(function(start))
            seconds = time.perf_counter() - began
            if turn:
                times[form].append(seconds)
            else:
                first[form] = seconds
    quickest = np.array(times["written out"])
    rows = [
        {
            "form": form,
            "first_call_s": first[form],
            "ms": median_interval(1e3 * np.array(values)),
            "times_written_out": median_interval(np.array(values) / quickest),
        }
        for form, values in times.items()
    ]
    return {"machine": describe_machine(), "rows": rows}


def show(result: dict) -> None:
    """Prints the rows."""
    print(f"{'form':22}{'first call, s':>15}{'ms':>10}{'times written out':>20}")
    for row in result["rows"]:
        medians = row["ms"]["median"], row["times_written_out"]["median"]
        print(f"{row['form']:22}{row['first_call_s']:>15.1f}{medians[0]:>10.1f}{medians[1]:>20.2f}")


def main(argv=None) -> int:
    """Runs the command line."""
    parser = cli.bare_parser("python -m benchmarks.loop_forms", __doc__)
    parser.add_argument("--side", type=int, default=16, metavar="N", help="of the images (default 16)")
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64], metavar="C", help="(default 16 32 64)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images (default 64)")
    parser.add_argument("--turns", type=int, default=7, metavar="N", help="of each form (default 7)")
    parser.add_argument("--json", type=home_path, metavar="FILE", help="also write all numbers and the hardware there")
    options = parser.parse_args(argv)
    if options.turns < 1:
        parser.error(f"--turns {options.turns}: expected at least 1")
    return measure_and_show(options, measure, show)


if __name__ == "__main__":
    raise SystemExit(main())
