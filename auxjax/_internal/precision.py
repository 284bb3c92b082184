"""The dtype in which sums and inner products are accumulated: at least float32, and float64 where data is float64.

Half-precision floats keep 8 to 11 bits: a sum of a few hundred terms in them has no correct digit left. Everything
here that adds numbers up (losses, inner products, projections) therefore converts first and rounds once, at the end.
"""

import jax
import jax.numpy as jnp


def accumulation_dtype(*values) -> jnp.dtype:
    """Returns float64 when an array among `values` (arrays or pytrees of arrays) is float64, and float32 otherwise."""
    # Compared by name: NumPy takes None for float64 in a comparison with a dtype.
    wide = any(str(getattr(leaf, "dtype", None)) == "float64" for leaf in jax.tree.leaves(values))
    # NumPy has float64 by default, JAX only with jax_enable_x64: without it the answer is float32 all the same.
    return jax.dtypes.canonicalize_dtype("float64" if wide else "float32")
