"""Saving and restoring states: names, files, folders of checkpoints."""
