"""One file for each peer: what a worker asks of it is `Peer(problem)`, see `benchmarks._worker`."""
