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
# # A small language model, from data to text
#
# A transformer learns to write Python's manual, one character after the other. The text is in every Python, in `pydoc_data`. This
# page goes the way of a real project: data, a model, a rate, training with evaluation and checkpoints, a machine that stops,
# and text in the end. It takes about a minute on two cores.

# %%
import json
import pathlib
import re
import tempfile
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import optimize_loss as ol
from optimize_loss.loggers import JsonLines

CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 64, 64, 4, 2, 16

# %% [markdown]
# ## Data
#
# Every tenth topic is held out, the others are for training. Tables are removed. A batch is cut from random places, which are a
# function of the epoch. So a run that resumes sees the batches that it would have seen.

# %%
tables = re.compile(r"^ *[|+].*\n", flags=re.MULTILINE)
texts = [tables.sub("", text) for _, text in sorted(topics.items())]
alphabet = sorted(set("".join(texts)))
code = {character: i for i, character in enumerate(alphabet)}


def encoded(texts):
    return np.array([code[character] for character in "".join(texts)], np.int32)


held_out = encoded(texts[::10])
train = encoded(text for i, text in enumerate(texts) if i % 10)
print(f"{len(train):,} characters, {len(held_out):,} held out, {len(alphabet)} different ones")


def windows(data, seed, count):
    random = np.random.default_rng(seed)
    for _ in range(count):
        start = random.integers(len(data) - CONTEXT, size=(BATCH, 1))
        yield data[start + np.arange(CONTEXT + 1)]


# %% [markdown]
# ## Model
#
# A transformer with norms before each part, as plain functions of a dictionary of arrays.


# %%
def init_net(seed=0):
    random = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        drawn = random.standard_normal(shape) * scale / np.sqrt(shape[0])
        return drawn.astype(np.float32)

    def layer():
        return {
            "attention": {
                "norm": np.ones(WIDTH, np.float32),
                "in": normal(WIDTH, 3 * WIDTH),
                "out": normal(WIDTH, WIDTH, scale=0.5),
            },
            "mlp": {
                "norm": np.ones(WIDTH, np.float32),
                "in": normal(WIDTH, 4 * WIDTH),
                "out": normal(4 * WIDTH, WIDTH, scale=0.5),
            },
        }

    return {
        "embed": {
            "characters": 0.1 * random.standard_normal((len(alphabet), WIDTH)).astype(np.float32),
            "places": 0.1 * random.standard_normal((CONTEXT, WIDTH)).astype(np.float32),
        },
        "layers": {str(i): layer() for i in range(LAYERS)},
        "head": {
            "norm": np.ones(WIDTH, np.float32),
            "kernel": normal(WIDTH, len(alphabet), scale=0.1),
            "bias": np.zeros(len(alphabet), np.float32),
        },
    }


def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def logits(params, characters):
    """From [batch, length] characters to [batch, length, alphabet]."""
    batch, length = characters.shape
    x = params["embed"]["characters"][characters] + params["embed"]["places"][None, :length]
    for layer in params["layers"].values():
        attention, mlp = layer["attention"], layer["mlp"]
        heads = norm(x, attention["norm"][None, None]) @ attention["in"]
        q, k, v = jnp.moveaxis(heads.reshape(batch, length, 3, HEADS, -1), 2, 0)
        seen = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + seen.reshape(batch, length, WIDTH) @ attention["out"]
        x = x + jax.nn.gelu(norm(x, mlp["norm"][None, None]) @ mlp["in"]) @ mlp["out"]
    head = params["head"]
    return norm(x, head["norm"][None, None]) @ head["kernel"] + head["bias"][None, None]


def loss(params, text):
    z, following = logits(params, text[:, :-1]), text[:, 1:]
    chance = jnp.take_along_axis(jax.nn.log_softmax(z), following[..., None], axis=-1)
    right = jnp.mean(jnp.argmax(z, axis=-1) == following)
    return -chance.mean(), ol.Aux(metrics={"accuracy": right})


# %% [markdown]
# ## A step, and what it will do
#
# Muon moves the matrices inside of the layers. All else, here by name the embedding and the head, goes to Adam, which is built in.
# Norms and the bias are not decayed. `explain` shows which is which, before anything runs.

# %%
STEPS = 600


