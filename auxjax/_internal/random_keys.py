"""Typed PRNG keys: the one check that every random function of the library makes.

JAX has two kinds of keys. Typed keys (`jax.random.key(0)`) carry their generator and cannot be mistaken for data;
old-style keys (`jax.random.PRNGKey(0)`) are plain `uint32` arrays, which a batch axis or a checkpoint can silently
reshape. The library takes typed keys only, and says so before anything is computed.
"""

import jax
import jax.numpy as jnp


def check_key(key, where: str) -> None:
    """Raises unless `key` is one typed PRNG key (a scalar of a key dtype).

    Args:
      key: what the caller passed.
      where: name of the public function and argument, for the message, e.g. `"langevin_step(key=)"`.

    Raises:
      TypeError: `key` is an old-style `uint32` key, no key at all, or an array of several keys.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        came = f"an array of dtype {dtype}, shape {key.shape}" if dtype is not None else f"{type(key).__name__}"
        raise TypeError(
            f"{where}: expected a typed PRNG key, got {came}. Make one with jax.random.key(seed); "
            "an old-style uint32 key becomes one through jax.random.wrap_key_data(old_key)."
        )
    if jnp.ndim(key) != 0:
        raise TypeError(
            f"{where}: expected one PRNG key, got an array of keys of shape {key.shape}. "
            "Pass a single key, or map over them with jax.vmap."
        )
