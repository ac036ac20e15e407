# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Groups, guard and long runs
#
# A run of weeks meets broken batches, machines that stop, code that changes. This page trains a small network through all
# of it.

# %%
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import optimize_loss as ol

# %% [markdown]
# ## A network and its data
#
# A frozen embedding, two layers, a head. The target is the parity of two of eight bits, with some noise in the bits.


# %%
def init_net(seed=0):
    random = np.random.default_rng(seed)
    normal = lambda *shape: (random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
    return {
        "embed": {"table": normal(8, 32)},
        "body": {
            "a": {"kernel": normal(32, 64), "bias": np.zeros(64, np.float32)},
            "b": {"kernel": normal(64, 64), "bias": np.zeros(64, np.float32)},
        },
        "head": {"kernel": normal(64, 1), "bias": np.zeros(1, np.float32)},
    }


def predict(params, x):
    x = x @ params["embed"]["table"]
    for layer in params["body"].values():
        x = jax.nn.gelu(x @ layer["kernel"] + layer["bias"][None])
    return (x @ params["head"]["kernel"] + params["head"]["bias"][None])[:, 0]


def loss(params, x, y):
    z = predict(params, x)
    return jnp.mean(jax.nn.softplus(z) - y * z)


def batches(seed, not_a_number=(), mislabelled=()):
    random, n = np.random.default_rng(seed), 0
    while True:
        bits = random.integers(2, size=(64, 8))
        x = (2 * bits - 1 + 0.3 * random.standard_normal((64, 8))).astype(np.float32)
        y = (bits[:, 0] ^ bits[:, 1]).astype(np.float32)
        yield x * np.float32("nan" if n in not_a_number else 1), 1 - y if n in mislabelled else y
        n += 1


# %% [markdown]
# ## Groups
#
# Rules give parameters something of their own. The first pattern that matches a parameter decides. A rule that decides for
# nothing is an error, so a typing mistake cannot be silent.

# %%
rules = {
    "embed/**": dict(freeze=True),
    "**/bias": dict(weight_decay=0.0),
    "body/**": dict(learning_rate_multiplier=0.5),
    "head/*": dict(optimizer="SGD"),
}
options = dict(optimizer="AdamW", learning_rate=3e-3, clip_gradients=1.0, rules=rules)
print(ol.optimize_loss(loss, **options).explain(init_net(), steps=600))

try:
    ol.optimize_loss(loss, learning_rate=0.1, rules={"haed/**": dict(freeze=True)}).init(init_net())
except ValueError as error:
    print("\nValueError:", error)

# %% [markdown]
# ## Guard
#
# Two batches of this run are broken: in one all labels are the wrong way round, one is NaN. `skip` leaves such batches out:
# parameters, slots, averages and the count of updates are as if they had never come. `Spike` also knows what norm of the
# gradients is unusual: here one of more than five standard deviations of its logarithm above its mean.

# %%
wrong, nan = 400, 500
guards = {"no guard": None, "skip='nonfinite'": "nonfinite", "skip=ol.Spike(5.0)": ol.Spike(5.0)}
results = {}
for name, skip in guards.items():
    step = ol.optimize_loss(loss, **options, skip=skip, ema=0.98)
    state, metrics = step.run(
        step.init(init_net()), batches(1, [nan], [wrong]), steps=600, steps_per_call=50
    )
    results[name] = metrics["loss"]
    last = np.mean(metrics["loss"][-50:])
    print(f"{name:20} {state.step} updates, loss {last:.3f}, last left out for: {state.offender}")

# %%
figure, axes = plt.subplots(figsize=(10, 3.8), layout="constrained")
for (name, curve), line in zip(results.items(), ("-", "--", ":"), strict=True):
    axes.semilogy(curve, line, label=name, lw=1.5)
axes.axvline(wrong, color="black", lw=0.8, label="labels the wrong way round")
axes.axvline(nan, color="grey", lw=0.8, ls="-.", label="NaN")
axes.set(title="two broken batches", xlabel="batch", ylabel="cross-entropy (nats)", xlim=(350, 600))
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# The guarded run is not only near the run that never saw the NaN: it is the same, bit for bit.


# %%
def without(source, dropped):
    return (batch for n, batch in enumerate(source) if n not in dropped)


step = ol.optimize_loss(loss, **options, skip="nonfinite", ema=0.98)
seen, _ = step.run(step.init(init_net()), batches(1, [150]), steps=301, steps_per_call=50)
never, _ = step.run(step.init(init_net()), without(batches(1), {150}), steps=300, steps_per_call=50)
same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), seen.params, never.params)
print("the same, bit for bit:", all(jax.tree.leaves(same)))
assert all(jax.tree.leaves(same))

