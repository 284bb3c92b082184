"""RL-AUX: a policy that gives every example an auxiliary label, rewarded for the primary loss after a step on it.

    action   a_i ~ pi_phi(. | x_i) on the psi sub-classes of primary class c_i      v_i = 2^(8 u_i - 3), u_i ~ pi'_phi
    inner    min_theta  L_0(theta) + w mean_i v_i l(theta; x_i, y~(a_i))
    outer    max_phi    E_{a ~ pi_phi}[ R(a) ],      R(a) = -L_0(theta+(a)) + b H(mean_i y~(a_i))

with theta+(a) = theta + U(grad inner(theta, a)) after one step U of the inner optimiser, momentum and all. The labels
are hard choices, so that nothing is differentiated through the step: the policy learns by PPO from the rewards of
several rollouts, which are copies of the training state.

Where this departs from the public code, and why:

- A rollout is one joint action of a whole batch and has one reward. The code lets an agent act on one example after
  the other and rewards it once per batch, which makes it find out by bootstrapping which of a hundred actions counted.
- Every rollout starts from the training state as it is, and there is a baseline over rollouts of the same batch.
- Labels outside of the example's block are masked before the softmax. The code lets the policy choose them, to the same
  effect whichever it is.
- The primary loss is the model's own. The code applies cross-entropy to probabilities, a second softmax.

Reference: Goldfeder, So, Lipson, 2025, RL-AUX: Reinforcement Learning for Auxiliary Task Generation, arXiv 2510.22940,
and its public code; `auxjax.formulas.policy_gradient` for the policy's part.
"""

from collections.abc import Callable
from functools import reduce, wraps
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks, loops, tree_math
from auxjax._internal.precision import accumulation_dtype
from auxjax.formulas import policy_gradient, soft_labels
from auxjax.formulas.losses import masked_mean
from auxjax.hypergrad import inner_step
from auxjax.interface import Context, Method
from auxjax.methods._registry import register
from auxjax.methods.shared import evaluation, generation, outer_level
from auxjax.methods.shared import policy as policies


