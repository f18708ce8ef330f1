"""Attention in 8 bits on trial in a full-precision model: which form of it loses least, and how much there is of it.

    error of a form = |y_form - y|^2 / |y|^2      y [B, H, M, D] of torch's attention, for at most QUERIES_PER_CALL queries

The queries are spread evenly over a call's. Each is a row of its own in every step of kernels/attention.md, so that these
rows have the bits that they would have among all. The model goes on with torch's own outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qvgen.layers.attention_form import AttentionForm
from qvgen.layers.attention_swap import attention_forms, quantized_call
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.quant_attention import AttentionCall, AttentionProduct
from qvgen.quant.attention_profile import AttentionProfile

QUERIES_PER_CALL = 256
"""Queries of a call that forms are compared on: their cost grows with the keys and not with their square."""


class AttentionTrial(AttentionProduct):
    """Torch's attention, beside which forms of the quantized one are measured.

    Args:
        forms: The forms, alike in heads and their size.
        name: The attention module's name in its model, for messages.
        sums: Kept by the caller: float64 [forms + 1] on the CPU, to which squared errors and the square of the outputs are
            added; None: nothing is measured.

    Attributes:
        products: Multiply-adds of both products in all calls.
    """

    def __init__(self, forms: Sequence[AttentionForm], *, name: str, sums: Tensor | None = None) -> None:
        band = NoiseBand(1)
        super().__init__(forms[0], noise_band=band, name=name)
        self._candidates = [AttentionProduct(form, noise_band=band, name=name) for form in forms]
        self._sums, self.products = sums, 0

    @torch.no_grad()
    def forward(self, call: AttentionCall) -> Tensor:
        """Torch's attention of the call, [B, H, M, D]; forms are measured on some of its queries."""
        output: Tensor = functional.scaled_dot_product_attention(**call._asdict())
        self.products += 2 * output.numel() * call.key.shape[-2]
        if self._sums is None:
            return output
        total = call.query.shape[-2]
        rows = torch.linspace(0, total - 1, min(total, QUERIES_PER_CALL), device=output.device).round().long()
        mask = call.attn_mask
        if mask is not None and mask.ndim > 1 and mask.shape[-2] > 1:
            mask = mask.index_select(-2, rows)
        some = call._replace(query=call.query.index_select(-2, rows), attn_mask=mask)
        exact = output.index_select(-2, rows).double()
        errors = [(product(some).double() - exact).square().sum() for product in self._candidates]
        self._sums += torch.stack([*errors, exact.square().sum()]).cpu()
        return output


@contextmanager
def attending(
    model: nn.Module, products: Mapping[str, AttentionProduct], *, active: Callable[[], bool] | None = None
) -> Iterator[None]:
    """Let attentions of a full-precision model call these products as long as the context lasts.

    Args:
        model: Its attention modules stay of their own classes.
        products: Name of an attention module -> its product.
        active: Says at each call whether the product takes it; None: always.
    """
    before = {name: vars(model.get_submodule(name)).get("forward") for name in products}
    for name, product in products.items():
        attention = model.get_submodule(name)
        attention.forward = _forward(attention, product, active or _always)
    try:
        yield
    finally:
        for name, own in before.items():
            attention = model.get_submodule(name)
            del attention.forward
            if own is not None:
                attention.forward = own


def _always() -> bool:
    return True


def _forward(attention: nn.Module, product: AttentionProduct, active: Callable[[], bool]) -> Callable[..., Any]:
    plain = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return quantized_call(attention, product, plain, args, kwargs) if active() else plain(*args, **kwargs)

    return forward


class AttentionSearch:
    """Finds which form of every attention loses least, while a full-precision model runs in its context.

    Args:
        model: It is not changed.
        candidates: Name of an attention module -> its forms.

    Attributes:
        sums: Name -> float64 [forms + 1]: squared errors of the outputs, and the square of the outputs.
    """

    def __init__(self, model: nn.Module, candidates: Mapping[str, Sequence[AttentionForm]]) -> None:
        self.sums = {name: torch.zeros(len(forms) + 1, dtype=torch.float64) for name, forms in candidates.items()}
        trials = {name: AttentionTrial(forms, name=name, sums=self.sums[name]) for name, forms in candidates.items()}
        self._context = attending(model, trials)

    def __enter__(self) -> AttentionSearch:
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def errors(self) -> dict[str, list[float]]:
        """Relative error of every form, by the attention's name.

        Raises:
            ValueError: An attention was never called, or its outputs were zero or not finite.
        """
        found = {}
        for name, sums in self.sums.items():
            if not (sums[-1] > 0 and sums.isfinite().all()):
                raise ValueError(
                    f"{name} gave nothing to choose its form by while calibrating (sum of squares {float(sums[-1]):g}); "
                    "write true or false for profile.attention.smooth_key and rotation, or exclude it"
                )
            found[name] = (sums[:-1] / sums[-1]).tolist()
        return found


def attention_candidates(
    model: nn.Module, profile: AttentionProfile | None, *, quantized: Iterable[str]
) -> dict[str, tuple[AttentionForm, ...]]:
    """The forms that a profile leaves each quantized attention of a full-precision model to choose from, by its name.

    Args:
        model: Its attentions have full-precision projections.
        profile: None: no attention is quantized.
        quantized: Names of the Linears that will be quantized.

    Raises:
        ValueError: See :func:`qvgen.layers.attention_swap.attention_forms`.
    """
    forms = attention_forms(model, profile, quantized=quantized)
    return {} if profile is None else {name: form.candidates(profile) for name, form in forms.items()}


def chosen_forms(
    candidates: Mapping[str, Sequence[AttentionForm]], errors: Mapping[str, Sequence[float]]
) -> dict[str, AttentionForm]:
    """The candidate of the least error for every attention, the first of equal ones, and where there are no errors."""
    return {
        name: forms[min(range(len(forms)), key=errors.get(name, [0.0] * len(forms)).__getitem__)]
        for name, forms in candidates.items()
    }
