"""RL-AUX against the sum over all joint actions, the optimiser itself, loops over examples and random search."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax import Policy
from auxjax.formulas import policy_gradient
from auxjax.interface import Context, TrainState
from auxjax.methods._rl_aux import rl_aux
from auxjax.training.parallel import data_mesh, shard_batch

KEY = jax.random.key(0)
CLASSES = 2
MOMENTUM = optax.chain(optax.add_decayed_weights(0.02), optax.sgd(0.1, momentum=0.9))
PLAIN = {"standardise": False, "entropy_bonus": 0.0, "epochs": 1}


def toy(seed, *, num_examples=3, dim=3, psi=2, mask=None):
    """A linear trunk of two features under a primary and an auxiliary head: `(params, batch)`."""
    rng = np.random.default_rng(seed)
    params = {name: jnp.array(rng.normal(size=(rows, columns))) for name, rows, columns in layers(dim, psi)}
    batch = {"x": jnp.array(rng.normal(size=(num_examples, dim))), "y": jnp.array(rng.integers(2, size=num_examples))}
    return params, batch if mask is None else {**batch, "mask": jnp.array(mask)}


def layers(dim, psi):
    return [("trunk", dim, 2), ("primary", 2, CLASSES), ("auxiliary", 2, CLASSES * psi)]


def cross_entropies(logits):
    return -jax.nn.log_softmax(logits, axis=-1)


def toy_losses(params, batch, key):
    del key
    features = batch["x"] @ params["trunk"]
    primary = cross_entropies(features @ params["primary"])
    values = jnp.take_along_axis(primary, batch["y"][:, None] % CLASSES, axis=1)[:, 0]
    masks = {"primary": batch["mask"]} if "mask" in batch else None
    return auxjax.TaskLosses({"primary": values}, masks, label_losses=cross_entropies(features @ params["auxiliary"]))


MODEL = auxjax.TaskModel(toy_losses, primary="primary")


def table(start, **more):
    """A policy that is a table with a row for every example, whatever it looks like."""
    return auxjax.Generator(lambda key, batch: {"logits": jnp.array(start), **more}, lambda meta, batch: Policy(**meta))


def method_of(generator, **options):
    # The default optimiser is Adam, which strict promotion does not let pass.
    defaults = {"labels": lambda batch: batch["y"], "sub_classes": 2, "outer_optimizer": optax.sgd(1.0)}
    return rl_aux(generator=generator, **{**defaults, **options})


def start(method, params, batch, *, model=MODEL, optimizer=MOMENTUM, steps=0, batches=None):
    """Context and state; with `steps`, some inner updates, so that the optimiser has a history."""
    context = Context(model, optax.with_extra_args_support(optimizer))
    state = TrainState(jnp.zeros((), jnp.int32), KEY, params, optimizer.init(params))
    state = state._replace(method=method.init(context, state, batch, KEY))
    inner = jax.jit(lambda state: method.inner(context, state, batch if batches is None else batches, KEY)[0])
    for _ in range(steps):
        state = inner(state)
    return context, state


@functools.partial(jax.jit, static_argnames=("optimizer", "weight"))
def loss_after(params, opt_state, batch, dev, labels, *, optimizer=MOMENTUM, weight=1.0):
    """The primary loss on `dev` after one step on hard auxiliary labels, int `[n]`, written out."""

    def primary(params, batch):
        logits = cross_entropies(batch["x"] @ params["trunk"] @ params["primary"])
        return jnp.mean(jnp.sum(jax.nn.one_hot(batch["y"], CLASSES) * logits, axis=1))

    def joint(params):
        logits = cross_entropies(batch["x"] @ params["trunk"] @ params["auxiliary"])
        hard = jax.nn.one_hot(labels, logits.shape[1])
        return primary(params, batch) + weight * jnp.mean(jnp.sum(hard * logits, axis=1))

    updates, _ = optimizer.update(jax.grad(joint)(params), opt_state, params)
    return primary(optax.apply_updates(params, updates), dev)


# A policy on two examples with probabilities (1/4, 3/4) and (1/2, 1/2): eight rollouts hold every joint action as
# often as the policy chooses it, so that a mean over them is an expectation.
EIGHT = jnp.array(list(itertools.product((0, 1, 1, 1), (0, 1))))
QUARTERS = np.zeros((2, 4))


def exact_problem():
    params, batch = toy(0, num_examples=2)
    _, dev = toy(1, num_examples=5)
    logits = QUARTERS.copy()
    logits[0, 2 * int(batch["y"][0]) + 1] = np.log(3.0)
    return params, batch, dev, logits


def exact_gradient(state, batch, dev, logits, entropy_weight):
    """The gradient of the expected reward in the policy's logits, from the rewards of all four joint actions."""
    actions = jnp.array(list(itertools.product((0, 1), repeat=2)))
    labels = 2 * batch["y"][None, :] + actions
    losses = jax.vmap(lambda one: loss_after(state.params, state.opt_state, batch, dev, one))(labels)
    # The mean label of two hard ones: one class, or two that have one half each.
    entropies = jnp.where(labels[:, 0] == labels[:, 1], 0.0, np.log(2.0))
    rewards = -losses + entropy_weight * entropies

    def expected(logits):
        own = jnp.stack([jax.lax.dynamic_slice(logits, (i, 2 * batch["y"][i]), (1, 2))[0] for i in range(2)])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(own), actions.T, axis=1)
        return jnp.sum(jnp.exp(jnp.sum(chosen, axis=0)) * rewards)

    gradient, delta = jax.jit(jax.grad(expected))(jnp.array(logits)), 1e-5
    steps = delta * jnp.eye(8).reshape(8, 2, 4)
    values = jax.jit(jax.vmap(expected))(logits[None] + jnp.concatenate([steps, -steps]))
    np.testing.assert_allclose(((values[:8] - values[8:]) / (2 * delta)).reshape(2, 4), gradient, rtol=0, atol=1e-9)
    assert float(jnp.max(jnp.abs(gradient))) > 1e-3
    return gradient


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["none", "value"])
def test_the_policy_ascends_the_expected_reward(baseline, monkeypatch):
    """Summed over all joint actions; the update is the gradient of the mean over examples of the advantage's part."""
    params, batch, dev, logits = exact_problem()
    values = {"value": jnp.array([0.7, -3.0])} if baseline == "value" else {}
    method = method_of(table(logits, **values), baseline=baseline, num_rollouts=8, value_weight=0.5, **PLAIN)
    context, state = start(method, params, batch, steps=2)
    monkeypatch.setattr(policy_gradient, "sample", lambda key, log_probabilities, num_rollouts: EIGHT)
    new, metrics = jax.jit(lambda state: method.outer(context, state, batch, dev, KEY))(state)
    wanted = exact_gradient(state, batch, dev, logits, 0.2)
    np.testing.assert_allclose(2 * (new.method.meta["logits"] - logits), wanted, rtol=0, atol=1e-9)
    if baseline == "value":
        error = values["value"] - metrics["reward"]  # of a reward that is the same for both examples
        np.testing.assert_allclose(values["value"] - new.method.meta["value"], 2 * 0.5 * error / 2, rtol=1e-9)
        assert metrics["value_loss"] > 0


