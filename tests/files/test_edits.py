"""A file is restored into a step that has been edited, and the report says what was matched."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimize_loss._files.named import on_host
from tests.cases import random_like
from tests.files.saved import (
    NAMES,
    PLAIN,
    T,
    X,
    assert_equal,
    assert_matched,
    built,
    links,
    loss,
    ol,
    params,
    renamed_loss,
    saved,
)


def of(*names, slots=("m", "v"), link="adam"):
    """Return the names of the slots of these parameters."""
    return {f"optimizer/{link}/{slot}/{name}" for slot in slots for name in names}


def first_of(link, **rest):
    return T.chain(**link, **dict(links(**rest).links))


class Edit:
    """What changes between a save and the restore, and what the report must say."""

    def __init__(self, before, after, new=(), unused=(), start=None, rename=None, where="dense"):
        self.before, self.after, self.start, self.rename = before, after, start, rename
        self.new, self.unused, self.where = set(new), set(unused), where


def wider_loss(params, x, *, key):
    return loss(params, x, key=key) + jnp.sum(params["scale"] ** 2)


EDITS = {
    "add-clip": Edit(
        PLAIN, built(first_of({"norm": T.ClipByGlobalNorm(1.0)})), {"optimizer/norm/max_norm"}
    ),
    "remove-clip": Edit(PLAIN, built(links(clip=None)), (), {"optimizer/clip/max_value"}),
    "add-noise": Edit(
        PLAIN,
        built(links(), gradient_noise_scale=0.1),
        {"optimizer/gradient_noise/scale", "optimizer/gradient_noise/seed"},
    ),
    "reorder-links": Edit(
        PLAIN,
        built(
            T.chain(
                **dict(reversed([x for x in links().links if x[0] != "rate"])),
                rate=T.ScaleByLearningRate(0.01),
            )
        ),
    ),
    "rename": Edit(
        PLAIN,
        built(links(), renamed_loss),
        start=lambda p: {"body": {"first": p["dense"]}, "head": p["head"]},
        rename={"dense": "body/first"},
        where="body/first",
    ),
    "unfreeze": Edit(
        built(links(), variables=["head/**"]), PLAIN, of("dense/bias", "dense/kernel")
    ),
    "freeze": Edit(
        PLAIN, built(links(), variables=["head/**"]), (), of("dense/bias", "dense/kernel")
    ),
    "add-a-parameter": Edit(
        PLAIN,
        built(links(), wider_loss),
        {"params/scale"} | of("scale"),
        start=lambda p: {**p, "scale": jnp.ones(3)},
    ),
    "bucket-on-to-off": Edit(built(links(), bucket="auto"), built(links(), bucket=None)),
    "bucket-off-to-on": Edit(built(links(), bucket=None), built(links(), bucket="auto")),
    "bucket-of-others": Edit(built(links(), bucket=4), built(links(), bucket=5)),
    "accumulate-1-to-4": Edit(
        PLAIN,
        built(first_of({"gather": T.Accumulate(4)})),
        of(*NAMES, slots=["sum"], link="gather")
        | {"optimizer/gather/every", "optimizer/gather/gathered"},
    ),
    "add-ema": Edit(
        PLAIN,
        built(links(ema=T.AverageParams(0.9))),
        of(*NAMES, slots=["average"], link="ema") | {"optimizer/ema/decay"},
    ),
    "add-amsgrad": Edit(
        PLAIN, built(links(adam=T.ScaleByAdam(amsgrad=True))), of(*NAMES, slots=["v_max"])
    ),
    "other-rule": Edit(
        PLAIN,
        built(
            first_of({"clip": T.ClipByValue(1.0), "lion": T.ScaleByLion()}, clip=None, adam=None)
        ),
        of(*NAMES, slots=["m"], link="lion") | {"optimizer/lion/beta_1", "optimizer/lion/beta_2"},
        of(*NAMES) | {f"optimizer/adam/{x}" for x in ("beta_1", "beta_2", "epsilon")},
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_restore_after_an_edit(path, name):
    edit = EDITS[name]
    wanted = saved(edit.before, path)
    like = edit.after.init((edit.start or (lambda p: p))(params(1)))
    fresh = on_host(like)
    state, report = ol.restore(path, like, rename=edit.rename)
    assert (set(report.new), set(report.unused)) == (edit.new, edit.unused)
    assert set(report.matched) == set(fresh) - edit.new
    assert len(report.matched) == len(wanted) - len(edit.unused)
    if edit.rename:
        wanted = {n.replace("dense", edit.where): x for n, x in wanted.items()}
    assert_matched(state, report, wanted)
    for leaf, old in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert (leaf.committed, leaf.sharding) == (old.committed, old.sharding)
        assert leaf.unsafe_buffer_pointer() != old.unsafe_buffer_pointer()
    state, metrics = edit.after.many(state, X[:3])
    assert np.isfinite(metrics["loss"]).all()
    assert int(state.step) == (3 if "accumulate" in name else 6)


@pytest.mark.parametrize("before", [None, "auto"])
@pytest.mark.parametrize("after", [None, "auto"])
def test_layouts_do_not_matter_for_what_follows(path, before, after):
    first, second = (built(links(), bucket=bucket) for bucket in (before, after))
    state, _ = first.many(first.init(params()), X[:5])
    ol.save(path, state)
    again, _ = ol.restore(path, second.init(params(1)), strict=True)
    assert again.layout is None if after is None else again.layout is not None
    straight = second.init(params()).with_trees(state.params, state.optimizer)
    straight = dataclasses.replace(straight, key=state.key, batches=state.batches)
    assert_equal(again, straight)
    assert_equal(second.many(again, X[:5])[0], second.many(straight, X[:5])[0])


SIZES = {"big": (80, 64), "a": (3,), "b": (2,)}  # small ones have 16 bits where 8 are asked for
ROUNDED = {"optimizer/round_params/seed"}
MOMENTS = {
    "float32": of("big", "a", "b"),
    "bfloat16": of("big", "a", "b", slots=["m+v_bf16"]) | ROUNDED,
    "float8": of("big", slots=["m+v_f8", "m+v_scale"]) | of("a", "b", slots=["m+v_bf16"]) | ROUNDED,
}


@pytest.mark.parametrize("before", MOMENTS)
@pytest.mark.parametrize("after", MOMENTS)
@pytest.mark.parametrize("bucket", ["auto", None])
def test_moments_in_another_precision_are_new(path, before, after, bucket):
    def fits(params, x):
        return sum(jnp.sum((leaf - x) ** 2) for leaf in params.values())

    first, second = (
        built("AdamW", fits, precision=precision, bucket=bucket) for precision in (before, after)
    )
    state, _ = first.many(first.init(random_like(SIZES, 0)), jnp.arange(3.0))
    ol.save(path, state)
    wanted = on_host(state)
    like = second.init(random_like(SIZES, 1))
    fresh = on_host(like)
    again, report = ol.restore(path, like)
    ours, theirs = MOMENTS[after], MOMENTS[before]
    assert (set(report.new), set(report.unused)) == (ours - theirs, theirs - ours)
    assert set(report.matched) == set(fresh) - (ours - theirs)
    assert_matched(again, report, wanted)
    for name in report.new:
        np.testing.assert_array_equal(on_host(again)[name], fresh[name])
    if before != after:
        with pytest.raises(ol.CheckpointMismatch, match=r"Only in the file: 'optimizer/adam/m"):
            ol.restore(path, like, strict=True)
    again, metrics = second.many(again, jnp.arange(3.0))
    assert np.isfinite(metrics["loss"]).all()
    if before == after:
        assert_equal(again, first.many(state, jnp.arange(3.0))[0])
