"""What all adaptors share that needs neither torch nor JAX: grids of settings, their labels, and what is installed."""

import importlib
import importlib.metadata
from collections.abc import Callable

PRODUCTS = (10, 20, 40, 80, 160, 320, 640, 1280)
TOLERANCES = tuple(10 ** (-exponent / 2) for exponent in range(2, 13))  # 1e-1, 10^-1.5, ... 1e-6
MOST_PRODUCTS = 5000  # of entries that stop at a tolerance; what does not converge must end
DENSE = 2000  # the most params for which a Hessian is formed


def by_products(name: str, make: Callable, grid=PRODUCTS, **fixed) -> dict[str, Callable]:
    """Entries `"name K=20"` for a grid of numbers of products; `make(problem, options, num_products=..., **fixed)`."""
    return {f"{name} K={k}": _bind(make, num_products=k, **fixed) for k in grid}


def by_tolerance(name: str, make: Callable, grid=TOLERANCES, suffix: str = "", **fixed) -> dict[str, Callable]:
    """Entries `"name tol=1e-5"` for a grid of tolerances; `make(problem, options, tolerance=..., **fixed)`."""
    return {f"{name} tol={tolerance_label(t)}{suffix}": _bind(make, tolerance=t, **fixed) for t in grid}


def tolerance_label(tolerance: float) -> str:
    """A tolerance as in the labels: 1e-5, 3.2e-5."""
    mantissa, exponent = f"{tolerance:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def version(distribution: str) -> str:
    """The installed version of a distribution, or the empty string."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def why_not(*modules: str, has: str = "") -> str | None:
    """Why a library cannot be used: None if all modules can be imported (and the last one has the attribute `has`)."""
    module = None
    for name in modules:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # a library may fail in any way when it is imported; the reason is reported
            return f"import {name} fails: {type(error).__name__}: {error}"
    if has and not hasattr(module, has):
        return f"the module {modules[-1]} that is installed has no {has}: it is another library of the same name"
    return None


def _bind(make: Callable, **fixed) -> Callable:
    def bound(problem, options):
        return make(problem, options, **fixed)

    return bound