def test_leave_one_out_ascends_the_expected_reward(monkeypatch):
    """Summed over all pairs of rollouts."""
    params, batch, dev, logits = exact_problem()
    method = method_of(table(logits), num_rollouts=2, **PLAIN)
    context, state = start(method, params, batch, steps=2)
    pairs = jnp.array([[EIGHT[i], EIGHT[j]] for i in range(8) for j in range(8)])

    def updated(pair):
        with monkeypatch.context() as patch:
            patch.setattr(policy_gradient, "sample", lambda key, log_probabilities, num_rollouts: pair)
            new, metrics = method.outer(context, state, batch, dev, KEY)
        return new.method.meta["logits"] - logits, metrics["reward"]

    steps, _ = jax.jit(jax.vmap(updated))(pairs)
    wanted = exact_gradient(state, batch, dev, logits, 0.2)
    np.testing.assert_allclose(2 * jnp.mean(steps, axis=0), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("baseline", ["leave_one_out", "value", "none"])
def test_one_update_by_hand(baseline, standardise, monkeypatch):
    """Row i moves by the mean over rollouts of `A_ri (one_hot(a_ri) - pi_i) / n`, for any three rollouts."""
    params, batch, dev, logits = exact_problem()
    value = np.array([0.7, -3.0])
    options = {"baseline": baseline, "num_rollouts": 3, **PLAIN, "standardise": standardise, "value_weight": 0.0}
    method = method_of(table(logits, value=jnp.array(value)), **options)
    context, state = start(method, params, batch)
    actions = jnp.array([[0, 1], [1, 1], [1, 0]])
    monkeypatch.setattr(policy_gradient, "sample", lambda key, log_probabilities, num_rollouts: actions)
    new, _ = jax.jit(lambda state: method.outer(context, state, batch, dev, KEY))(state)

    labels = 2 * batch["y"][None, :] + actions
    losses = np.array([loss_after(params, state.opt_state, batch, dev, one) for one in labels])
    rewards = -losses + 0.2 * np.where(np.asarray(labels[:, 0] == labels[:, 1]), 0.0, np.log(2.0))
    others = {"leave_one_out": (rewards.sum() - rewards) / 2, "none": np.zeros(3)}
    advantages = rewards[:, None] - (value[None, :] if baseline == "value" else others[baseline][:, None])
    advantages = np.broadcast_to(advantages, (3, 2))
    if standardise:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    probabilities, wanted = np.array([[0.25, 0.75], [0.5, 0.5]]), logits.copy()
    for r, i in np.ndindex(3, 2):
        place = 2 * int(batch["y"][i])
        step = np.eye(2)[actions[r, i]] - probabilities[i]
        wanted[i, place : place + 2] += advantages[r, i] * step / (3 * 2)
    np.testing.assert_allclose(new.method.meta["logits"], wanted, rtol=1e-9, atol=1e-12)


def certain(actions, labels, psi=2):
    """Logits that leave each example one action."""
    logits = np.zeros((len(actions), CLASSES * psi))
    for row, (action, label) in enumerate(zip(actions, np.asarray(labels), strict=True)):
        logits[row, psi * label : psi * (label + 1)] = -np.inf
        logits[row, psi * label + action] = 0.0
    return logits


def test_the_look_ahead_is_the_real_optimisers():
    """Momentum, weight decay and their history; and it is the update that `inner` then makes."""
    params, batch = toy(0, num_examples=4)
    _, dev = toy(1, num_examples=5)
    actions = [0, 1, 1, 0]
    method = method_of(table(certain(actions, batch["y"])), auxiliary_weight=0.7, num_rollouts=3)
    context, state = start(method, params, batch, steps=3, optimizer=MOMENTUM)
    _, metrics = jax.jit(lambda state: method.outer(context, state, batch, dev, KEY))(state)
    labels = 2 * batch["y"] + jnp.array(actions)
    wanted = loss_after(state.params, state.opt_state, batch, dev, labels, weight=0.7)
    np.testing.assert_allclose(metrics["outer_loss"], wanted, rtol=1e-12)
    ahead, _ = jax.jit(lambda state: method.inner(context, state, batch, KEY))(state)
    out = toy_losses(ahead.params, dev, KEY)
    np.testing.assert_allclose(metrics["outer_loss"], jnp.mean(out.values["primary"]), rtol=1e-12)
    usage = np.bincount(np.asarray(labels), minlength=4) / 4
    entropy = -sum(u * np.log(u) for u in usage if u > 0)
    np.testing.assert_allclose(metrics["reward"], -wanted + 0.2 * entropy, rtol=1e-12)
    assert metrics["reward_spread"] == metrics["policy_entropy"] == metrics["clip_fraction"] == 0


def test_reuse_batch_judges_on_the_inner_batch():
    params, batch = toy(0, num_examples=4)
    _, dev = toy(1, num_examples=5)
    found = []
    for options, given in (({"reuse_batch": True}, dev), ({}, batch)):
        method = method_of(table(np.zeros((4, 4))), num_rollouts=2, **PLAIN, **options)
        context, state = start(method, params, batch)
        found.append(jax.jit(lambda s, m=method, c=context, b=given: m.outer(c, s, batch, b, KEY))(state)[1])
    chex.assert_trees_all_equal(*found)


@pytest.mark.parametrize("chunk", [None, pytest.param(5, marks=pytest.mark.slow)])
def test_rewards_of_single_examples_are_a_loop_over_them(chunk, monkeypatch):
    """Each has its own step, on a batch of itself. Rollout j gives all of them sub-class j; the policy is uniform, so
    that row i of its gradient is `(r_ij - mean_j r_ij) / psi n`."""
    psi, n = 3, 4
    params, batch = toy(0, num_examples=n, psi=psi)
    _, dev = toy(1, num_examples=5, psi=psi)
    options = {"reward": "example", "baseline": "none", "num_rollouts": psi, "sub_classes": psi, "chunk": chunk}
    method = method_of(table(np.zeros((n, 2 * psi))), **options, **PLAIN)
    context, state = start(method, params, batch, steps=2)
    everyone = jnp.broadcast_to(jnp.arange(psi)[:, None], (psi, n))
    monkeypatch.setattr(policy_gradient, "sample", lambda key, log_probabilities, num_rollouts: everyone)
    new, metrics = jax.jit(lambda state: method.outer(context, state, batch, dev, KEY))(state)
    rewards = np.zeros((n, psi))
    for i, j in np.ndindex(n, psi):
        alone = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)
        rewards[i, j] = -loss_after(state.params, state.opt_state, alone, dev, psi * alone["y"] + j)
    wanted = np.zeros((n, 2 * psi))
    for i, label in enumerate(np.asarray(batch["y"])):
        wanted[i, psi * label : psi * (label + 1)] = (rewards[i] - rewards[i].mean()) / (psi * n)
    assert np.abs(wanted).max() > 1e-4
    np.testing.assert_allclose(new.method.meta["logits"], wanted, rtol=1e-8, atol=1e-14)
    np.testing.assert_allclose(metrics["reward"], rewards.mean(), rtol=1e-12)
    np.testing.assert_allclose(metrics["outer_loss"], -rewards.mean(), rtol=1e-12)
    np.testing.assert_allclose(metrics["reward_spread"], rewards.std(axis=1).mean(), rtol=1e-12)


