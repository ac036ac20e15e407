"""The demonstration that `python -m optimize_loss` runs."""
