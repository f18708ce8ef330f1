"""Forms of attention on trial: their errors beside float64 softmax, which form keys of a kind get, and a model left alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from qvgen.config.leaves import load_leaf
from qvgen.initializers.prepare import PrepareConfig, prepare
from qvgen.layers.attention_form import AttentionForm
from qvgen.layers.attention_swap import packed_attentions, quantized_attentions, use_attention_forms_
from qvgen.layers.attention_trial import QUERIES_PER_CALL, AttentionSearch, AttentionTrial, attending, chosen_forms
from qvgen.layers.quant_attention import AttentionCall
from qvgen.layers.swap import fold, forms, restore_forms_
from qvgen.quant.attention_profile import AttentionProfile
from qvgen_kernels.attention import attention
from tests.profiles import make_profile

HEADS, SIZE, TOKENS = 2, 64, 300
OPEN = AttentionProfile(kind="int8", smooth_key="auto", rotation="auto")


def form_of(profile: AttentionProfile, *, size: int = SIZE) -> AttentionForm:
    return AttentionForm.of(profile, heads=HEADS, head_size=size)


def keys_of(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, TOKENS, SIZE, generator=draw) for _ in range(3))
    if kind == "offset":  # what all keys share is in no softmax
        k = k + 3.0 * torch.randn(1, HEADS, 1, SIZE, generator=draw)
    if kind == "wide columns":  # a scale for all columns of a key, which four of them decide
        k[..., :4] *= 12.0
    if kind == "hidden keys":  # they count for the mean, and without them the others have none
        k[:, :, : TOKENS // 2] += 20.0
    return q, k, v


def errors(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> list[float]:
    candidates = form_of(OPEN).candidates(OPEN)
    sums = torch.zeros(len(candidates) + 1, dtype=torch.float64)
    trial = AttentionTrial(candidates, name="attn", sums=sums)
    trial(AttentionCall(q, k, v, attn_mask=mask))
    return (sums[:-1] / sums[-1]).tolist()


@pytest.mark.parametrize("masked", [False, True])
def test_an_error_is_that_of_some_rows_beside_float64(masked: bool) -> None:
    q, k, v = keys_of("offset")
    mask = None
    if masked:
        mask = torch.rand(1, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.7
    found = errors(q, k, v, mask=mask)
    rows = torch.linspace(0, TOKENS - 1, QUERIES_PER_CALL).round().long()
    scores = q.double() @ k.double().mT * SIZE**-0.5
    exact = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1) @ v.double()
    for form, error in zip(form_of(OPEN).candidates(OPEN), found, strict=True):
        output = attention(q, k, v, spec=form.spec(), mask=mask).double()
        wanted = (output - exact)[:, :, rows].square().sum() / exact[:, :, rows].square().sum()
        assert error == pytest.approx(float(wanted), rel=1e-3)  # torch's float32 outputs stand in for the exact ones


@pytest.mark.parametrize(
    ("kind", "smooth_key", "rotation"),
    [("offset", True, None), ("wide columns", None, True), ("hidden keys", False, None)],
)
def test_keys_get_the_form_that_they_need(kind: str, smooth_key: bool | None, rotation: bool | None) -> None:
    seen = (torch.arange(TOKENS) >= TOKENS // 2).reshape(1, 1, 1, -1) if kind == "hidden keys" else None
    found = errors(*keys_of(kind), mask=seen)
    best = chosen_forms({"attn": form_of(OPEN).candidates(OPEN)}, {"attn": found})["attn"]
    assert smooth_key in (None, best.smooth_key)
    assert rotation in (None, best.rotation)
    assert max(found) > 1.2 * min(found)


def test_what_a_profile_leaves_open_is_what_is_tried() -> None:
    def labels(size: int = SIZE, **options: Any) -> list[str]:
        profile = AttentionProfile(kind="int8", **options)
        return [form.label for form in form_of(profile, size=size).candidates(profile)]

    assert labels() == ["int8 2 x 64"]
    assert labels(rotation="auto") == ["int8 2 x 64", "int8 2 x 64 rotated"]
    assert labels(smooth_key="auto", rotation=True) == ["int8 2 x 64 rotated", "int8 2 x 64 rotated keys not smoothed"]
    assert len(labels(smooth_key="auto", rotation="auto")) == 4
    assert labels(size=92, rotation="auto") == ["int8 2 x 92"]  # no Hadamard matrix of that size is known here


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            Attention(HEADS * SIZE, heads=HEADS, dim_head=SIZE, cross_attention_dim=None) for _ in range(2)
        )

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        del timestep
        return x + self.second(x + self.first(x))


def model_and_input() -> tuple[Model, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model().eval()
        with torch.no_grad():
            model.second.to_k.weight[:4] *= 40.0
            model.second.to_k.weight[SIZE : SIZE + 4] *= 40.0
        return model, torch.randn(1, TOKENS, HEADS * SIZE)


@torch.no_grad()
def test_a_model_on_trial_gives_its_own_outputs_and_is_left_as_it_was() -> None:
    model, x = model_and_input()
    wanted, state = model(x, torch.zeros(1)), list(model.state_dict())
    candidates = {name: form_of(OPEN).candidates(OPEN) for name in ("first", "second")}
    with AttentionSearch(model, candidates) as search:
        assert torch.equal(model(x, torch.zeros(1)), wanted)
    assert chosen_forms(candidates, search.errors())["second"].rotation
    product = AttentionTrial((form_of(OPEN),), name="first")
    with attending(model, {"first": product}, active=lambda: False):
        model(x, torch.zeros(1))
    assert product.products == 0
    with attending(model, {"first": product}):
        model(x, torch.zeros(1))
    assert product.products == 2 * HEADS * TOKENS * TOKENS * SIZE
    assert list(model.state_dict()) == state
    assert not any("forward" in vars(module) for module in model.modules())
    with AttentionSearch(model, candidates) as search:
        pass
    with pytest.raises(ValueError, match="first gave nothing to choose its form by"):
        search.errors()


def prepared(profile: AttentionProfile) -> tuple[Model, Tensor]:
    model, x = model_and_input()
    grids = replace(make_profile("paper"), attention=profile)
    prepare(model, PrepareConfig(profile=grids, initializer=load_leaf("init", "rtn"), include=["*.to_out.0"]))
    return model, x


@torch.no_grad()
def test_chosen_forms_are_stored_and_come_back() -> None:
    (model, x), (other, _) = (prepared(AttentionProfile(kind="int8")) for _ in range(2))
    products = quantized_attentions(model)
    chosen = {name: replace(product.form, rotation=name == "second") for name, product in products.items()}
    before = model(x, torch.zeros(1))
    use_attention_forms_(model, chosen)
    after = model(x, torch.zeros(1))
    assert not torch.equal(after, before)
    stored = forms(model)
    restore_forms_(other, stored)
    assert torch.equal(other(x, torch.zeros(1)), after)
    del stored["attentions"][0]  # the first one computes in floating point
    restore_forms_(other, stored)
    assert list(quantized_attentions(other)) == ["second"]
    assert type(other.first) is Attention
    stored["attentions"][0]["heads"] = 4
    with pytest.raises(ValueError, match="the attention second is int8 2 x 64 rotated, which can't become int8 4 x 64"):
        restore_forms_(other, stored)
    alone = other(x, torch.zeros(1))
    fold(other)
    assert list(packed_attentions(other)) == ["second"]
    assert torch.equal(other(x, torch.zeros(1)), alone)


@torch.no_grad()
def test_attentions_without_a_form_compute_as_before() -> None:
    model, x = prepared(AttentionProfile(kind="int8", exclude=["second"]))
    plain, _ = prepared(AttentionProfile(kind="int8", exclude=["first"]))
    use_attention_forms_(model, {})
    use_attention_forms_(plain, {})
    assert not quantized_attentions(model)
    assert {type(model.first), type(model.second)} == {Attention}
    assert torch.equal(model(x, torch.zeros(1)), plain(x, torch.zeros(1)))
