"""The front door: options become a chain, and a chain and a loss become a training step."""