def test_weights_are_powers_of_two():
    """2^(8u - 3): from 1/8 over 2 to 32, in the inner update, the look-ahead and what is reported."""
    params, batch = toy(0, num_examples=3)
    bins = np.full((3, 21), -np.inf)
    bins[[0, 1, 2], [0, 10, 20]] = 0.0
    actions = [1, 0, 1]
    method = method_of(table(certain(actions, batch["y"]), weight_logits=jnp.array(bins)), auxiliary_weight=0.5)
    context, state = start(method, params, batch, optimizer=optax.sgd(0.01))
    weights = jax.jit(lambda state: method.weights(context, state, batch, KEY))(state)
    np.testing.assert_allclose(weights["generated"], 0.5 * np.array([0.125, 2.0, 32.0]), rtol=1e-14)
    np.testing.assert_array_equal(weights["primary"], np.ones(3))
    new, metrics = jax.jit(lambda state: method.inner(context, state, batch, KEY))(state)
    np.testing.assert_allclose(metrics["weight/generated"], 0.5 * (0.125 + 2 + 32) / 3, rtol=1e-14)

    def joint(params):
        out = toy_losses(params, batch, None)
        generated = out.label_losses[jnp.arange(3), 2 * batch["y"] + jnp.array(actions)]
        return jnp.mean(out.values["primary"]) + 0.5 * jnp.mean(jnp.array([0.125, 2.0, 32.0]) * generated)

    wanted = jax.tree.map(lambda p, g: p - 0.01 * g, params, jax.jit(jax.grad(joint))(params))
    chex.assert_trees_all_close(new.params, wanted, rtol=1e-12)
    _, outer = jax.jit(lambda state: method.outer(context, state, batch, batch, KEY))(state)
    loss = jnp.mean(toy_losses(new.params, batch, None).values["primary"])
    np.testing.assert_allclose(outer["outer_loss"], loss, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "label"), [("one_hot", (0.0, 1.0)), ("softened", (0.149, 0.405))])
