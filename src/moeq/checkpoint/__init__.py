"""Checkpoints on disk: headers parsed and validated first, then bytes, a tensor at a time."""
