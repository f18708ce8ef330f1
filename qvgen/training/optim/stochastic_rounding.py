"""float32 to bfloat16 by chance: up with the probability that makes the mean exact, down otherwise.

A step of AdamW changes a weight by about the learning rate, 1e-5 of it, and bfloat16 has steps of 4e-3 of it: rounding to
nearest loses nearly all of them, rounding by chance none in the mean (arXiv 2010.06192). bfloat16 is the upper half of a
float32, so a number of 16 random bits that is added to the lower half carries into the upper one with just that probability.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_UPPER_HALF = ~0xFFFF


def rounding_generator(device: torch.device, *, seed: int, step: int, tensor: int) -> torch.Generator:
    """A generator for one tensor of one optimizer step; CPU and GPU draw different numbers from it."""
    digest = hashlib.blake2b(f"stochastic rounding/{seed}/{step}/{tensor}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def round_stochastically(value: Tensor, *, generator: torch.Generator) -> Tensor:
    """Round each number to one of its two neighbours in bfloat16; numbers of bfloat16 stay.

    Args:
        value: float32; finite.
        generator: Of its device.

    Returns:
        bfloat16, of the same shape.
    """
    noise = torch.randint(0, 1 << 16, value.shape, generator=generator, device=value.device, dtype=torch.int32)
    return (value.view(torch.int32) + noise).bitwise_and_(_UPPER_HALF).view(torch.float32).bfloat16()