def test_targets(target, label):
    """What the head is trained on, for psi = 5: (e, 1, 1, 1, 1) / (e + 4) within the block, and 0 outside."""
    seen = []

    def soft_label_loss(params, batch, labels, key):
        seen.append(np.asarray(labels))
        return jnp.sum(labels * toy_losses(params, batch, key).label_losses, axis=1)

    def losses(params, batch, key):
        return toy_losses(params, batch, key)._replace(label_losses=None)

    params, batch = toy(0, num_examples=2, psi=5)
    batch["y"] = jnp.array([1, 0])
    model = auxjax.TaskModel(losses, "primary", soft_label_loss=soft_label_loss)
    method = method_of(table(certain([3, 0], batch["y"], 5)), sub_classes=5, target=target)
    context, state = start(method, params, batch, model=model)
    method.inner(context, state, batch, KEY)
    off, on = label
    wanted = np.zeros((2, 10))
    wanted[0, 5:], wanted[1, :5] = off, off
    wanted[0, 8], wanted[1, 0] = on, on
    np.testing.assert_allclose(seen[-1], wanted, atol=5e-4)
    np.testing.assert_allclose(np.sum(seen[-1], axis=1), 1.0, rtol=1e-14)


def test_inner_updates_may_sample():
    """The same key, the same labels; another key, others; the mode does not depend on it."""
    params, batch = toy(0, num_examples=12)
    found = {}
    for action in ("mode", "sample"):
        method = method_of(table(np.full((12, 4), 0.1)), action=action)
        context, state = start(method, params, batch)
        inner = jax.jit(lambda key, m=method, c=context, s=state: m.inner(c, s, batch, key)[0].params["trunk"])
        found[action] = [inner(jax.random.key(seed)) for seed in (1, 1, 2)]
    for first, again, other in found.values():
        np.testing.assert_array_equal(first, again)
        np.testing.assert_equal(bool(jnp.all(first == other)), other is found["mode"][2])


