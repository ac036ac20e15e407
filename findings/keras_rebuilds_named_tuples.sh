#!/usr/bin/env bash
# `layer.x = value` stores another object than value when value is a tuple or named tuple.
# Keras 3 builds it again as type(value)(**value._asdict()) to look for variables in it. Extra
# attributes are lost, identity is lost, and a subclass with its own __new__ raises a TypeError that
# names Keras' call, not yours. Lists and dicts are known to be wrapped; a tuple cannot change, so one
# expects it to stay itself.
# Versions: Keras 3.15.1. Source: keras/src/utils/tracking.py, Tracker.track
# Instead: put the value into an object that is no tuple, or set it with object.__setattr__(layer, name, value).
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 keras==3.15.1
export JAX_PLATFORMS=cpu
export KERAS_BACKEND=jax
"$dir/venv/bin/python" -I - <<'EOF'
import keras
from typing import NamedTuple

class Range(NamedTuple):
    low: int
    high: int

class Named(Range): pass

class Square(Range):
    def __new__(cls, size): return super().__new__(cls, 0, size)

layer = keras.layers.Dense(1)
value = Named(1, 2)
value.note = "kept?"
layer.value = value
same, note = layer.value is value, hasattr(layer.value, "note")
object.__setattr__(layer, "other", value)
try:
    layer.square = Square(3)
    error = None
except TypeError as raised:
    error = str(raised)
print("keras", keras.__version__)
print("expected: same object, note kept, no error")
print("seen:    ", same, note, error)
raise SystemExit(same or note or "unexpected keyword" not in (error or "") or layer.other is not value)
EOF