def build(learning_rate):
    return ol.optimize_loss(
        loss,
        optimizer=ol.optimizers.Muon(
            learning_rate, exclude_layers=["embed", "head"], weight_decay=0.01
        ),
        clip_gradients=1.0,
        rules={"**/norm|head/bias": dict(weight_decay=0.0)},
        skip="nonfinite",
        ema=0.98,
    )


print(build(1e-2).explain(init_net(), steps=STEPS))

# %% [markdown]
# ## Which rate?
#
# A sweep trains with several rates side by side, in one program. Forty steps are enough to see which rates are too low or too high.

# %%
step = build(1e-2)
rates = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
first = np.stack(list(windows(train, seed=100, count=40)))
sweep = step.sweep(step.init(init_net()), first, learning_rate=rates)
best = sweep.points[sweep.best]["learning_rate"]
print(f"lowest loss with a rate of {best}")
sweep.plot()

# %% [markdown]
# ## Training
#
# The rate climbs to half of the one that was found, since the best one of a short run is often too high for a longer one. Then it falls
# along a cosine.
#
# Everything that a run needs is built in one function: batches, hooks, checkpoints. `Checkpoints` also keeps the position in the data.

# %%
peak = best / 2
folder = pathlib.Path(tempfile.mkdtemp())
schedule = ol.schedules.CosineDecay(
    peak / 10, decay_steps=STEPS - 50, alpha=0.02, warmup_target=peak, warmup_steps=50
)


def epoch(number):
    return windows(train, seed=number, count=150)


def run(*more_hooks):
    """Train to the end, from the newest checkpoint if there is one."""
    step = build(schedule)
    batches = ol.Epochs(epoch, count=4)
    checkpoints = ol.Checkpoints(folder / "run", keep=2, every=100, parts={"data": batches})
    state = checkpoints.resume(step.init(init_net()))
    print(f"from batch {state.batches}, epoch {batches.epoch}")
    with JsonLines(folder / "log.jsonl", every=10) as log:
        evaluate = ol.Evaluate(
            step, lambda: windows(held_out, seed=0, count=20), every=50, then=[log]
        )
        hooks = [log, evaluate, checkpoints, *more_hooks]
        state, _ = step.run(state, batches, steps_per_call=10, hooks=hooks)
    return state, evaluate.latest


# %% [markdown]
# At batch 340, the machine stops. That is played by a hook that raises an error; the last checkpoint is that of batch 300.


# %%
def power_cut(state, metrics):
    raise SystemError("the power is gone")


try:
    run(ol.every(340, power_cut))
except SystemError as error:
    print("SystemError:", error)

# %% [markdown]
# In real life, the script starts again. Here the same function builds all again: a new step, new batches, new hooks. It goes on from
# the file, with the batch that comes next.

# %%
state, last = run()
print(f"batch {state.batches}: " + ", ".join(f"{tag} {value:.3f}" for tag, value in last.items()))
assert last["eval/loss"] < 2.0

# %% [markdown]
# ## Curves
#
# The log has a line for each tenth batch, and for each evaluation. The evaluations are those of `state.eval_params`, the average of the
# parameters. Batches 300 to 340 are in it twice, once from each run; their losses agree.

# %%
lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def column(tag):
    return np.array([(line["batch"], line[tag]) for line in lines if tag in line]).T


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
left.plot(*column("loss"), lw=0.8, label="training")
left.plot(*column("eval/loss"), "o-", ms=4, label="held out, average of the parameters")
left.axvline(340, color="grey", lw=0.8, ls="--", label="power cut")
left.set(title="loss", xlabel="batch", ylabel="cross-entropy (nats a character)")
left.legend()
right.plot(*column("learning_rate"), color="C2")
right.set(title="schedule", xlabel="batch", ylabel="learning rate")
plt.show()

# %% [markdown]
# ## Text
#
# One character after the other is drawn, from the last ones as many as the model sees.


# %%
@jax.jit
def write(params, key, start):
    def next_character(seen, key):
        z = logits(params, seen[None])[0, -1]
        drawn = jax.random.categorical(key, z / 0.4)
        return jnp.append(seen[1:], drawn), drawn

    return jax.lax.scan(next_character, start, jax.random.split(key, 500))[1]


start = encoded(texts[0])[:CONTEXT]
drawn = write(state.eval_params, jax.random.key(1), start)
print("".join(alphabet[i] for i in drawn))
