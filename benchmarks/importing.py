"""What `import optimize_loss` adds to importing jax and optax: `python -m benchmarks.importing`.

Processor time, in a process of its own each time; bytecode is there from the first one on. The
least of the rounds counts: all that other programs do only adds to it.
"""

import os
import statistics
import subprocess
import sys

import jax

from benchmarks._report import RESULTS

ROUNDS = 15
CODE = """
import time
import jax, optax
start = time.process_time()
import optimize_loss
print(time.process_time() - start)
"""


def seconds():
    """Return the processor time of the import in a new process."""
    environment = {n: x for n, x in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main():
    seconds()
    found = [seconds() for _ in range(ROUNDS)]
    line = (
        f"jax {jax.__version__}: import adds {min(found):.3f} s of processor time, "
        f"median {statistics.median(found):.3f} s of {ROUNDS}"
    )
    (RESULTS / "import-cpu.txt").write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
