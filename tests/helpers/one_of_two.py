"""One of two processes that train together, for `test_processes`: `ADDRESS INDEX FILE METHOD ...`."""

import sys

import jax
import numpy as np

import tests.conftest  # noqa: F401  float64, as in every test


def main(address: str, index: str, file: str, *names: str) -> None:
    """Trains each method on the four devices of both processes; the first saves the params."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, 2, int(index))
    jax.config.update("jax_numpy_dtype_promotion", "standard")  # for optax.adam
    from tests.helpers.four_devices import train

    found = {}
    for name in names:
        state, _ = train(name, "sharded")
        found[name] = np.asarray(state.params["w"].addressable_data(0))
    if index == "0":
        np.savez(file, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
