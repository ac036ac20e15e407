"""How fast, small and exact this package is beside its peers. `python -m benchmarks` runs all."""
