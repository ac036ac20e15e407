"""Programs for TPU and GPU, compiled without a device: `python -m benchmarks.compiled`."""