@register("generated tasks", needs={"outer_batch", "label_losses"})
def rl_aux(
    *,
    generator: generation.Generator,
    labels: Callable[[Any], jax.Array],
    sub_classes: int = 5,
    weighted: bool | None = None,
    weight_bins: int = 21,
    auxiliary_weight: float = 1.0,
    entropy_weight: float = 0.2,
    reward: str = "batch",
    baseline: str = "leave_one_out",
    num_rollouts: int = 8,
    standardise: bool = True,
    epochs: int = 4,
    clip: float = 0.2,
    entropy_bonus: float = 0.01,
    value_weight: float = 0.5,
    outer_optimizer: optax.GradientTransformation | None = None,
    action: str = "mode",
    target: str = "one_hot",
    chunk: int | None = None,
    reuse_batch: bool = False,
) -> Method:
    """Labels, and weights, chosen by a policy that is trained by PPO.

    Args:
      generator: `Generator(init, apply)`, with `apply(meta, batch)` an `auxjax.Policy`, or the logits `[n, C psi]`.
      labels: `batch -> int [n]`, the primary classes.
      sub_classes: psi, auxiliary classes per primary class.
      weighted: whether the policy chooses weights as well, the weight-aware form; `None`: if it gives weight logits.
      weight_bins: weights to choose from, 2^(8u - 3) with u on so many points from 0 to 1.
      auxiliary_weight: w.
      entropy_weight: b, the reward for a mean label with a large entropy (in nats): 0.2 in the authors' code.
      reward: "batch": one reward for the joint action, each example's share of it found by the rollouts. "example":
        each example takes a step of its own, on its primary and generated loss alone, and is rewarded for that,
        without the entropy term: what the authors' code calls precise, for n times the look-aheads (see `chunk`).
      baseline: what the reward is compared with: "leave_one_out", the mean of the other rollouts; "value", the
        policy's own `value`, fitted along by squared error; "none".
      num_rollouts: look-aheads per outer update (and per example, for `reward="example"`).
      standardise: subtract the advantages' mean and divide by their standard deviation. Without it, a reward that
        hardly changes in one step hardly moves the policy against the entropy bonus.
      epochs: updates of the policy per outer update, each on all rollouts and all examples.
      clip: PPO's, on the ratio of every example's own action.
      entropy_bonus: weight of the policy's mean entropy per example.
      value_weight: weight of the value's squared error.
      outer_optimizer: optimiser of the policy; `optax.adam(3e-4)` by default, the authors'.
      action: what inner updates use: "mode", the likeliest action, as the authors' main phase has it, or "sample".
      target: "one_hot", or "softened", a softmax of it within the block: (e, 1, ..., 1) / (e + psi - 1), the label of
        the authors' code: (0.405, 0.149, ...) for psi = 5.
      chunk: look-aheads held in memory at a time, each a copy of params and optimiser state; `None` for all of them.
        Convolutional models on a CPU are fastest with 1 and up to 16 look-aheads, which are then written out (8 of
        them: 0.37 against 0.69 s for all at a time); more chunks are a loop there.
      reuse_batch: take the primary loss of the reward on the inner batch, whatever outer batch is given. (The authors
        take another batch of training data; pass it as `outer_batch`.)

    Returns:
      A `Method`; its outer variables are the policy's. It needs `TaskLosses.label_losses` or
      `TaskModel.soft_label_loss`. Inner update: one gradient and a forward pass of the policy. Outer update:
      `num_rollouts` inner gradients, whose forward pass is shared, and as many forward passes of the primary loss;
      `epochs` gradients of the policy. With `reward="example"`, `num_rollouts` times n of the former, each over the
      whole inner batch, because a model may give losses of whole batches only: the other examples' losses are masked.

      The model's noise (dropout) is the same in all rollouts. Look-aheads whose loss is not finite get the worst
      reward of the others; `diverged` is their share. Updates of the policy without a finite reward, or by a gradient
      that is not finite, are not made; `skipped` is their share. Metrics of the outer update: `outer_loss` (the mean of
      the primary loss after the step), `reward`, `reward_spread` (standard deviation over rollouts), `diverged`, and,
      means over epochs, `policy_entropy` (nats per example), `clip_fraction`, `skipped` and, with that baseline,
      `value_loss`.

      Inside `pmap` every replica takes the whole batch: rollouts judge its labels together.

    Raises:
      ValueError, TypeError: an impossible option; outputs of the policy that do not fit it, a model without an
        auxiliary head or with one of another width (when the state is made).
    """
    checks.one_of("rl_aux", ("batch", "example"), reward=reward)
    checks.one_of("rl_aux", ("leave_one_out", "value", "none"), baseline=baseline)
    checks.one_of("rl_aux", ("mode", "sample"), action=action)
    checks.one_of("rl_aux", ("one_hot", "softened"), target=target)
    checks.one_of("rl_aux", (True, False, None), weighted=weighted)
    checks.number("rl_aux", least=0, auxiliary_weight=auxiliary_weight, entropy_weight=entropy_weight)
    checks.number("rl_aux", least=0, entropy_bonus=entropy_bonus, value_weight=value_weight)
    checks.number("rl_aux", above=0, below=1, clip=clip)
    checks.count("rl_aux", 1, sub_classes=sub_classes, num_rollouts=num_rollouts, epochs=epochs)
    checks.count("rl_aux", 2, weight_bins=weight_bins)
    if chunk is not None:
        checks.count("rl_aux", 1, chunk=chunk)
    if num_rollouts < 2 and (baseline == "leave_one_out" or standardise):
        raise ValueError(
            "rl_aux(num_rollouts=1) has nothing to compare a reward with. Give at least 2, or baseline='value' and "
            "standardise=False."
        )
    generation.check_generator("rl_aux", generator)
    checks.function("rl_aux", "a function of the batch", labels=labels)
    by_value, softened = baseline == "value", target == "softened"
    reading = policies.Reading("rl_aux", generator, labels, sub_classes, weight_bins, weighted, by_value, softened)
    checks.optimizer("rl_aux", outer_optimizer=outer_optimizer)
    optimizer = optax.adam(3e-4) if outer_optimizer is None else outer_optimizer

    def init(context, state, batch, key):
        meta = generator.init(key, batch)

        def shapes(meta, batch):
            policy = policies.outputs_of(reading, generator.apply(meta, batch))
            return policy.logits, policies.decide(reading, meta, batch).labels

        logits, found = jax.eval_shape(shapes, meta, batch)
        out = generation.check_model("rl_aux", context, state, batch, key, logits.shape[-1])
        wanted = out.values[context.model.primary].shape
        if found.shape != wanted:
            raise ValueError(
                f"rl_aux(labels=) returned the shape {found.shape}; expected {wanted}, one class per example of the "
                "primary task."
            )
        outer_level.look_ahead_optimizer("rl_aux", context, state, differentiated=False)  # raises before any training
        return outer_level.OuterState(*inner_step.start("rl_aux", optimizer, None, meta), ())

    def chosen(state, batch, key) -> generation.Labelling:
        """The labels of an inner update."""
        decision = policies.decide(reading, state.method.meta, batch)
        if action == "mode":
            actions = tuple(jnp.argmax(choice, axis=-1) for choice in decision.choices)
        else:
            actions = tuple(drawn[0] for drawn in policies.sample(decision, key, 1))
        return policies.labelling(reading, actions, decision, accumulation_dtype(state.params))

    def inner(context, state, batch, key):
        model_key, action_key = jax.random.split(key)
        made = chosen(state, batch, action_key)
        return generation.descend_on(context, state, batch, model_key, made, auxiliary_weight)

    def weights(context, state, batch, key):
        model_key, action_key = jax.random.split(key)
        made = chosen(state, batch, action_key)
        return generation.reported_weights(context, state, batch, model_key, made, auxiliary_weight)

    def outer(context, state, inner_batch, outer_batch, key):
        model_key, action_key = jax.random.split(key)
        outer_batch = inner_batch if reuse_batch else outer_batch
        # Evaluated for its mask alone; jit drops the rest.
        out = evaluation.evaluate(context.model, state.params, state.model_state, inner_batch, model_key)
        mask = evaluation.mask_of(out, context.model.primary)
        before = policies.decide(reading, state.method.meta, inner_batch, mask)
        actions = policies.sample(before, action_key, num_rollouts)
        ahead = outer_level.look_ahead_optimizer("rl_aux", context, state, differentiated=False)
        moving = context._replace(optimizer=ahead[0]), state._replace(opt_state=ahead[1])
        fork = _Fork(*moving, inner_batch, outer_batch, model_key, auxiliary_weight)

        def label(actions):
            return policies.labelling(reading, actions, before, accumulation_dtype(state.params))

        losses_after = _losses_of_batches if reward == "batch" else _losses_of_examples
        losses, entropies = losses_after(fork, label, actions, mask, chunk)
        scores = policy_gradient.finite_or_worst(-losses)
        rewards = scores + entropy_weight * entropies
        usable = evaluation.in_any_copy(context, jnp.any(jnp.isfinite(losses)))
        meta, opt_state, learned = learn(context, state.method, inner_batch, mask, before, actions, rewards, usable)
        metrics = {
            "outer_loss": -policy_gradient.rollout_mean(scores, mask),
            "reward": policy_gradient.rollout_mean(rewards, mask),
            "reward_spread": masked_mean(jnp.std(rewards, axis=0), mask),
            "diverged": policy_gradient.rollout_mean((~jnp.isfinite(losses)).astype(rewards.dtype), mask),
            **learned,
        }
        return state._replace(method=outer_level.OuterState(meta, opt_state, ())), metrics

    def learn(context, method_state, batch, mask, before, actions, rewards, usable):
        """PPO on the rollouts: `(meta, opt_state, metrics)` after `epochs` updates, none unless `usable`."""
        old = policies.log_probability(before, actions)
        advantages = advantages_of(rewards, before.value, mask)

        def loss(meta):
            now = policies.decide(reading, meta, batch, mask)
            log_ratio = policies.log_probability(now, actions) - old
            gain = policy_gradient.rollout_mean(policy_gradient.clipped_surrogate(log_ratio, advantages, clip), mask)
            entropy = masked_mean(reduce(add, map(policy_gradient.entropy, now.choices)), mask)
            clipped = jnp.abs(jnp.expm1(log_ratio)) > clip
            metrics = {
                "policy_entropy": entropy,
                "clip_fraction": policy_gradient.rollout_mean(clipped.astype(old.dtype), mask),
            }
            total = -gain - entropy_bonus * entropy
            if now.value is not None:  # baseline="value"
                error = jnp.square(now.value[None, :] - rewards.astype(now.value.dtype))
                metrics["value_loss"] = policy_gradient.rollout_mean(error, mask)
                total = total + value_weight * metrics["value_loss"]
            return total, metrics

        def epoch(carry, _):
            gradient, metrics = jax.grad(loss, has_aux=True)(carry[0])
            gradient = context.share(gradient)
            taken = usable & tree_math.all_finite(gradient)
            new = inner_step.advance(optimizer, carry[0], carry[1], gradient)
            return tree_math.select(taken, new, carry), metrics | {"skipped": (~taken).astype(jnp.float32)}

        carry, whole = (method_state.meta, method_state.opt_state), loops.write_out(epochs, loops.SHORT_OF_STEPS)
        (meta, opt_state), metrics = jax.lax.scan(epoch, carry, length=epochs, unroll=whole)
        return meta, opt_state, jax.tree.map(jnp.mean, metrics)

    def advantages_of(rewards, value, mask) -> jax.Array:
        """`[m, n]`, the rewards above the baseline, which does not depend on the rollout's own actions."""
        if baseline == "leave_one_out":
            rewards = rewards - policy_gradient.leave_one_out(rewards)
        elif baseline == "value":
            rewards = rewards - value[None, :].astype(rewards.dtype)
        return policy_gradient.standardised(rewards, mask) if standardise else rewards

    how: dict[str, Any] = {"whole_batch": True, "shared": outer_level.shared, "outer_data": not reuse_batch}
    return Method(init, inner, outer, weights, **how)


