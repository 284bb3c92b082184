"""The losses of `benchmarks.hypergradients.problems.losses` again, in torch: `get(kind, constants) -> (inner, outer)`.

Both are `(params, meta, batch) -> scalar` on dicts of tensors, and equal to the JAX losses up to rounding (checked by
`benchmarks.hypergradients.peers.check`). They are written for torch: images and kernels have torch's order of axes,
labels are int64, cross entropy and affine maps are torch's own. `layout` brings arrays into that order, once, when a
problem is loaded.
"""

import numpy as np
import torch
from torch.nn import functional

_IMAGES = (0, 3, 1, 2)  # [n, height, width, channels] -> [n, channels, height, width]
_KERNELS = (3, 2, 0, 1)  # [height, width, in, out] -> [out, in, height, width]


def layout(kind: str, tree: dict, *, batch: bool = False) -> dict:
    """Arrays of a problem as torch's users keep them: `{name: tensor}`, no memory shared with NumPy."""
    tensors = {}
    for name, leaf in tree.items():
        leaf = np.asarray(leaf)
        if kind == "convnet" and leaf.ndim == 4:
            leaf = leaf.transpose(_IMAGES if batch else _KERNELS)
        if np.issubdtype(leaf.dtype, np.integer):
            leaf = leaf.astype(np.int64)
        tensors[name] = torch.from_numpy(np.array(leaf, order="C"))
    return tensors


def get(kind: str, constants: dict):
    """The losses of a kind of problem: `(inner, outer)`.

    Raises:
      ValueError: there is no such kind.
    """
    if kind == "ridge":
        return _ridge_inner, _ridge_outer
    if kind == "quadratics":
        return _quadratic, _quadratic
    if kind == "logistic":
        return _logistic_inner, _mean_outer(_linear)
    networks = {"data_cleaning": _linear, "hypercleaning": _perceptron, "convnet": _convnet}
    if kind not in networks:
        raise ValueError(
            f"there are no losses {kind!r}; expected ridge, quadratics, logistic or one of {list(networks)}"
        )
    return _weighted_inner(networks[kind], constants["decay"]), _mean_outer(networks[kind])


def _ridge_outer(params, meta, batch):
    del meta
    return 0.5 * (batch["x"] @ params["w"] - batch["y"]).square().mean()


def _ridge_inner(params, meta, batch):
    return _ridge_outer(params, meta, batch) + 0.5 * (meta["log_decay"].exp() * params["w"].square()).sum()


def _quadratic(params, meta, batch):
    z, x = params["z"], meta["x"]
    squares = 0.5 * (batch["a"] @ z).square() + 0.5 * (batch["b"] @ x).square()
    return (squares + (batch["p"] @ x) * (batch["q"] @ z) + batch["c"] @ z + batch["d"] @ x).mean()


def _logistic_inner(params, meta, batch):
    weights = params["w"]
    penalty = (meta["log_decay"].exp()[:, None] * weights.square()).sum() / (2 * weights.numel())
    return functional.cross_entropy(_linear(params, batch), batch["y"]) + penalty


def _linear(params, batch):
    return batch["x"] @ params["w"]


def _perceptron(params, batch):
    hidden = torch.addmm(params["b1"], batch["x"], params["w1"]).tanh()
    return torch.addmm(params["b2"], hidden, params["w2"])


def _convnet(params, batch):
    x = functional.conv2d(batch["x"], params["k1"], params["b1"], stride=1, padding=1).tanh()
    x = functional.conv2d(x, params["k2"], params["b2"], stride=2, padding=1).tanh()
    x = functional.conv2d(x, params["k3"], params["b3"], stride=2, padding=1).tanh()
    return torch.addmm(params["b"], x.mean(dim=(2, 3)), params["w"])


def _mean_outer(network):
    """Mean cross entropy of a network."""

    def outer(params, meta, batch):
        del meta
        return functional.cross_entropy(network(params, batch), batch["y"])

    return outer


def _weighted_inner(network, decay: float):
    """Cross entropy of a network with a weight for every example, and weight decay."""

    def inner(params, meta, batch):
        losses = functional.cross_entropy(network(params, batch), batch["y"], reduction="none")
        squares = sum(leaf.square().sum() for leaf in params.values())
        return (meta["logits"].sigmoid() * losses).mean() + decay * squares

    return inner
