"""A problem as tensors, for the adaptors to torch libraries, which all work on tuples of tensors."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.hypergradients.peers import torch_losses


class Point(NamedTuple):
    """A problem at a point.

    Attributes:
      params: tensors, not requiring gradients; changed in place by `move`.
      meta: likewise.
      inner: `(params, meta) -> scalar`, of sequences of tensors; the data is bound.
      outer: likewise.
      step: step size for methods that want one by hand.
      kind: of the problem.
      names: of the params, and of the meta tensors.
    """

    params: tuple[torch.Tensor, ...]
    meta: tuple[torch.Tensor, ...]
    inner: Callable
    outer: Callable
    step: float
    kind: str
    names: tuple[tuple[str, ...], tuple[str, ...]]


def load(problem, options: dict) -> Point:
    """Copies a problem into tensors."""
    params = torch_losses.layout(problem.kind, problem.params)
    meta = torch_losses.layout(problem.kind, problem.meta)
    losses = torch_losses.get(problem.kind, problem.constants)
    batches = (problem.inner_batch, problem.outer_batch)
    bound = [
        _bind(loss, tuple(params), tuple(meta), torch_losses.layout(problem.kind, batch, batch=True))
        for loss, batch in zip(losses, batches, strict=True)
    ]
    return Point(
        params=tuple(params.values()),
        meta=tuple(meta.values()),
        inner=bound[0],
        outer=bound[1],
        step=float(options.get("step", problem.facts["step"])),
        kind=problem.kind,
        names=(tuple(params), tuple(meta)),
    )


def move(point: Point, problem) -> None:
    """Goes to the params and meta of another problem, in place; stays where it is if that is None."""
    if problem is None:
        return
    with torch.no_grad():
        for names, tensors, tree in zip(
            point.names, (point.params, point.meta), (problem.params, problem.meta), strict=True
        ):
            new = torch_losses.layout(point.kind, tree)
            for name, tensor in zip(names, tensors, strict=True):
                tensor.copy_(new[name])


def arrays(point: Point, grads) -> dict:
    """Gradients in the meta tensors, as `{name: NumPy array}`."""
    return {name: grad.detach().cpu().numpy() for name, grad in zip(point.names[1], grads, strict=True)}


def leaves(tensors) -> tuple[torch.Tensor, ...]:
    """Leaf tensors that require gradients and share the memory of `tensors`."""
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def num_params(point: Point) -> int:
    """Number of params."""
    return sum(tensor.numel() for tensor in point.params)


def module(tensors) -> torch.nn.Module:
    """A module whose parameters are `tensors` (their memory is shared), in this order, called p0, p1, ..."""
    holder = _Holder()
    for index, tensor in enumerate(tensors):
        holder.register_parameter(f"p{index}", torch.nn.Parameter(tensor))
    return holder


class _Holder(torch.nn.Module):
    """A module with parameters alone."""


def _bind(loss: Callable, params: tuple, meta: tuple, batch: dict) -> Callable:
    """The loss of sequences of tensors."""

    def bound(param_tensors, meta_tensors):
        named = dict(zip(params, param_tensors, strict=True)), dict(zip(meta, meta_tensors, strict=True))
        return loss(*named, batch)

    return bound
