"""Linear solvers for hypergradients: `solve(matvec, b, *, init=None, key=None) -> (x, SolveInfo)` on pytrees."""

from auxjax.solvers.base import SolveInfo as SolveInfo
from auxjax.solvers.dense import dense as dense
from auxjax.solvers.identity import identity as identity
from auxjax.solvers.krylov import cg as cg
from auxjax.solvers.neumann import neumann as neumann
