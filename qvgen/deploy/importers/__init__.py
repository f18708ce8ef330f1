"""Checkpoints of other programs -> packed models."""
