"""The engine: what a chain means, and how it runs in one pass over the parameters."""