# %% [markdown]
# ## Accumulation and averages
#
# `accumulate=4` makes one update of four batches; the rest of the chain runs once. `ema` keeps an average of the parameters,
# and `state.eval_params` is what to evaluate.

# %%
step = ol.optimize_loss(loss, **options, accumulate=4, ema=0.98)
state, metrics = step.run(step.init(init_net()), batches(2), steps=1200, steps_per_call=100)
x, y = next(batches(99))
print(f"{len(metrics['loss'])} batches, {state.step} updates")
newest, average = loss(state.params, x, y), loss(state.eval_params, x, y)
print(f"loss of the newest {newest:.3f}, of the average {average:.3f}")
ol.plot.metrics(metrics)

# %% [markdown]
# ## Save, stop, go on
#
# A state is one file, by names, with checksums, without code. `Checkpoints` is a hook: it keeps the newest few, and the position in
# the data with each. `resume` gives back the newest that is whole. Two batches of this run are skipped, so that there are fewer
# updates than batches; the position counts batches.


# %%
class Data:
    """Batches whose position can be saved."""

    def __init__(self):
        self.random, self.taken = np.random.default_rng(3), 0

    def __iter__(self):
        return self

    def __next__(self):
        self.taken += 1
        bits = self.random.integers(2, size=(64, 8))
        x = (2 * bits - 1 + 0.3 * self.random.standard_normal((64, 8))).astype(np.float32)
        x = x * np.float32("nan" if self.taken in (50, 120) else 1)
        return x, (bits[:, 0] ^ bits[:, 1]).astype(np.float32)

    def get_state(self):
        return {"random": self.random.bit_generator.state, "taken": self.taken}

    def set_state(self, state):
        self.random.bit_generator.state, self.taken = state["random"], state["taken"]


step = ol.optimize_loss(loss, **options, ema=0.98, skip="nonfinite")
whole, _ = step.run(step.init(init_net()), Data(), steps=300)


def machine_stops(state, metrics):
    raise OSError("the machine stops")


folder = tempfile.mkdtemp()
data = Data()
checkpoints = ol.Checkpoints(folder, keep=2, every=100, parts={"data": data})
try:
    step.run(
        step.init(init_net()), data, steps=300, hooks=[checkpoints, ol.every(230, machine_stops)]
    )
except OSError as error:
    print(error, "· files of the steps", checkpoints.steps)

data = Data()
checkpoints = ol.Checkpoints(folder, keep=2, every=100, parts={"data": data})
state = checkpoints.resume(step.init(init_net()))
print(f"{state.batches} batches, {state.step} updates")
state, _ = step.run(state, data, steps=100, hooks=[checkpoints])
same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), state.params, whole.params)
print("the same as the whole run, bit for bit:", all(jax.tree.leaves(same)))
assert all(jax.tree.leaves(same))

# %% [markdown]
# The code may change in between. Here clipping goes, noise comes, and the body has another name. The report says what had a
# place and what begins again.

# %%
path = checkpoints.path(checkpoints.steps[-1])


def renamed(params):
    return {"embed": params["embed"], "trunk": params["body"], "head": params["head"]}


def loss_of_renamed(params, x, y):
    return loss({"embed": params["embed"], "body": params["trunk"], "head": params["head"]}, x, y)


edited = ol.optimize_loss(
    loss_of_renamed,
    optimizer="AdamW",
    learning_rate=3e-3,
    gradient_noise_scale=1e-4,
    ema=0.98,
    rules={"embed/**": dict(freeze=True), "head/*": dict(optimizer="SGD")},
)
state, report = ol.restore(path, like=edited.init(renamed(init_net())), rename={"body": "trunk"})
print(report)

# %% [markdown]
# ## A new beginning for a part
#
# `reset` gives slots of some parameters a new beginning, and `set` changes any number; both compile nothing. The head has a
# rate of its own, so the name of the link stands before the number.

# %%
state = state.reset("trunk/b/*").set(**{"rate/learning_rate": 1e-3})
state, metrics = edited.run(state, batches(4), steps=50)
print(
    state.step,
    state.optimizer["rate"]["learning_rate"],
    state.optimizer["SGD.rate"]["learning_rate"],
)
