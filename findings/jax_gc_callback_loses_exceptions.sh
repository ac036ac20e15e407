#!/usr/bin/env bash
# After `import jax`, an exception that a signal handler raises can vanish: Ctrl-C does nothing.
# jax puts a Python function into gc.callbacks. Python runs a pending signal handler at the next Python
# call. If the signal came during a collection, that call is jax's callback, and Python prints exceptions
# of such callbacks ("Exception ignored in ...") and drops them. Importing a library of arrays should
# not change signals. Here a timer fires in the middle of a collection, before and after the import.
# Versions: jax 0.10.2, Python 3.11. Source: https://github.com/jax-ml/jax/issues/18246
# Instead: let the handler set a flag and look at the flag in the loop; do not raise in the handler.
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import gc, signal, sys, time

class Stop(Exception): pass

def stop(*_): raise Stop

def collect(alarm=0.0):
    for _ in range(500_000):
        cycle = []; cycle.append(cycle)
    start = time.perf_counter()
    try:
        signal.setitimer(signal.ITIMER_REAL, alarm)
        gc.collect()
        if not alarm: return time.perf_counter() - start
        time.sleep(2)
        return "lost"
    except Stop:
        return "raised"

gc.disable()
signal.signal(signal.SIGALRM, stop)
sys.unraisablehook = lambda _: None
without = [collect(collect() / 2) for _ in range(5)]
import jax
with_jax = [collect(collect() / 2) for _ in range(5)]
print("jax", jax.__version__)
print("expected: raised with and without jax")
print("seen:     without", without, "\n          with   ", with_jax)
raise SystemExit(not (set(without) == {"raised"} and "lost" in with_jax))
EOF
