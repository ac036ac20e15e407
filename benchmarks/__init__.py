"""How fast, how small, how exact: this package beside its peers. `python -m benchmarks` runs all."""
