"""Hypergradients: what a bilevel problem is, and how to differentiate it."""

from auxjax.hypergrad.finite_difference import finite_difference as finite_difference
from auxjax.hypergrad.implicit import implicit as implicit
from auxjax.hypergrad.one_step import one_step as one_step
from auxjax.hypergrad.problem import BilevelProblem as BilevelProblem
from auxjax.hypergrad.problem import HypergradInfo as HypergradInfo
from auxjax.hypergrad.unrolled import unrolled as unrolled
