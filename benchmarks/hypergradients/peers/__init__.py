"""Adaptors to other libraries that compute hypergradients, one file each; and the rules that they all keep.

    peer = get("torchopt")
    reason = peer.available()                       None: can be used; otherwise the reason why it cannot
    make = peer.entries("hypercleaning")["cg K=20"]
    run, num_products = make(problem, {})           everything that a training loop would do once, done here
    gradient = run()                                {name: NumPy array} like problem.meta

An adaptor has NAME, VERSION (a string; "" if not installed), `available()` and `entries(kind)`. An entry's label says
method and setting: "neumann K=20", "cg tol=1e-5", "unrolled T=20". `make` raises `LeftOut` where a problem is too large
for the entry, and refuses nothing else: what a library cannot do shows in the result.

    run(problem=None, restart=False)
        What has to be done at every outer step, from the outer gradient on; waits for the result. With a problem (one
        of the same shapes and data, such as a later point of a sequence), goes to its params and meta first. Entries
        labelled "warm" start from the solution of their last run unless restart=True.
    num_products
        Hessian-vector products of a run: a number where it is fixed, otherwise a function to be called after a run
        (None: not known). The products that set up a residual at zero are counted, since they are computed.
    options
        step: step size of the methods that want one by hand; by default problem.facts["step"].
        seed: of what is random (by default 0).

No adaptor imports its library, and none imports torch or JAX, before it is asked to.
"""

import importlib

NAMES = ("betty", "torchopt", "hypertorch", "hypergrad", "higher", "jaxopt", "lineax", "optimistix")


def get(name: str):
    """The adaptor of a library.

    Raises:
      ValueError: there is none.
    """
    if name not in NAMES:
        raise ValueError(f"there is no adaptor {name!r}; expected one of: {', '.join(NAMES)}")
    return importlib.import_module(f"benchmarks.hypergradients.peers.{name}")
