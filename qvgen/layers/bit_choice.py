"""Rows of one input at different widths: cut a layer's input by its samples' widths, run each part, put them together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qvgen.layers.noise_band import NoiseBand
from qvgen.quant.grid import Profile
from qvgen.quant.width_table import Widths, WidthTable


def by_widths(
    x: Tensor,
    run: Callable[[Tensor, Tensor | None, Widths], Tensor],
    *,
    width_table: WidthTable | None,
    profile: Profile,
    noise_band: NoiseBand,
) -> Tensor:
    """Apply a layer whose widths may differ from sample to sample.

    Args:
        x: [B * n, ..., K], entries along the first dimension ordered by sample.
        run: Computes the layer for some entries of x at one pair of widths: it takes these entries, their places in x (None:
            all of them) and the widths, and gives [entries, ..., N].
        width_table: The layer's widths by noise band; None: the profile's widths for all samples.
        profile: The layer's profile.
        noise_band: Knows the noise band of each sample.

    Returns:
        [B * n, ..., N]; bit for bit what each sample alone would give.
    """
    base = (profile.weight.bits, profile.activation.bits)
    if width_table is None:
        return run(x, None, base)
    bands = noise_band.sample_bands()
    asked = noise_band.policy_bits or (None,) * len(bands)
    of_sample = [
        width_table.widths(band, profile=profile, policy_bits=bits) for band, bits in zip(bands, asked, strict=True)
    ]
    kinds = list(dict.fromkeys(of_sample))
    if len(kinds) == 1:
        return run(x, None, kinds[0])
    repeat = x.shape[0] // len(of_sample)
    places = [
        torch.tensor([i * repeat + j for i, mine in enumerate(of_sample) if mine == widths for j in range(repeat)])
        for widths in kinds
    ]
    parts = [
        run(x[index.to(x.device)], index.to(x.device), widths) for index, widths in zip(places, kinds, strict=True)
    ]
    return torch.cat(parts)[torch.cat(places).argsort().to(x.device)]


def rows_of(values: tuple[Tensor, Tensor], x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pick the values that belong to some entries of x.

    Args:
        values: Two columns [M, 1] with a value for each of the M rows of x.
        x: [B * n, ..., K].
        index: Entries along the first dimension of x; None: all of them.
    """
    if index is None:
        return values
    first, second = (value.reshape(x.shape[0], -1)[index].reshape(-1, 1) for value in values)
    return first, second