def test_labels_and_weights_are_drawn_with_keys_of_their_own(monkeypatch):
    params, batch = toy(0)
    policy = table(np.zeros((3, 4)), weight_logits=jnp.zeros((3, 2)))
    method = method_of(policy, weight_bins=2, action="sample")
    context, state = start(method, params, batch, optimizer=optax.sgd(0.1))
    seen = []

    def sample(key, log_probabilities, num_rollouts):
        seen.append(tuple(np.asarray(jax.random.key_data(key))))
        return jnp.zeros((num_rollouts, 3), int)

    monkeypatch.setattr(policy_gradient, "sample", sample)
    method.weights(context, state, batch, KEY)
    assert len(seen) == len(set(seen)) == 2


def test_where_rewards_tell_nothing_entropy_grows():
    """Without a weight of the generated task all advantages are 0, and `d H / d z = -p (log p + H)` is left."""
    params, batch = toy(0, num_examples=2)
    batch["y"] = jnp.array([0, 1])
    logits = np.zeros((2, 4))
    logits[0, 1] = np.log(3.0)
    options = {"auxiliary_weight": 0.0, "entropy_weight": 0.0, "num_rollouts": 3, **PLAIN, "entropy_bonus": 0.3}
    method = method_of(table(logits), **options)
    context, state = start(method, params, batch)
    new, metrics = jax.jit(lambda state: method.outer(context, state, batch, batch, KEY))(state)
    p, wanted = np.array([0.25, 0.75]), logits.copy()
    wanted[0, :2] -= 0.3 / 2 * p * (np.log(p) - p @ np.log(p))
    np.testing.assert_allclose(new.method.meta["logits"], wanted, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(metrics["policy_entropy"], (-p @ np.log(p) + np.log(2)) / 2, rtol=1e-12)


@pytest.mark.parametrize("reward", ["batch", pytest.param("example", marks=pytest.mark.slow)])
def test_examples_without_a_primary_label_take_no_part(reward):
    """Whatever is hidden there, in losses, in the policy's outputs or as a class: nothing changes, to the last bit."""
    mask = [True, False, True, True]

    def losses(params, batch, key):
        out = toy_losses(params, batch, key)
        return out._replace(
            values={"primary": jnp.where(batch["mask"], out.values["primary"], batch["hidden"])},
            label_losses=jnp.where(batch["mask"][:, None], out.label_losses, batch["hidden"][:, None]),
        )

    def apply(meta, batch):
        shift = jnp.where(batch["mask"], 0.0, batch["hidden"])
        return Policy(**{name: leaf + shift.reshape(-1, *[1] * (leaf.ndim - 1)) for name, leaf in meta.items()})

    params, batch = toy(0, num_examples=4, mask=mask)
    _, dev = toy(1, num_examples=4, mask=[False, True, True, False])
    first = {"logits": jax.random.normal(KEY, (4, 4)), "weight_logits": jnp.zeros((4, 3)), "value": jnp.zeros(4)}
    options = {"baseline": "value", "weight_bins": 3, "num_rollouts": 3, "outer_optimizer": optax.sgd(0.1), "epochs": 2}
    method = method_of(auxjax.Generator(lambda key, batch: first, apply), reward=reward, **options)
    init, step = auxjax.make_step(auxjax.TaskModel(losses, "primary"), method, MOMENTUM, donate=False)
    found = []
    for hidden, label in ((7.0, 1), (jnp.nan, -1), (-jnp.inf, 99)):
        data, judge = (
            {**one, "hidden": jnp.full(4, hidden), "y": jnp.where(one["mask"], one["y"], label)} for one in (batch, dev)
        )
        state = init(KEY, params, data)
        for _ in range(2):
            state, metrics = step(state, data, judge)
        found.append((state._replace(key=0), metrics))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))
    for other in found[1:]:
        chex.assert_trees_all_equal(found[0], other)
    meta = found[0][0].method.meta
    for name, leaf in first.items():
        moved = np.any(np.asarray(meta[name] != leaf).reshape(4, -1), axis=1)
        np.testing.assert_array_equal(moved, mask)


