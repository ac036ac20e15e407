"""The state of a training step, and what one step computes from it."""
