"""Quantized attentions in a manifest, and the packed products that are made of them in a model.

Every entry of a manifest's ``attentions`` says {name, kind, heads, head_size, smooth_key, rotation, clips}: the attention
module, and the :class:`~qvgen.layers.attention_form.AttentionForm` of its product. A manifest without that list is of a model
whose attention is in floating point. One with it has a version of its own, so that a qvgen of before does not run it without,
and which changes with the arithmetic of kernels/attention.md: what was trained with another one would not be what runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qvgen.config.plain_json import items, mapping, text
from qvgen.layers.attention_form import AttentionForm
from qvgen.layers.attention_swap import attention_modules, head_sizes, packed_attentions, put_product_
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.quant_attention import PackedAttention
from qvgen.quant.attention_profile import IN_WORDS

ATTENTION_VERSION = 3
"""Version of manifests with quantized attentions. 2: exponents by a cubic, without fused multiply-adds."""


@dataclass(frozen=True, kw_only=True)
class AttentionEntry:
    """One quantized attention of a manifest: the name of its module, and its form."""

    name: str
    form: AttentionForm

    def to_dict(self) -> dict[str, Any]:
        """The attention as the manifest stores it, in plain values."""
        return {"name": self.name, **self.form.to_dict()}


def attention_entries(model: nn.Module) -> tuple[AttentionEntry, ...]:
    """The entries of a packed model's quantized attentions, in its order."""
    return tuple(AttentionEntry(name=name, form=product.form) for name, product in packed_attentions(model).items())


def attention_counts(entries: Iterable[AttentionEntry]) -> dict[str, int]:
    """Quantized parts of attentions, in words -> how many attentions have these."""
    return dict(Counter(IN_WORDS[entry.form.kind] for entry in entries))


def read_attentions(data: Mapping[str, Any]) -> tuple[AttentionEntry, ...]:
    """The entries of a manifest's JSON; raises KeyError, TypeError or ValueError for anything malformed."""
    if "attentions" not in data:
        return ()
    entries = []
    for entry in items(data["attentions"], "attentions"):
        values = dict(mapping(entry, "an attention"))
        entries.append(AttentionEntry(name=text(values.pop("name"), "name"), form=AttentionForm.from_dict(values)))
    names = [entry.name for entry in entries]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"it names the attention {twice[0]!r} twice")
    return tuple(entries)


def put_attentions_(
    model: nn.Module, entries: tuple[AttentionEntry, ...], *, band: NoiseBand, kernel: str, source: Path
) -> None:
    """Give a model's attentions the products of a manifest, their tensors on the meta device.

    Raises:
        ValueError: Names the attention that the model does not have, or that has other heads.
    """
    modules = attention_modules(model)
    for entry in entries:
        if entry.name not in modules:
            raise ValueError(f"{source} names the attention {entry.name!r}, which {type(model).__name__} does not have")
        product = PackedAttention(entry.form, noise_band=band, name=entry.name, kernel=kernel, device="meta")
        try:
            heads, size = head_sizes(modules[entry.name], name=entry.name)
            if (heads, size) != (entry.form.heads, entry.form.head_size):
                raise ValueError(
                    f"attention {entry.name!r} of {entry.form.heads} heads of {entry.form.head_size} does not fit the "
                    f"model's {heads} of {size}"
                )
            put_product_(modules[entry.name], product)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
