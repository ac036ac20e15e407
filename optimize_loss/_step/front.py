"""`optimize_loss`: from a loss and options to a training step."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from optimize_loss._checks import SEED, check_flags, check_integer
from optimize_loss._engine.order import arranged
from optimize_loss._engine.precision import check_precision
from optimize_loss._engine.sharding import check_axis
from optimize_loss._names import Pattern
from optimize_loss._state.loss import Loss
from optimize_loss._state.metrics import check_summaries, observed
from optimize_loss._state.rules import check_rules
from optimize_loss._step import options
from optimize_loss._step.misplaced import checked_names
from optimize_loss._step.options import Around
from optimize_loss._step.rule_links import clips, precision_of, with_rules
from optimize_loss._step.train_step import TrainStep
from optimize_loss.optimizers._resolve import resolve
from optimize_loss.transforms import (
    Accumulate,
    Lookahead,
    Precision,
    ReduceOnPlateau,
    SkipNonFinite,
    SkipSpikes,
    chain,
    with_precision,
)


@checked_names(TrainStep.run, TrainStep.init)
def optimize_loss(
    loss: Callable[..., Any],
    global_step: Any = 0,
    learning_rate: Any = None,
    optimizer: Any = "Adam",
    gradient_noise_scale: Any = None,
    gradient_multipliers: Mapping[Any, Any] | None = None,
    clip_gradients: Any = None,
    learning_rate_decay_fn: Callable[[Any, Any], Any] | None = None,
    update_ops: Iterable[Callable[..., Any]] | None = None,
    variables: Iterable[Pattern] | Pattern | None = None,
    name: str | None = None,
    summaries: Iterable[str] | None = None,
    colocate_gradients_with_ops: bool = False,
    increment_global_step: bool = True,
    *,
    moving_average_decay: float | None = None,
    rules: Mapping[Any, Mapping[str, Any]] | None = None,
    skip: Literal["nonfinite"] | SkipNonFinite | SkipSpikes | None = None,
    loss_scale: Any = None,
    accumulate: int | Accumulate | None = None,
    ema: Any = None,
    lookahead: int | Lookahead | None = None,
    sam: Any = None,
    plateau: ReduceOnPlateau | None = None,
    precision: Literal["float32", "bfloat16", "float8"] | Precision | None = None,
    shard_state: str | None = None,
    seed: int = 0,
    bucket: Literal["auto"] | int | None = "auto",
) -> TrainStep:
    """Build the training step of a loss: one compiled, donating program.

    Gradients pass through noise, multipliers and clipping, in this order, before the optimizer.

    Args:
      loss: a function of `(params, *batch)` that returns a float scalar, or the scalar and an
        `Aux`. If it declares the keyword-only parameters `model_state` or `key`, it is given the
        model state, or a random key that differs from step to step.
      global_step: the step at which counting starts, an integer of at least 0. Schedules see it;
        noise, corrections such as Adam's, and averages go by the number of updates made. None:
        there is no step; schedules see 0, and `learning_rate_decay_fn` is an error.
      learning_rate: a number of at least 0, or a schedule (a function of the step). None if the
        optimizer brings its own.
      optimizer: one of `OPTIMIZER_CLS_NAMES`, which mean TensorFlow 1's optimizers, or the name
        of another of Keras', such as `AdamW`; a subclass of `ol.optimizers.Optimizer`; a function
        of the learning rate, or of nothing when that is None, which returns one of the following;
        an `Optimizer`, a chain or link of `ol.transforms`, to which the rate is added if they have
        none, or an optax transformation, which must contain it. An `Optimizer` keeps its own
        variables: its options are taken, its state is not.
      gradient_noise_scale: standard deviation of normal noise added to every gradient, before it
        is redrawn within two of them; at least 0; a number or a schedule.
      gradient_multipliers: {name or pattern: number}, multiplied to the gradients it names.
      clip_gradients: a number above 0, the largest global norm; a link, such as
        `adaptive_clipping_fn()`; or a function of `[(gradient, parameter), …]` that returns the
        same with other gradients.
      learning_rate_decay_fn: a function of `(learning_rate, step)` that returns the rate of that
        step, such as `lambda rate, step: ol.schedules.cosine_decay(rate, step, 1000)`.
        `state.set(learning_rate=...)` sets the rate that it is given. Ignored, with a warning,
        when `learning_rate` is None.
      update_ops: functions of the model state, or of it and the batch, that return the new model
        state; run in order before the loss, in the same step.
      variables: names or patterns of the parameters to train. The rest get no gradient and no
        state.
      name: stands before the name of every metric, as in `name/loss`.
      summaries: which metrics to report, of `OPTIMIZER_SUMMARIES`: by default the loss, the
        learning rate and the global norms. The loss is always there.
      colocate_gradients_with_ops: whether to constrain each gradient to its parameter's sharding.
      increment_global_step: whether a step advances the global step that schedules see.
      moving_average_decay: where given, the metric `loss/mean` is a moving average of the loss,
        which starts at 0; with `accumulate`, of those of the updates. Training is not affected.
      rules: {pattern: rule}, in order: the first pattern that matches a parameter decides which
        rule it has. A rule is a dict with some of these keys, whose numbers may be schedules, and
        are set as `state.set(**{"weight_decay/**/bias": 0.0})`, with `noise_scale` called `scale`
        and `learning_rate_multiplier` called `multiplier`:
        `learning_rate_multiplier`: at least 0, of all that a step moves the parameter by, decay
        that goes by the rate too; or a list with one for each entry of the first axis, for layers
        that are stacked, set as `rules.learning_rate_multiplier.` + the pattern with `.` for `/` +
        `/0` for the first.
        `weight_decay`: at least 0, in place of the optimizer's; where that has none, as in `AdamW`.
        `clip_norm`: above 0, the largest joint norm of the rule's parameters, before
        `clip_gradients`, which stays global; set as `rules.clip_norm.` + the pattern with `.` for
        `/` + `/max_norm`.
        `noise_scale`: at least 0, in place of `gradient_noise_scale`.
        `freeze`: True for no gradient and no state, as if `variables` did not name it.
        `optimizer`: as the argument of this name; the others do not see the parameter. Its links
        are called by its name, as `SGD.rate`. Without a rate of its own it shares `learning_rate`:
        `state.set(learning_rate=...)` sets both. One of its own is set as `SGD.rate/learning_rate`,
        and is the metric `learning_rate/SGD.rate`.
        `state_dtype`: "float32", "bfloat16" or "float8", as `precision` has it for all others.
        A rule that decides for no float parameter raises in `step.init`.
      skip: "nonfinite", `ol.transforms.SkipNonFinite()` or `ol.Spike()`: a batch whose loss or
        gradients are not finite, or unusually large, leaves no trace in the state, the model state
        included, but for being counted, in the metrics `skipped` and `skipped_in_a_row`.
        `state.offender` names the parameter. So many in a row, by default 10, are a
        `NonFiniteError`, raised when the host comes to know of it: by `step.run` always, by other
        calls where the row has not ended before the state that they are given. With a dynamic loss
        scale above 1, gradients alone that are not finite are left to that.
      loss_scale: "dynamic", or a number above 0, or a link of that kind: by what the loss is
        multiplied for the gradients, which lifts those of float16 over its smallest number. A
        dynamic one is the metric `loss_scale`, as it is after the step: it falls where a batch was
        left out because of a gradient that is not finite; the model state, too, is then as before.
      accumulate: how many batches make one update, at least 1, or an `ol.transforms.Accumulate`
        with another `reduce` than the mean. What goes by steps, or by the loss, goes by updates.
      ema: the decay of an average of the parameters, in [0, 1), a schedule of it, or an
        `ol.transforms.AverageParams`. `state.eval_params` shows the average, in which the first
        parameters do not count: after n updates the newest have the weight (1-β) / (1-βⁿ), about
        1/n at first.
      lookahead: how many updates come before one of slow parameters, at least 1, or an
        `ol.transforms.Lookahead`. `state.eval_params` shows the slow ones.
      sam: the radius ρ within which the parameters are first moved to where the loss is larger,
        above 0: sharpness-aware minimization. The gradients are those of there, at twice the
        cost; loss, metrics and model state those of the parameters. `state.set(rho=...)` sets it.
        Where gradients are summed by `SumOverAxis`, each device climbs by its own gradient, before
        the sum, as in m-sharpness with the m of a device's batch; and with `accumulate`, by that
        of each batch.
      plateau: an `ol.transforms.ReduceOnPlateau`, which lowers the learning rate where the loss
        does not fall; its factor is the metric `plateau_scale`.
      precision: how exactly the optimizer's moments are kept: "bfloat16", half of the memory, or
        "float8", a quarter. Parameters of 16 bits or fewer are then rounded stochastically, so that
        small updates are not lost. `ol.Precision` has more choices and all conditions;
        `state.decoded` shows the moments in float32. None, or "float32", changes nothing.
      shard_state: the name of an axis of the mesh that the parameters are on: each device along it
        keeps and updates its part of every slot, and gathers the new parameters (ZeRO-1). A slot
        none of whose dimensions is a multiple of the number of devices stays whole on each.
      seed: of the noise, of stochastic rounding, and of the key of losses that take one; an
        integer in [0, 2**32).
      bucket: parameters of at most so many entries share one array inside of the state, which
        makes a step with many small ones faster. None: none do. What is computed is the same, but
        for the order of sums in a norm over all gradients, and last bits where XLA contracts other
        products and sums. Links that are not `elementwise` keep
        their parameters by themselves, and an optax transformation, or any other that sees the
        whole tree, keeps all.

    Returns:
      A `TrainStep`: `state = step.init(params)`, then `state, metrics = step(state, batch)`. Its
      links are `gradient_noise`, `gradient_multipliers`, `clip_gradients`, then the optimizer's,
      such as `adam` and `rate`: `state.set(**{"clip_gradients/max_norm": 2.0})`.

    Raises:
      InvalidType: an argument is of the wrong kind. It is a `ValueError`, as contrib promises,
        and a `TypeError`.
      ValueError: an argument has a wrong value, or contradicts another one.

    Example:
      One step of gradient descent on |w · x|, from w = 10 with x = 5:

      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> step = ol.optimize_loss(lambda p, x: abs(p["w"] * x), learning_rate=0.1, optimizer="SGD")
      >>> state, metrics = step(step.init({"w": 10.0}), 5.0)
      >>> print(metrics["loss"], state.params["w"], state.step)
      50.0 9.5 1

    References:
      `tf.contrib.layers.optimize_loss`, TensorFlow 0.8 to 1.15. The README lists the differences.
    """
    check_flags(
        colocate_gradients_with_ops=colocate_gradients_with_ops,
        increment_global_step=increment_global_step,
    )
    first_step = options.check_first_step(global_step)
    rate = options.check_rate(learning_rate, learning_rate_decay_fn, global_step)
    chosen = check_summaries(summaries)
    own = check_rules(rules)
    links = options.gradient_links(gradient_noise_scale, own, seed, gradient_multipliers)
    links |= observed(chosen, clips(own) | options.clip_links(clip_gradients))
    links |= options.mean_of_loss(moving_average_decay)
    around = Around(skip, loss_scale, accumulate, plateau, sam, lookahead, ema)
    every = around.links(arranged(links, with_rules(own, resolve(optimizer, rate), rate)))
    seed = check_integer("seed", seed, SEED)
    kept_as = precision_of(own, check_precision(precision, seed))
    return TrainStep(
        loss=Loss(loss),
        chain=options.check_known(with_precision(chain(**every), kept_as, seed=seed)),
        variables=options.check_variables(variables),
        update_ops=options.check_functions("update_ops", update_ops),
        summaries=chosen,
        name=options.check_name(name),
        first_step=first_step,
        increment_step=increment_global_step and global_step is not None,
        colocate_gradients=colocate_gradients_with_ops,
        seed=seed,
        learning_rate=rate,
        shard_state=check_axis(shard_state),
        bucket=options.check_bucket(bucket),
        rules=own,
    )