def test_a_batch_without_any_primary_label():
    params, batch = toy(0, num_examples=3, mask=[False] * 3)
    method = method_of(table(np.zeros((3, 4))), num_rollouts=2)
    context, state = start(method, params, batch, optimizer=optax.sgd(0.1))
    new, metrics = jax.jit(lambda state: method.outer(context, state, batch, batch, KEY))(state)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((new.method.meta, metrics)))


def test_a_look_ahead_that_diverges_is_the_worst_of_all(monkeypatch):
    """It is data in the metrics, and a reason to do something else; it is no NaN in the policy."""
    params, batch = toy(0, num_examples=2)

    def update(grads, params):
        size = optax.tree.norm(grads)
        return jax.tree.map(lambda g: jnp.where(size > 10, jnp.nan, -0.1 * g), grads)

    more = {"weight_logits": jnp.zeros((2, 2))}
    method = method_of(table(np.zeros((2, 4)), **more), weight_bins=2, num_rollouts=3, **{**PLAIN, "standardise": True})
    context, state = start(method, params, batch, optimizer=optax.stateless(update))
    light = jnp.array([[0, 0], [0, 0], [1, 1]])
    monkeypatch.setattr(policy_gradient, "sample", lambda key, log_probabilities, num_rollouts: light)
    new, metrics = jax.jit(lambda state: method.outer(context, state, batch, batch, KEY))(state)
    np.testing.assert_allclose(metrics["diverged"], 1 / 3, rtol=1e-12)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((new.method.meta, metrics)))


def test_ppo_clips():
    """With one epoch the ratio is 1 and the clip never acts; with many large steps it does, and stops the policy."""
    params, batch = toy(0, num_examples=3)
    fractions, moved = [], []
    for epochs in (1, 30):
        options = {"num_rollouts": 4, "entropy_bonus": 0.0, "epochs": epochs}
        method = method_of(table(np.zeros((3, 4))), **options)
        context, state = start(method, params, batch)
        new, metrics = jax.jit(lambda s, m=method, c=context: m.outer(c, s, batch, batch, KEY))(state)
        fractions.append(metrics["clip_fraction"])
        moved.append(float(jnp.max(jnp.abs(new.method.meta["logits"]))))
    assert fractions[0] == 0 < fractions[1]
    assert moved[0] > 0
    assert moved[1] < 1.5  # 30 unclipped steps of this size would go beyond 4


def test_plain_logits_are_a_policy():
    params, batch = toy(0, num_examples=3)
    plain = auxjax.Generator(lambda key, batch: jnp.ones((3, 4)), lambda meta, batch: meta * batch["x"][:, :1])
    wrapped = auxjax.Generator(plain.init, lambda meta, batch: Policy(plain.apply(meta, batch)))
    found = []
    for generator in (plain, wrapped):
        method = method_of(generator, **PLAIN)
        context, state = start(method, params, batch)
        found.append(jax.jit(lambda s, m=method, c=context: m.outer(c, s, batch, batch, KEY))(state))
    chex.assert_trees_all_equal(found[0][0].method, found[1][0].method)
    chex.assert_trees_all_equal(found[0][1], found[1][1])


@pytest.mark.slow
def test_one_compilation_vmap_and_shards():
    """One program serves all steps, of one run or of several; on split batches it does the same."""
    params, batch = toy(0, num_examples=4)
    _, dev = toy(1, num_examples=4)
    policy, momentum = table(np.zeros((4, 4)), weight_logits=jnp.zeros((4, 21))), optax.sgd(0.5, momentum=0.9)
    method = method_of(policy, num_rollouts=3, epochs=2, outer_optimizer=momentum)
    init, step = auxjax.make_step(MODEL, method, MOMENTUM, donate=False)
    chex.clear_trace_counter()
    compiled = jax.jit(chex.assert_max_traces(lambda state: step.__wrapped__(state, batch, dev), n=1))
    first = init(KEY, params, batch)
    state = first
    for _ in range(3):
        state, metrics = compiled(state)
    assert all(jnp.shape(value) == () and np.isfinite(value) for value in metrics.values())
    assert {"outer_loss", "reward", "reward_spread", "policy_entropy", "clip_fraction"} <= set(metrics)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, state)

    other = init(KEY, jax.tree.map(lambda leaf: leaf + 0.5, params), batch)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), other, first)
    together, _ = jax.jit(jax.vmap(lambda state: step.__wrapped__(state, batch, dev)))(stacked)
    for index, alone in enumerate((other, first)):
        wanted, _ = compiled(alone)
        one = jax.tree.map(lambda leaf, i=index: leaf[i], together)
        chex.assert_trees_all_close((one.params, one.method), (wanted.params, wanted.method), rtol=1e-9, atol=1e-12)

    mesh = data_mesh(4)
    _, split = auxjax.make_step(MODEL, method, MOMENTUM, donate=False, mesh=mesh)
    sharded, _ = split(first, shard_batch(batch, mesh), shard_batch(dev, mesh))
    chex.assert_trees_all_close(sharded.method, wanted.method, rtol=1e-9, atol=1e-12)


