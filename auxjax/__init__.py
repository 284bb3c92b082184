"""auxjax: auxiliary learning in JAX, with exact hypergradients.

A model has one primary task that counts and auxiliary tasks that may help it or hurt it. auxjax learns how much of each
task and of each example to use. What users need is here; everything else is in the modules that these names come from.
"""

import importlib
import sys

from auxjax import methods as methods
from auxjax.formulas import soft_labels as soft_labels
from auxjax.formulas.langevin import add_langevin_noise as add_langevin_noise
from auxjax.formulas.langevin import langevin_step as langevin_step
from auxjax.formulas.losses import known_targets as known_targets
from auxjax.formulas.losses import weighted_loss as weighted_loss
from auxjax.formulas.score_matching import fisher_divergence as fisher_divergence
from auxjax.formulas.score_matching import score_matching_gradient as score_matching_gradient
from auxjax.formulas.simplex import keep_on_simplex as keep_on_simplex
from auxjax.formulas.simplex import project_simplex as project_simplex
from auxjax.hypergrad import Amortised as Amortised
from auxjax.hypergrad import BilevelProblem as BilevelProblem
from auxjax.hypergrad import Curvature as Curvature
from auxjax.hypergrad import Estimator as Estimator
from auxjax.hypergrad import HypergradInfo as HypergradInfo
from auxjax.hypergrad import OptimizerPoint as OptimizerPoint
from auxjax.hypergrad import amortise as amortise
from auxjax.hypergrad import finite_difference as finite_difference
from auxjax.hypergrad import fisher as fisher
from auxjax.hypergrad import gauss_newton as gauss_newton
from auxjax.hypergrad import implicit as implicit
from auxjax.hypergrad import one_step as one_step
from auxjax.hypergrad import optimizer_field as optimizer_field
from auxjax.hypergrad import optimizer_fixed_point as optimizer_fixed_point
from auxjax.hypergrad import single_loop as single_loop
from auxjax.hypergrad import unrolled as unrolled
from auxjax.hypergrad import warm_started as warm_started
from auxjax.interface import LossFunction as LossFunction
from auxjax.interface import Method as Method
from auxjax.interface import TaskLosses as TaskLosses
from auxjax.interface import TaskModel as TaskModel
from auxjax.interface import TrainState as TrainState
from auxjax.methods.shared.generation import Generator as Generator
from auxjax.methods.shared.policy import Policy as Policy
from auxjax.solvers import SolveInfo as SolveInfo
from auxjax.solvers import Solver as Solver
from auxjax.solvers import bicgstab as bicgstab
from auxjax.solvers import cg as cg
from auxjax.solvers import dense as dense
from auxjax.solvers import gmres as gmres
from auxjax.solvers import identity as identity
from auxjax.solvers import minres as minres
from auxjax.solvers import neumann as neumann
from auxjax.solvers import normal_cg as normal_cg
from auxjax.solvers import nystrom as nystrom
from auxjax.training.averaging import Average as Average
from auxjax.training.model_transforms import accumulate as accumulate
from auxjax.training.model_transforms import mixed_precision as mixed_precision
from auxjax.training.model_transforms import remat as remat
from auxjax.training.step import make_step as make_step
from auxjax.training.step import task_weights as task_weights
from auxjax.training.weight_learning import learn_weights as learn_weights
from auxjax.training.weight_learning import make_rounds as make_rounds
from auxjax.version import __version__ as __version__

# Modules of version 0.1 that have moved into `formulas`: their old names work until 1.0.
for _name in (
    "bargaining",
    "joint_generator",
    "langevin",
    "loss_combiners",
    "losses",
    "partition",
    "policy_gradient",
    "score_matching",
    "simplex",
    "soft_labels",
    "task_gradients",
):
    sys.modules[f"{__name__}.{_name}"] = importlib.import_module(f"{__name__}.formulas.{_name}")
del _name
