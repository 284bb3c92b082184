"""DTG-AuxL: instances and labels are generated together from pairs of instances, learned through the primary loss.

    x~_i = s G_x(p_i, a_i),    y~_i = G_y(x~_i / s, a_i, c_i)       p, a an instance's and its partner's features over s
    inner   min_theta  L_0(theta) + w mean_i l(theta; x~_i(theta, phi), y~_i(phi)) + v sum_k L_k(theta)
    outer   min_phi    L_dev(theta*(phi)) + g R(phi),      R = copying + spread + b targets

The trunk learns from the generated task through x~; the labels y~ are held fixed in theta, for a target that followed
the model would be no target. The outer gradient has an implicit part, of L_dev, and an explicit one, of the
regularisation R, in which theta is held fixed: R is about the generators, and the model shall not be driven to please
it. Without R they copy their sources more, and labels collapse (`auxjax.formulas.joint_generator.instance_collapse`).

The derivation, and what of this is reconstruction: `docs/dtg_auxl.md`.

Reference: Chen, Wang, Zhou, Qin, Guan, Zhu, 2023, Joint Data-Task Generation for Auxiliary Learning, NeurIPS.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks
from auxjax.formulas import joint_generator as generators
from auxjax.formulas.losses import masked_mean, weighted_loss
from auxjax.hypergrad import BilevelProblem
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
    hypergradient=None,
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
        counts how y~ changes with the params through the features; the field is then no gradient.
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
    numbers = {"auxiliary_weight": auxiliary_weight, "manual_weight": manual_weight}
    numbers |= {"regularisation_weight": regularisation_weight, "target_weight": target_weight}
    generation.check_weight("dtg_auxl", **numbers)
    _check_choice("features", features, ("generated", "mixed", "source"))
    _check_choice("targets", targets, ("generated", "random"))
    _check_choice("jacobian", jacobian, ("held_fixed", "exact"))
    if not (labels is None or callable(labels)):
        raise TypeError(f"dtg_auxl(labels=): expected a function of the batch or None, got {type(labels).__name__}.")
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 2):
        raise ValueError(f"dtg_auxl(num_classes={num_classes!r}): expected a whole number of at least 2.")
    options = _Options(
        generator=_generator(generator, num_generated, task, features, hidden),
        pairing={"partner": partner, "labels": labels, "num_classes": num_classes},
        weight=auxiliary_weight,
        manual_weight=manual_weight,
        regularisation_weight=regularisation_weight,
        target_weight=target_weight,
        source=features == "source",
        frozen=targets == "random",
        exact=jacobian == "exact",
        level=outer_level.make_outer_level("dtg_auxl", outer_optimizer, hypergradient, warm_start, default_rate=1e-3),
    )

    def weights(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        found = descent.constant_weights(_loss_weights(options, context, out), out)
        primary = found[context.model.primary]
        return found | {"generated": jnp.full(primary.shape, auxiliary_weight, primary.dtype)}

    three = (partial(_init, options), partial(_inner, options), partial(_outer, options))
    return Method(*three, weights, whole_batch=True)


class _Options(NamedTuple):
    generator: generators.JointGenerator
    pairing: dict
    weight: float
    manual_weight: float
    regularisation_weight: float
    target_weight: float
    source: bool
    frozen: bool
    exact: bool
    level: outer_level.OuterLevel


def _check_choice(option: str, value: str, choices) -> None:
    if value not in choices:
        raise ValueError(f"dtg_auxl({option}={value!r}): expected one of {', '.join(choices)}.")


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


def _pairs(options, context, out, batch, key) -> Pairs:
    return pairs_of("dtg_auxl", out, context.model.primary, batch, key, **options.pairing)


def _features(options, meta, pairs: Pairs) -> jax.Array:
    """x~ / s, `[n, d]`."""
    if options.source:
        return pairs.primary
    return options.generator.features(meta["features"], pairs.primary, pairs.partner)


def _targets(options, meta, pairs: Pairs) -> jax.Array:
    """y~, `[n, k]`."""
    params = jax.lax.stop_gradient(meta["targets"]) if options.frozen else meta["targets"]
    return options.generator.targets(params, _features(options, meta, pairs), pairs.partner, pairs.labels)


def _collapse(options, pairs, features, targets) -> generators.InstanceCollapse:
    sources = (pairs.primary, pairs.partner)
    return generators.instance_collapse(features, targets, *sources, task=options.generator.task, mask=pairs.mask)


def _loss_weights(options, context, out):
    """`{task: weight}` of the tasks the model has itself."""
    weights = {task: options.manual_weight for task in evaluation.auxiliary_tasks(out, context.model.primary)}
    return {context.model.primary: 1.0} | (
        weights if checks.is_traced(options.manual_weight) or options.manual_weight else {}
    )


class _Joint(NamedTuple):
    loss: generation.JointLoss
    pairs: Pairs
    features: jax.Array  # x~ / s
    targets: jax.Array


def _joint_loss(options, context, params, model_state, batch, key, meta, targets=None) -> _Joint:
    """The inner loss, with targets of these params, held fixed in them, unless others are given."""
    out = evaluation.evaluate(context.model, params, model_state, batch, key)
    pairs = _pairs(options, context, out, batch, key)
    if targets is None:
        targets = _targets(options, meta, jax.lax.stop_gradient(pairs))
    features = _features(options, meta, pairs)
    dtype = jax.tree.leaves(out.features)[0].dtype
    arguments = (params, (pairs.scale * features).astype(dtype), targets)
    losses = call(context.model.feature_loss, *arguments, state=model_state)
    if jnp.shape(losses) != targets.shape[:1] or not jnp.issubdtype(jnp.result_type(losses), jnp.floating):
        raise ValueError(
            f"feature_loss returned {jnp.result_type(losses)}{list(jnp.shape(losses))}; expected floating "
            f"[{targets.shape[0]}], one loss per generated instance."
        )
    generated = masked_mean(losses, pairs.mask)
    known = weighted_loss(out.values, _loss_weights(options, context, out), masks=out.masks)
    return _Joint(generation.JointLoss(known + options.weight * generated, generated, out), pairs, features, targets)


def _problem(options, context, model_state, key) -> BilevelProblem:
    """DTG-AuxL as a bilevel problem in the params and the two generators."""

    def inner(params, meta, batch, targets=None):
        return _joint_loss(options, context, params, model_state, batch, key, meta, targets).loss.total

    def update_field(params, meta, batch):
        out = evaluation.evaluate(context.model, params, model_state, batch, key)
        targets = _targets(options, meta, _pairs(options, context, out, batch, key))
        return jax.grad(inner)(params, meta, batch, targets)

    def outer(params, meta, batch):
        out = evaluation.evaluate(context.model, params, model_state, batch, key)
        loss = masked_mean(out.values[context.model.primary], evaluation.mask_of(out, context.model.primary))
        if not checks.is_traced(options.regularisation_weight) and options.regularisation_weight == 0:
            return loss
        pairs = jax.lax.stop_gradient(_pairs(options, context, out, batch, key))
        collapse = _collapse(options, pairs, _features(options, meta, pairs), _targets(options, meta, pairs))
        penalty = collapse.copying + collapse.spread + options.target_weight * collapse.targets
        return loss + options.regularisation_weight * penalty

    lower = {"update_field": update_field} if options.exact else {"inner": inner}
    return BilevelProblem(**lower, outer=outer)


def _init(options, context, state, batch, key):
    if context.model.feature_loss is None:
        raise ValueError(
            "dtg_auxl generates features and labels, and the model has no loss of them. Give TaskModel(feature_loss=), "
            "a function (params, features, labels) -> [n]: the loss of an auxiliary head on given features."
        )
    out = evaluation.loss_shapes(context, state, batch, key)
    names = evaluation.auxiliary_tasks(out, context.model.primary)
    if options.pairing["partner"] not in (None, *names):
        raise ValueError(
            f"dtg_auxl(partner={options.pairing['partner']!r}): the model's auxiliary tasks are {names}. Name one, or "
            "None for pairs of primary instances."
        )
    pairs = jax.eval_shape(partial(_pairs, options, context), out, batch, key)
    meta = options.generator.init(key, pairs.primary.shape[1], pairs.labels.shape[1], pairs.primary.dtype)
    _check_generated(options, meta, pairs)
    problem = _problem(options, context, state.model_state, key)
    jax.eval_shape(problem.inner or problem.update_field, state.params, meta, batch)  # what feature_loss returns
    return outer_level.init_outer(options.level, problem, state.params, meta, batch, key)


def _check_generated(options, meta, pairs) -> None:
    if not (isinstance(meta, Mapping) and set(meta) == {"features", "targets"}):
        raise ValueError("dtg_auxl(generator=): init must return a dict with the keys 'features' and 'targets'.")
    wanted = pairs.primary.shape
    found = jax.eval_shape(partial(_features, options), meta, pairs).shape
    if found != wanted:
        raise ValueError(f"dtg_auxl(generator=) made features of shape {found}; expected {wanted}.")
    found = jax.eval_shape(partial(_targets, options), meta, pairs).shape
    if len(found) != 2 or found[0] != wanted[0]:
        raise ValueError(f"dtg_auxl(generator=) made targets of shape {found}; expected [{wanted[0]}, k].")


def _inner(options, context, state, batch, key):
    def loss(params):
        joint = _joint_loss(options, context, params, state.model_state, batch, key, state.method.meta)
        return joint.loss.total, joint

    grads, joint = jax.grad(loss, has_aux=True)(state.params)
    return descent.descend(context, state, grads, joint.loss.out.state), _metrics(options, context, joint)


def _metrics(options, context, joint: _Joint) -> dict[str, jax.Array]:
    """The common metrics, the generated task's, and `collapse/<term of R>`."""
    out, dtype = joint.loss.out, joint.loss.total.dtype
    collapse = _collapse(options, joint.pairs, joint.features, joint.targets)._asdict()
    classes = options.generator.task == "classification"
    return {
        **descent.loss_metrics(out, _loss_weights(options, context, out)),
        "loss/generated": joint.loss.generated,
        "weight/generated": jnp.asarray(options.weight, dtype),
        **{f"collapse/{name}": value for name, value in collapse.items()},
        **(generation.label_metrics(joint.targets, joint.pairs.mask) if classes else {}),
    }


def _outer(options, context, state, inner_batch, outer_batch, key):
    problem = _problem(options, context, state.model_state, key)
    before = state.method.meta

    def project(meta):
        # Even without a gradient an optimiser may move them, by weight decay.
        return {**meta, "targets": before["targets"]} if options.frozen else meta

    point = (problem, state.params, state.method, inner_batch, outer_batch, key)
    new, metrics = outer_level.update_outer(options.level, *point, project=project)
    return state._replace(method=new), metrics
