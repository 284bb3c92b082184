"""Hypergradients: what a bilevel problem is, and how to differentiate it."""

from auxjax.hypergrad._finite_difference import finite_difference as finite_difference
from auxjax.hypergrad._implicit import implicit as implicit
from auxjax.hypergrad._one_step import one_step as one_step
from auxjax.hypergrad._unrolled import unrolled as unrolled
from auxjax.hypergrad.amortised import Amortised as Amortised
from auxjax.hypergrad.amortised import amortise as amortise
from auxjax.hypergrad.amortised import single_loop as single_loop
from auxjax.hypergrad.amortised import warm_started as warm_started
from auxjax.hypergrad.curvature import fisher as fisher
from auxjax.hypergrad.curvature import gauss_newton as gauss_newton
from auxjax.hypergrad.fixed_point import OptimizerPoint as OptimizerPoint
from auxjax.hypergrad.fixed_point import optimizer_field as optimizer_field
from auxjax.hypergrad.fixed_point import optimizer_fixed_point as optimizer_fixed_point
from auxjax.hypergrad.problem import BilevelProblem as BilevelProblem
from auxjax.hypergrad.problem import Curvature as Curvature
from auxjax.hypergrad.problem import Estimator as Estimator
from auxjax.hypergrad.problem import HypergradInfo as HypergradInfo
