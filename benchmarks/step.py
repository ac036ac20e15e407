"""Time whole steps: a small MLP on digits, and a small transformer written out layer by layer.

    python -m benchmarks.step

The digits are generated, of the shape of scikit-learn's; `keras` is `fit` as it comes, `keras-10`
with ten steps in an execution; `limit` is the loss and its gradients with plain gradient descent.
The transformer has 8 layers of width 64, one sequence of 16 tokens, 99 leaves.
"""

from collections.abc import Sequence

from benchmarks import _run
from benchmarks._compare import Row
from benchmarks._problems import Problem

TRANSFORMER = Problem("transformer", leaves=8)

ROWS = (
    Row(
        "digits, `run` with 100 steps a call",
        Problem("digits", steps_per_call=100),
        {
            "optax": 2.0,
            "keras": 2.8,
            "keras-10": None,
            **dict.fromkeys(("torch-1", "torch-2"), 6.0),
            "limit": None,
        },
    ),
    Row("digits, single steps", Problem("digits"), {"optax": None}),
    Row(
        "digits, 1e6 parameters, with all metrics",
        Problem("digits", size=960, metrics=True),
        {"ours, loss only": 0.97, "optax": None},
    ),
    Row("transformer", TRANSFORMER, {"optax": 1.12, "flax": None}),
    Row("transformer, temporaries", TRANSFORMER, {"optax": 1.0}, "temporary"),
    Row(
        "transformer, compiling",
        TRANSFORMER,
        {"optax": 1 / 0.75, "ours, bucket=None": None},
        "compile",
        rounds=3,
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    _run.main({"step": ROWS}, arguments, __doc__)


if __name__ == "__main__":
    main()