def planted(seed, num_examples):
    """Clusters within classes, hidden: `(params, batch, clusters)`.

    Input 0 tells the class and input 1 the cluster. The first feature, which the primary head reads, is spoilt by the
    cluster. Sub-class 0 pulls that feature up and sub-class 1 pulls it down: with the clusters as labels, a step takes
    out of it what does not belong there.
    """
    rng = np.random.default_rng(seed)
    classes, clusters = rng.integers(2, size=(2, num_examples))
    x = 0.5 * rng.normal(size=(num_examples, 6))
    x[:, 0] += 2 * classes - 1
    x[:, 1] += 2 * (2 * clusters - 1)
    trunk = 0.1 * rng.normal(size=(6, 2))
    trunk[:2, 0] += 0.5, 1.0
    heads = {"primary": jnp.array([[-1.0, 1.0], [0.0, 0.0]]), "auxiliary": jnp.array([[1.0, -1.0] * 2, [0.0] * 4])}
    return {"trunk": jnp.array(trunk), **heads}, {"x": jnp.array(x), "y": jnp.array(classes)}, clusters


def learn(generator, problems, devs, *, updates=40, num_rollouts=32):
    """The policy's choices in the inner batch, int `[seeds, n]`, and its variables, after PPO from a frozen model."""
    options = {"outer_optimizer": optax.adam(0.1), "num_rollouts": num_rollouts, "entropy_weight": 0.0}
    method = method_of(generator, **options)

    def run(params, batch, dev, key):
        context, state = start(method, params, batch, optimizer=SLOW)

        def update(index, state):
            return method.outer(context, state, batch, dev, jax.random.fold_in(key, index))[0]

        meta = jax.lax.fori_loop(0, updates, update, state).method.meta
        logits = policy_gradient.block_log_probabilities(generator.apply(meta, batch).logits, batch["y"], 2)
        return jnp.argmax(logits, axis=1), meta

    stack = functools.partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))
    params, batches = (stack(*(problem[part] for problem in problems)) for part in (0, 1))
    keys = jax.random.split(KEY, len(problems))
    return jax.jit(jax.vmap(run))(params, batches, stack(*(dev[1] for dev in devs)), keys)


SLOW = optax.sgd(0.05)
SEEDS = range(4)


@pytest.mark.slow
def test_ppo_finds_what_random_search_does_not(ordinary_promotion):
    """As many look-aheads for both: 40 updates of 32 rollouts, or the best of 1280 random labellings of 64 examples.

    The gain of a labelling is 1 for the planted one and 0 for the mean random one.
    """
    problems, devs = [planted(seed, 64) for seed in SEEDS], [planted(100 + seed, 128) for seed in SEEDS]
    found, _ = learn(table(np.zeros((64, 4))), problems, devs)
    for seed, ((params, batch, clusters), (_, dev, _), chosen) in enumerate(zip(problems, devs, found, strict=True)):

        def loss(actions, params=params, batch=batch, dev=dev):
            labels = 2 * batch["y"] + actions
            return loss_after(params, SLOW.init(params), batch, dev, labels, optimizer=SLOW)

        tries = jax.vmap(loss)(jax.random.randint(jax.random.key(seed), (1280, 64), 0, 2))
        best = loss(jnp.array(clusters))

        def gain(value, tries=tries, best=best):
            return float((jnp.mean(tries) - value) / (jnp.mean(tries) - best))

        assert gain(loss(chosen)) > 0.9
        assert gain(jnp.min(tries)) < 0.6
        assert np.mean(chosen == clusters) > 0.9