class _Fork(NamedTuple):
    """A training state to take look-ahead steps from, and what they are taken and judged on."""

    context: Context
    state: Any
    inner_batch: Any
    outer_batch: Any
    key: jax.Array
    weight: float

    def loss_after(self, labelling, context=None) -> jax.Array:
        """The mean primary loss after an inner update on these labels: the very update that `inner` makes."""
        context = self.context if context is None else context
        ahead, _ = generation.descend_on(context, self.state, self.inner_batch, self.key, labelling, self.weight)
        loss = outer_level.primary_loss(self.context, ahead.model_state, self.key)
        return loss(ahead.params, None, self.outer_batch)


def _losses_of_batches(fork, label, actions, mask, chunk):
    """One look-ahead per rollout: `[m, n]` losses and entropies of the mean label, the same for all examples."""

    def rollout(actions):
        made = label(actions)
        usage = soft_labels.mean_label(made.labels, mask)
        return fork.loss_after(made), -soft_labels.negative_entropy(usage)

    found = _each(rollout, actions, chunk)
    return tuple(jnp.broadcast_to(values[:, None], actions[0].shape) for values in found)


def _losses_of_examples(fork, label, actions, mask, chunk):
    """One look-ahead per rollout and example, on that example alone: `[m, n]` losses, and no entropies.

    The model's losses come for the whole batch. A step on one example is therefore a step on a batch in which it is the
    only one with a label. The forward pass is shared by all of them; the backward passes are not.
    """
    del mask
    model, count = fork.context.model, actions[0].shape[1]

    def alone(example):
        @wraps(model.losses)
        def losses(*arguments, **extras):
            out = model.losses(*arguments, **extras)
            mask = evaluation.mask_of(out, model.primary)
            only = jnp.arange(count) == example
            only = only if mask is None else only & mask
            return out._replace(masks={**(out.masks or {}), model.primary: only})

        return fork.context._replace(model=model._replace(losses=losses))

    def step(example, actions):
        # All get the action of one; the mask leaves the one.
        made = label(tuple(jnp.full((count,), action) for action in actions))
        return fork.loss_after(made, alone(example))

    examples = jnp.broadcast_to(jnp.arange(count), actions[0].shape)
    flat = jax.tree.map(jnp.ravel, (examples, actions))
    losses = _each(lambda given: step(*given), flat, chunk).reshape(actions[0].shape)
    return losses, jnp.zeros_like(losses)


def _each(function, arguments, chunk: int | None) -> Any:
    """`function` of every entry of the leading axis, all at a time or `chunk` of them."""
    together, count = jax.vmap(function), len(jax.tree.leaves(arguments)[0])
    if chunk is None or chunk >= count:
        return together(arguments)
    chunks = count // chunk
    rows = jax.tree.map(lambda leaf: leaf[: chunks * chunk].reshape(chunks, chunk, *leaf.shape[1:]), arguments)
    whole = loops.write_out(chunks, loops.SHORT_OF_STEPS)
    _, found = jax.lax.scan(lambda carry, row: (carry, together(row)), (), rows, unroll=whole)
    found = jax.tree.map(lambda leaf: leaf.reshape(chunks * chunk, *leaf.shape[2:]), found)
    if count % chunk:
        rest = together(jax.tree.map(lambda leaf: leaf[chunks * chunk :], arguments))
        found = jax.tree.map(lambda *parts: jnp.concatenate(parts), found, rest)
    return found
