"""DTG-AuxL: instances and labels are generated together from pairs of instances, learned through the primary loss.

    x~_i = s G_x(p_i, a_i),    y~_i = G_y(x~_i / s, a_i, c_i)       p, a an instance's and its partner's features over s
    inner   min_theta  L_0(theta) + w mean_i l(theta; x~_i(theta, phi), y~_i(phi)) + v sum_k L_k(theta)
    outer   min_phi    L_dev(theta*(phi)) + g R(phi),      R = copying + spread + b targets

The trunk learns from the generated task through x~; the labels y~ are held fixed in theta, for a target that followed
the model would not be a target. The outer gradient has an implicit part, of L_dev, and an explicit one, of the
regularisation R, in which theta is held fixed: R is about the generators, and the model shall not be driven to please
it. Without R they copy their sources more, and labels collapse (`auxjax.formulas.joint_generator.instance_collapse`).

The derivation, and what of this is reconstruction: `docs/dtg_auxl.md`.

Reference: Chen, Wang, Zhou, Qin, Guan, Zhu, 2023, Joint Data-Task Generation for Auxiliary Learning, NeurIPS.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks
from auxjax.formulas import joint_generator as generators
from auxjax.formulas.losses import masked_mean, weighted_loss
from auxjax.hypergrad import Amortised, BilevelProblem, Estimator
from auxjax.interface import Method, call
from auxjax.methods._registry import register
from auxjax.methods.shared import descent, evaluation, generation, outer_level
from auxjax.methods.shared.pairs import Pairs, pairs_of


@register("generated tasks", needs={"outer_batch", "features", "feature_loss"})
def dtg_auxl(
    *,
    num_generated: int | None = None,
    task: str = "classification",
    labels: Callable[[Any], jax.Array] | None = None,
    num_classes: int | None = None,
    partner: str | None = None,
    hidden: Sequence[int] = (64,),
    generator: generators.JointGenerator | None = None,
    auxiliary_weight: float = 1.0,
    manual_weight: float = 0.0,
    regularisation_weight: float = 1.0,
    target_weight: float = 1.0,
    features: str = "generated",
    targets: str = "generated",
    jacobian: str = "held_fixed",
    outer_optimizer: optax.GradientTransformation | None = None,
    hypergradient: Estimator | Amortised | None = None,
    warm_start: bool = False,
) -> Method:
    """Joint generation of data and task.

    Args:
      num_generated: k, generated classes or real-valued targets.
      task: "classification", with distributions over the classes as labels, or "regression", with targets in [-1, 1].
      labels: `batch -> [n]` or `[n, c]`, what of the primary labels the label generator sees: integers, given as
        one-hot vectors, or floats. `None` for none: it then sees features alone.
      num_classes: primary classes, for integer labels.
      partner: the auxiliary task whose labelled instances are the partners, drawn at random. `None` pairs primary
        instances with one another, on a random cycle; the label generator then sees the labels of both.
      hidden: sizes of the hidden layers of both generators.
      generator: a `JointGenerator` of your own; leave out what describes the ready-made one.
      auxiliary_weight: w.
      manual_weight: v, weight of the model's own auxiliary tasks.
      regularisation_weight: g; 0 leaves R out.
      target_weight: b, how much the labels count in R.
      features: "generated"; "mixed", without the interaction of the two instances; or "source", x~ = p.
      targets: "generated", or "random": the label generator stays as it was drawn, a control.
      jacobian: "held_fixed" differentiates the inner update with y~ a constant in theta; it is a Hessian. "exact" also
        counts how y~ changes with the params through the features; the field is then not a gradient.
      outer_optimizer: optimiser of the generators; `optax.adam(1e-3)` by default.
      hypergradient: an estimator such as `implicit(neumann(3))`, the default, or one with state.
      warm_start: start each linear solve from the last solution.

    Returns:
      A `Method`. The model must return `features` and have a `feature_loss`. Inner update: one gradient. Outer update:
      one outer gradient, the solver's matrix-vector products and a forward-mode pass; R is taken on the features of the
      outer batch, which are there already. Examples without a primary label generate nothing. Inside `pmap` every
      replica takes the whole batch, whose instances are paired.

    Raises:
      TypeError: an option of the wrong type.
      ValueError: an impossible option; a model without features or feature loss, or with other shapes (when the state
        is made).
    """
    numbers: dict[str, Any] = {"auxiliary_weight": auxiliary_weight, "manual_weight": manual_weight}
    numbers |= {"regularisation_weight": regularisation_weight, "target_weight": target_weight}
    checks.number("dtg_auxl", least=0, **numbers)
    checks.one_of("dtg_auxl", ("generated", "mixed", "source"), features=features)
    checks.one_of("dtg_auxl", ("generated", "random"), targets=targets)
    checks.one_of("dtg_auxl", ("held_fixed", "exact"), jacobian=jacobian)
    if labels is not None:
        checks.function("dtg_auxl", "a function of the batch or None", labels=labels)
    if num_classes is not None:
        checks.count("dtg_auxl", 2, num_classes=num_classes)
    generator = _generator(generator, num_generated, task, features, hidden)
    checks.optimizer("dtg_auxl", outer_optimizer=outer_optimizer)
    optimizer = optax.adam(1e-3) if outer_optimizer is None else outer_optimizer
    level = outer_level.make_outer_level("dtg_auxl", optimizer, hypergradient, warm_start)

    def pairs_in(context, out, batch, key) -> Pairs:
        kinds = {"partner": partner, "labels": labels, "num_classes": num_classes}
        return pairs_of("dtg_auxl", out, context.model.primary, batch, key, **kinds)

    def features_of(meta, pairs: Pairs) -> jax.Array:
        """x~ / s, `[n, d]`."""
        if features == "source":
            return pairs.primary
        return generator.features(meta["features"], pairs.primary, pairs.partner)

    def targets_of(meta, pairs: Pairs) -> jax.Array:
        """y~, `[n, k]`."""
        params = jax.lax.stop_gradient(meta["targets"]) if targets == "random" else meta["targets"]
        return generator.targets(params, features_of(meta, pairs), pairs.partner, pairs.labels)

    def collapse_of(pairs, made, labelled) -> generators.InstanceCollapse:
        sources = (pairs.primary, pairs.partner)
        return generators.instance_collapse(made, labelled, *sources, task=generator.task, mask=pairs.mask)

    def known_weights(context, out):
        """`{task: weight}` of the tasks the model has itself."""
        weights = {name: manual_weight for name in evaluation.auxiliary_tasks(out, context.model.primary)}
        return {context.model.primary: 1.0} | (weights if checks.is_traced(manual_weight) or manual_weight else {})

    def joint_loss(context, params, model_state, batch, key, meta, labelled=None) -> _Joint:
        """The inner loss, with targets of these params, held fixed in them, unless others are given."""
        out = evaluation.evaluate(context.model, params, model_state, batch, key)
        pairs = pairs_in(context, out, batch, key)
        if labelled is None:
            labelled = targets_of(meta, jax.lax.stop_gradient(pairs))
        made = features_of(meta, pairs)
        dtype = jax.tree.leaves(out.features)[0].dtype
        arguments = (params, (pairs.scale * made).astype(dtype), labelled)
        losses = call(context.model.feature_loss, *arguments, state=evaluation.fresh(model_state))
        _check_losses(losses, labelled.shape[0])
        generated = masked_mean(losses, pairs.mask)
        known = weighted_loss(out.values, known_weights(context, out), masks=out.masks)
        loss = generation.JointLoss(known + auxiliary_weight * generated, generated, out)
        return _Joint(loss, pairs, made, labelled)

    def problem_of(context, model_state, key) -> BilevelProblem:
        """DTG-AuxL as a bilevel problem in the params and the two generators."""

        def inner(params, meta, batch, labelled=None):
            return joint_loss(context, params, model_state, batch, key, meta, labelled).loss.total

        def update_field(params, meta, batch):
            out = evaluation.evaluate(context.model, params, model_state, batch, key)
            labelled = targets_of(meta, pairs_in(context, out, batch, key))
            return jax.grad(inner)(params, meta, batch, labelled)

        def outer(params, meta, batch):
            out = evaluation.evaluate(context.model, params, model_state, batch, key)
            loss = masked_mean(out.values[context.model.primary], evaluation.mask_of(out, context.model.primary))
            if not checks.is_traced(regularisation_weight) and regularisation_weight == 0:
                return loss
            pairs = jax.lax.stop_gradient(pairs_in(context, out, batch, key))
            collapse = collapse_of(pairs, features_of(meta, pairs), targets_of(meta, pairs))
            penalty = collapse.copying + collapse.spread + target_weight * collapse.targets
            return loss + regularisation_weight * penalty

        lower: dict[str, Any] = {"update_field": update_field} if jacobian == "exact" else {"inner": inner}
        return BilevelProblem(**lower, outer=outer, **outer_level.of_run(context))

    def init(context, state, batch, key):
        _check_model(context.model)
        out = evaluation.loss_shapes(context, state, batch, key)
        _check_partner(partner, evaluation.auxiliary_tasks(out, context.model.primary))
        pairs = jax.eval_shape(partial(pairs_in, context), out, batch, key)
        meta = generator.init(key, pairs.primary.shape[1], pairs.labels.shape[1], pairs.primary.dtype)
        if not (isinstance(meta, Mapping) and set(meta) == {"features", "targets"}):
            raise ValueError("dtg_auxl(generator=): init must return a dict with the keys 'features' and 'targets'.")
        _check_features(jax.eval_shape(features_of, meta, pairs).shape, pairs.primary.shape)
        _check_targets(jax.eval_shape(targets_of, meta, pairs).shape, pairs.primary.shape[0])
        problem = problem_of(context, state.model_state, key)
        lower = cast(Callable, problem.inner or problem.update_field)
        jax.eval_shape(lower, state.params, meta, batch)  # what feature_loss returns
        return outer_level.init_outer(level, problem, state.params, meta, batch, key)

    def inner(context, state, batch, key):
        def loss(params):
            joint = joint_loss(context, params, state.model_state, batch, key, state.method.meta)
            return joint.loss.total, joint

        (value, joint), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        options = {"value": value, "loss": lambda params: loss(params)[0]}
        return descent.descend(context, state, grads, joint.loss.out.state, **options), metrics_of(context, joint)

    def metrics_of(context, joint: _Joint) -> dict[str, jax.Array]:
        """The common metrics, the generated task's, and `collapse/<term of R>`."""
        out, dtype = joint.loss.out, joint.loss.total.dtype
        collapse = collapse_of(joint.pairs, joint.features, joint.targets)._asdict()
        classes = generator.task == "classification"
        return {
            **descent.loss_metrics(out, known_weights(context, out)),
            "loss/generated": joint.loss.generated,
            "weight/generated": jnp.asarray(auxiliary_weight, dtype),
            **{f"collapse/{name}": value for name, value in collapse.items()},
            **(generation.label_metrics(joint.targets, joint.pairs.mask) if classes else {}),
        }

    def outer(context, state, inner_batch, outer_batch, key):
        before = state.method.meta

        def project(meta):
            # Even without a gradient an optimiser may move them, by weight decay.
            return {**meta, "targets": before["targets"]} if targets == "random" else meta

        problem = problem_of(context, state.model_state, key)
        options = {"share": context.share, "project": project}
        return outer_level.outer_step(level, problem, state, inner_batch, outer_batch, key, **options)

    def weights(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        found = evaluation.constant_weights(known_weights(context, out), out)
        primary = found[context.model.primary]
        return found | {"generated": jnp.full(primary.shape, auxiliary_weight, primary.dtype)}

    return Method(init, inner, outer, weights, whole_batch=True, shared=outer_level.shared, all_params=True)


class _Joint(NamedTuple):
    loss: generation.JointLoss
    pairs: Pairs
    features: jax.Array  # x~ / s
    targets: jax.Array


def _check_model(model) -> None:
    if model.feature_loss is None:
        raise ValueError(
            "dtg_auxl generates features and labels, and the model has no loss of them. Give TaskModel(feature_loss=), "
            "a function (params, features, labels) -> [n]: the loss of an auxiliary head on given features."
        )


def _check_partner(partner, names) -> None:
    if partner not in (None, *names):
        raise ValueError(
            f"dtg_auxl(partner={partner!r}): the model's auxiliary tasks are {names}. Name one, or None for pairs of "
            "primary instances."
        )


def _check_features(shape, expected) -> None:
    if shape != expected:
        raise ValueError(f"dtg_auxl(generator=) made features of shape {shape}; expected {expected}.")


def _check_targets(shape, count: int) -> None:
    if len(shape) != 2 or shape[0] != count:
        raise ValueError(f"dtg_auxl(generator=) made targets of shape {shape}; expected [{count}, k].")


def _check_losses(losses, count: int) -> None:
    if jnp.shape(losses) != (count,) or not jnp.issubdtype(jnp.result_type(losses), jnp.floating):
        raise ValueError(
            f"feature_loss returned {jnp.result_type(losses)}{list(jnp.shape(losses))}; expected floating [{count}], "
            "one loss per generated instance."
        )


def _generator(given, num_generated, task, features, hidden) -> generators.JointGenerator:
    """The given generator or the ready-made one."""
    if given is None:
        generators.check_options("dtg_auxl", num_generated, task, hidden)
        form = "mixed" if features == "mixed" else "generated"
        return generators.joint_generator(num_generated, task=task, features=form, hidden=hidden)
    if not isinstance(given, generators.JointGenerator):
        raise TypeError(
            f"dtg_auxl(generator=): expected a JointGenerator (auxjax.formulas.joint_generator), got {given!r}."
        )
    if num_generated is not None or features == "mixed":
        raise ValueError("dtg_auxl(generator=): num_generated and features='mixed' are of the ready-made one.")
    return given
