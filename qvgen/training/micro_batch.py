"""How a step's batch is cut into micro-batches."""

from __future__ import annotations

from qvgen.config.schema import TrainConfig

STEP_PARTS = 2
"""A step's batch is computed in at least so many parts, whose gradients are added. One process that goes through two
parts adds the same two numbers as two processes with one part each, so that both train the same bits; a batch in one
piece would differ in the last bit of its sums, and a code that flips for it changes the loss by a few per cent after
ten steps."""


def micro_batches(config: TrainConfig) -> int:
    """Micro-batches per optimizer step of each process: ``accumulate``, or more where ``STEP_PARTS`` asks for it."""
    parts = config.accumulate * config.devices
    if parts < STEP_PARTS and config.batch_size % STEP_PARTS == 0:
        return STEP_PARTS
    return config.accumulate


def micro_batch_size(config: TrainConfig) -> int:
    """Samples that a process works on at once."""
    return config.batch_size // (micro_batches(config) * config.devices)
