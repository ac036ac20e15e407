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
        `Aux`. If it declares the keyword-only parameters `model_state` or `key`, it receives the
        model state, or a random key that differs from step to step.
      global_step: the step at which counting starts, an integer of at least 0. Schedules see it;
        noise, averages and corrections such as Adam's count the updates instead. With None there is
        no step: schedules see 0, and `learning_rate_decay_fn` is an error.
      learning_rate: a number of at least 0, or a schedule (a function of the step). None if the
        optimizer brings its own.
      optimizer: one of `OPTIMIZER_CLS_NAMES`, which mean TensorFlow 1's optimizers, or the name
        of another of Keras', such as `AdamW`; a subclass of `ol.optimizers.Optimizer`; a function
        of the learning rate, or of nothing when that is None, which returns one of the following;
        an `Optimizer`; a chain or link of `ol.transforms`, to which the rate is added if it has
        none; or an optax transformation, which must contain the rate. The options of an `Optimizer`
        are used, but not its variables.
      gradient_noise_scale: standard deviation of the Gaussian noise that is added to every
        gradient; at least 0; a number or a schedule. Samples beyond two standard deviations are
        redrawn.
      gradient_multipliers: {name or pattern: number}; each number multiplies the gradients that its
        key names.
      clip_gradients: a number above 0, the largest global norm; a link, such as
        `adaptive_clipping_fn()`; or a function of `[(gradient, parameter), …]` that returns the
        same with other gradients.
      learning_rate_decay_fn: a function of `(learning_rate, step)` that returns the rate of that
        step, such as `lambda rate, step: ol.schedules.cosine_decay(rate, step, 1000)`.
        `state.set(learning_rate=...)` sets the rate that it receives. Ignored, with a warning, when
        `learning_rate` is None.
      update_ops: functions of the model state, or of it and the batch, that return the new model
        state; run in order before the loss, in the same step.
      variables: names or patterns of the parameters to train. The rest get no gradient and no
        state.
      name: a prefix of the name of every metric, as in `name/loss`.
      summaries: which metrics of `OPTIMIZER_SUMMARIES` to report: by default the loss, the learning
        rate and the global norms. The loss is always reported.
      colocate_gradients_with_ops: whether to constrain each gradient to its parameter's sharding.
      increment_global_step: whether a step advances the global step that schedules see.
      moving_average_decay: if given, the metric `loss/mean` is a moving average of the loss, which
        starts at 0; with `accumulate`, an average over updates. Training is not affected.
      rules: {pattern: rule}, in order: the first pattern that matches a parameter decides its rule.
        A rule is a dict with some of these keys. Their numbers may be schedules. To set one, use
        `state.set(**{"weight_decay/**/bias": 0.0})`; there, `noise_scale` is called `scale`, and
        `learning_rate_multiplier` is called `multiplier`.

        - `learning_rate_multiplier`: at least 0; multiplies the complete update of the parameter,
          including decoupled decay. Or a list with one number per entry of the first axis, for
          stacked layers, set as `rules.learning_rate_multiplier.` + the pattern with `.` for `/` +
          `/0` for the first.
        - `weight_decay`: at least 0; replaces the optimizer's, or adds decay as in `AdamW` if the
          optimizer has none.
        - `clip_norm`: above 0, the largest joint norm of the gradients of the rule's parameters. It
          comes before `clip_gradients`, which stays global; set as `rules.clip_norm.` + the pattern
          with `.` for `/` + `/max_norm`.
        - `noise_scale`: at least 0; replaces `gradient_noise_scale`.
        - `freeze`: True for no gradient and no state, as if `variables` did not name it.
        - `optimizer`: like the argument `optimizer`, which then does not see the parameter. The
          names of its links begin with its name, as in `SGD.rate`. If it has no rate, it shares
          `learning_rate`, and `state.set(learning_rate=...)` sets both. Its own rate is set as
          `SGD.rate/learning_rate`, and is the metric `learning_rate/SGD.rate`.
        - `state_dtype`: "float32", "bfloat16" or "float8", like `precision` for all other
          parameters.

        A rule that decides for no float parameter is an error in `step.init`.
      skip: "nonfinite", `ol.transforms.SkipNonFinite()` or `ol.Spike()`: skips a batch if its loss
        or gradients are not finite, or unusually large. A skipped batch does not change the state
        or the model state, except for the counts in the metrics `skipped` and `skipped_in_a_row`.
        `state.offender` names the parameter. Several skips in a row, by default 10, raise a
        `NonFiniteError` as soon as the host sees the count: `step.run` always does; other calls do
        if the skips continue up to the state that they receive. With a dynamic loss scale above 1,
        the loss scale handles gradients that are not finite.
      loss_scale: "dynamic", a number above 0, or a link of that kind. The loss is multiplied by it
        before the gradients are taken, so that float16 gradients do not underflow. A dynamic scale
        is reported after the step as the metric `loss_scale`. It falls when a gradient is not
        finite; that batch is skipped and does not change the model state.
      accumulate: how many batches make one update, at least 1, or an `ol.transforms.Accumulate`
        with another `reduce` than the mean. Everything that counts steps or reads the loss then
        counts updates, not batches.
      ema: the decay of an average of the parameters, in [0, 1), a schedule of it, or an
        `ol.transforms.AverageParams`. `state.eval_params` shows the average, which does not include
        the initial parameters: after n updates the newest parameters have the weight (1-β) /
        (1-βⁿ), about 1/n at first.
      lookahead: how many updates come before one of the slow parameters, at least 1, or an
        `ol.transforms.Lookahead`. `state.eval_params` shows the slow parameters.
      sam: the radius ρ of sharpness-aware minimization, above 0. The gradients are taken at a point
        at distance ρ where the loss is larger, at twice the cost; the loss, the metrics and the
        model state are those of the parameters themselves. `state.set(rho=...)` sets it. With
        `SumOverAxis`, each device ascends along its own gradient before the sum, which is
        m-sharpness with m the batch size of a device; with `accumulate`, each batch ascends along
        its own gradient.
      plateau: an `ol.transforms.ReduceOnPlateau`, which lowers the learning rate when the loss
        stops falling; its factor is the metric `plateau_scale`.
      precision: the precision in which the optimizer's moments are stored: "bfloat16" takes half
        the memory, and "float8" a quarter. Parameters of 16 bits or fewer are then rounded
        stochastically, so that small updates are not lost. `ol.Precision` has more choices and all
        details; `state.decoded` shows the moments in float32. None, or "float32", changes nothing.
      shard_state: the name of an axis of the mesh that the parameters are on: each device along it
        stores and updates its part of every slot, and gathers the new parameters (ZeRO-1). A slot
        is replicated if none of its dimensions is a multiple of the number of devices.
      seed: the seed of the noise, of stochastic rounding, and of the key of losses that take one;
        an integer in [0, 2**32).
      bucket: parameters with at most this many entries share one array inside the state, which
        makes a step with many small parameters faster. None turns this off. The results are the
        same, up to the order of sums in a global norm, and the last bits where XLA fuses products
        and sums differently. Parameters of links that are not `elementwise` are not shared; nor are
        any parameters if there is an optax transformation or another link that sees the complete
        tree.

    Returns:
      A `TrainStep`: `state = step.init(params)`, then `state, metrics = step(state, batch)`. Its
      links are `gradient_noise`, `gradient_multipliers` and `clip_gradients`, then those of the
      optimizer, such as `adam` and `rate`: `state.set(**{"clip_gradients/max_norm": 2.0})`.

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
      `tf.contrib.layers.optimize_loss`, TensorFlow 0.8 to 1.15. `docs/migration.md` lists the
      differences.
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
