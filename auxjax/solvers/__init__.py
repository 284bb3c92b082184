"""Linear solvers for hypergradients: `solve(matvec, b, *, init=None, key=None) -> (x, SolveInfo)` on pytrees."""

from auxjax.solvers._dense import dense as dense
from auxjax.solvers._gmres import gmres as gmres
from auxjax.solvers._identity import identity as identity
from auxjax.solvers._minres import minres as minres
from auxjax.solvers._neumann import neumann as neumann
from auxjax.solvers._nystrom import nystrom as nystrom
from auxjax.solvers.base import Operator as Operator
from auxjax.solvers.base import SolveInfo as SolveInfo
from auxjax.solvers.base import Solver as Solver
from auxjax.solvers.krylov import cg as cg
from auxjax.solvers.nonsymmetric import bicgstab as bicgstab
from auxjax.solvers.nonsymmetric import normal_cg as normal_cg
from auxjax.solvers.power_iteration import PowerEstimate as PowerEstimate
from auxjax.solvers.power_iteration import power_iteration as power_iteration
from auxjax.solvers.preconditioners import adam_preconditioner as adam_preconditioner
from auxjax.solvers.preconditioners import diagonal_preconditioner as diagonal_preconditioner
from auxjax.solvers.preconditioners import nystrom_preconditioner as nystrom_preconditioner
from auxjax.solvers.preconditioners import nystrom_preparation as nystrom_preparation
