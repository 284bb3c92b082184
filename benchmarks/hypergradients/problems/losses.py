"""The losses of the problems, in JAX: `get(kind, constants) -> (inner, outer)`, both `(params, meta, batch) -> scalar`.

    ridge          inner  ||X w - y||^2 / (2 n) + sum_j exp(meta_j) w_j^2 / 2
                   outer  ||X w - y||^2 / (2 n)
    logistic       inner  mean CE(X W) + sum_jc exp(meta_j) W_jc^2 / (2 p c)
                   outer  mean CE(X W)
    quadratics     both   mean_i of (a_i z)^2 / 2 + (b_i x)^2 / 2 + (p_i x)(q_i z) + c_i z + d_i x,  z params, x meta
    data_cleaning  inner  mean_i sigmoid(meta_i) CE_i(X W) + decay ||W||^2
                   outer  mean CE(X W)
    hypercleaning  inner  mean_i sigmoid(meta_i) CE_i(tanh network) + decay ||params||^2
                   outer  mean CE(tanh network)
    convnet        the same with a convolutional network

Images are [n, height, width, channels], convolutions 3 x 3 with zero padding of 1, kernels [3, 3, in, out].
"""

import jax
import jax.numpy as jnp


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
        return _logistic_inner, lambda params, meta, batch: jnp.mean(cross_entropy(_linear(params, batch), batch["y"]))
    networks = {"data_cleaning": _linear, "hypercleaning": _perceptron, "convnet": _convnet}
    if kind not in networks:
        raise ValueError(
            f"there are no losses {kind!r}; expected ridge, quadratics, logistic or one of {list(networks)}"
        )
    return _weighted(networks[kind], constants["decay"])


def cross_entropy(logits, labels):
    """Cross entropy of every example. Args: logits [n, c], labels [n] integers. Returns: [n]."""
    picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - picked


def _ridge_outer(params, meta, batch):
    del meta
    return 0.5 * jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def _ridge_inner(params, meta, batch):
    return _ridge_outer(params, meta, batch) + 0.5 * jnp.sum(jnp.exp(meta["log_decay"]) * params["w"] ** 2)


def _quadratic(params, meta, batch):
    z, x = params["z"], meta["x"]
    squares = 0.5 * (batch["a"] @ z) ** 2 + 0.5 * (batch["b"] @ x) ** 2
    return jnp.mean(squares + (batch["p"] @ x) * (batch["q"] @ z) + batch["c"] @ z + batch["d"] @ x)


def _logistic_inner(params, meta, batch):
    weights = params["w"]
    penalty = jnp.sum(jnp.exp(meta["log_decay"])[:, None] * weights**2) / (2 * weights.size)
    return jnp.mean(cross_entropy(_linear(params, batch), batch["y"])) + penalty


def _linear(params, batch):
    return batch["x"] @ params["w"]


def _perceptron(params, batch):
    hidden = jnp.tanh(_add(batch["x"] @ params["w1"], params["b1"]))
    return _add(hidden @ params["w2"], params["b2"])


def _convnet(params, batch):
    x = jnp.tanh(_add(_convolve(batch["x"], params["k1"], 1), params["b1"]))
    x = jnp.tanh(_add(_convolve(x, params["k2"], 2), params["b2"]))
    x = jnp.tanh(_add(_convolve(x, params["k3"], 2), params["b3"]))
    return _add(jnp.mean(x, axis=(1, 2)) @ params["w"], params["b"])


def _convolve(x, kernel, stride: int):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _add(x, bias):
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _weighted(network, decay: float):
    """Inner loss with a weight per example, and outer loss without."""

    def inner(params, meta, batch):
        losses = cross_entropy(network(params, batch), batch["y"])
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return jnp.mean(jax.nn.sigmoid(meta["logits"]) * losses) + decay * squares

    def outer(params, meta, batch):
        del meta
        return jnp.mean(cross_entropy(network(params, batch), batch["y"]))

    return inner, outer
