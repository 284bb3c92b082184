"""Hypergradients: what a bilevel problem is, and how to differentiate it."""

from auxjax.hypergrad.implicit import implicit as implicit
from auxjax.hypergrad.problem import BilevelProblem as BilevelProblem
from auxjax.hypergrad.problem import HypergradInfo as HypergradInfo