@pytest.mark.slow
def test_a_policy_on_inputs_knows_new_examples(ordinary_promotion):
    """A linear function of the input finds the clusters of examples that it was never rewarded for."""
    linear = auxjax.Generator(
        lambda key, batch: {"w": jnp.zeros((batch["x"].shape[1], 4))},
        lambda meta, batch: Policy(batch["x"] @ meta["w"]),
    )
    problems, devs = [planted(seed, 64) for seed in SEEDS], [planted(100 + seed, 128) for seed in SEEDS]
    _, meta = learn(linear, problems, devs, updates=20, num_rollouts=16)
    for seed, w in enumerate(meta["w"]):
        _, new, clusters = planted(200 + seed, 200)
        logits = policy_gradient.block_log_probabilities(new["x"] @ w, new["y"], 2)
        assert np.mean(np.argmax(logits, axis=1) == clusters) > 0.95


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"generator": lambda meta, batch: meta}, TypeError, "rl_aux.*Generator"),
        ({"labels": [0, 1]}, TypeError, "rl_aux.*function of the batch"),
        ({"reward": "step"}, ValueError, "rl_aux.*'step'.*example"),
        ({"baseline": "mean"}, ValueError, "rl_aux.*leave_one_out"),
        ({"action": "greedy"}, ValueError, "rl_aux.*mode"),
        ({"target": "soft"}, ValueError, "rl_aux.*softened"),
        ({"sub_classes": 0}, ValueError, "rl_aux.*sub_classes=0"),
        ({"weight_bins": 1}, ValueError, "rl_aux.*weight_bins=1"),
        ({"epochs": 2.0}, TypeError, "rl_aux.*epochs=2.0"),
        ({"chunk": 0}, ValueError, "rl_aux.*chunk=0"),
        ({"clip": 1.0}, ValueError, "rl_aux.*clip=1.0"),
        ({"entropy_weight": -1.0}, ValueError, "rl_aux.*entropy_weight=-1.0"),
        ({"entropy_bonus": float("nan")}, ValueError, "rl_aux.*entropy_bonus=nan"),
        ({"num_rollouts": 1}, ValueError, "at least 2"),
        ({"num_rollouts": 1, "baseline": "none"}, ValueError, "standardise=False"),
    ],
)
def test_impossible_options_are_named(options, error, words):
    with pytest.raises(error, match=words):
        method_of(**{"generator": table(np.zeros((3, 4))), **options})


@pytest.mark.parametrize(
    ("apply", "options", "error", "words"),
    [
        (lambda meta, batch: {"logits": meta}, {}, TypeError, "rl_aux.*dict.*Policy"),
        (lambda meta, batch: meta[:, :3], {}, ValueError, "blocks of sub_classes=2"),
        (lambda meta, batch: meta[:2], {}, ValueError, r"\(2, 4\).*\(3,\)"),
        (lambda meta, batch: jnp.zeros((3, 6)), {}, ValueError, "rl_aux.*6 classes.*4"),
        (lambda meta, batch: Policy(meta, meta), {}, ValueError, r"weight_logits \(3, 4\).*\(3, 21\)"),
        (lambda meta, batch: Policy(meta), {"baseline": "value"}, ValueError, "value.*got none"),
        (lambda meta, batch: Policy(meta, value=meta), {"baseline": "value"}, ValueError, r"\(3,\).*\(3, 4\)"),
        (lambda meta, batch: meta, {"labels": lambda batch: batch["x"]}, ValueError, "rl_aux.*labels"),
        (lambda meta, batch: meta, {"labels": lambda batch: batch["x"][:, 0]}, TypeError, "rl_aux.*integers"),
    ],
)
def test_policies_that_do_not_fit_are_refused_when_the_state_is_made(apply, options, error, words):
    params, batch = toy(0)
    method = method_of(auxjax.Generator(lambda key, batch: jnp.zeros((3, 4)), apply), **options)
    with pytest.raises(error, match=words):
        start(method, params, batch, optimizer=optax.sgd(0.1))


def test_models_that_do_not_fit():
    params, batch = toy(0)
    method = method_of(table(np.zeros((3, 4))))
    headless = auxjax.TaskModel(lambda *given: toy_losses(*given)._replace(label_losses=None), "primary")
    with pytest.raises(ValueError, match=r"rl_aux.*label_losses"):
        start(method, params, batch, model=headless)
    few = method_of(table(np.zeros((2, 4))), labels=lambda batch: batch["y"][:2])
    with pytest.raises(ValueError, match=r"labels=.*\(2,\).*\(3,\)"):
        start(few, params, batch)
