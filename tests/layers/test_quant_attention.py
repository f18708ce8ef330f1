"""The product of an attention module in 8 bits: checked against the kernels' operator (bits) and float64 softmax (error)."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional

from qvgen.config.leaves import load_leaf
from qvgen.initializers.prepare import PrepareConfig, prepare
from qvgen.layers.attention_form import AttentionForm
from qvgen.layers.attention_swap import attention_forms, attention_modules, quantized_attentions, swap_attentions_
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.quant_attention import AttentionCall, FakeQuantAttention, PackedAttention
from qvgen.layers.swap import forms, quantized_layers, restore_forms_
from qvgen.quant.attention_profile import AttentionProfile
from qvgen_kernels.attention import AttentionTensors, attention
from tests.profiles import make_profile

HEADS, SIZE, BANDS = 3, 16, 4
BOUND = 0.03
"""Relative error of 8-bit attention on standard normal numbers: .0145 in kernels/attention.md, for another head size."""


def make_product(**options: Any) -> FakeQuantAttention:
    band = NoiseBand(BANDS)
    form = AttentionForm.of(AttentionProfile(**{"kind": "int8", **options}), heads=HEADS, head_size=SIZE)
    return FakeQuantAttention(form, noise_band=band, name="blocks.0.attn1")


def make_inputs(samples: int = 2, tokens: int = 70, keys: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(samples, tokens, HEADS, SIZE, generator=generator).transpose(1, 2)
    k, v = (torch.randn(samples, HEADS, keys, SIZE, generator=generator) + 0.5 for _ in range(2))
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor, *, scale: float = SIZE**-0.5, bias: Tensor | None = None) -> Tensor:
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    return (scores if bias is None else scores + bias.double()).softmax(-1) @ v.double()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("options", [{}, {"smooth_key": False}, {"rotation": True}, {"kind": "int8_qk"}])
def test_a_call_is_the_operator_of_its_form(options: dict[str, Any]) -> None:
    product, (q, k, v) = make_product(**options), make_inputs()
    found = product(AttentionCall(q, k, v))
    assert torch.equal(found, attention(q, k, v, spec=product.form.spec()))
    assert 0 < error(found, exact(q, k, v)) < BOUND
    scaled = product(AttentionCall(q, k, v, scale=0.5))
    assert error(scaled, exact(q, k, v, scale=0.5)) < 2 * BOUND
    assert not torch.equal(scaled, found)


def test_fewer_heads_of_keys_are_repeated() -> None:
    product, (q, k, v) = make_product(), make_inputs()
    found = product(AttentionCall(q, k[:, :1], v[:, :1], enable_gqa=True))
    assert torch.equal(found, product(AttentionCall(q, k[:, :1].expand_as(k), v[:, :1].expand_as(v))))


@pytest.mark.parametrize("hidden", [-10000.0, float("-inf")])
def test_numbers_that_hide_keys_are_a_mask(hidden: float) -> None:
    product, (q, k, v) = make_product(), make_inputs()
    seen = torch.ones(2, 1, 1, 37, dtype=torch.bool)
    seen[0, ..., 20:] = False
    found = product(AttentionCall(q, k, v, attn_mask=seen))
    bias = torch.zeros(seen.shape).masked_fill(~seen, hidden)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(product(AttentionCall(q, k, v, attn_mask=bias.to(dtype))), found)
    assert error(found, exact(q, k, v, bias=bias)) < BOUND
    assert torch.equal(product(AttentionCall(q, k, v, attn_mask=bias[0, 0]))[0], found[0])  # two dimensions


def test_the_numbers_of_a_later_mask_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first mask is asked for a value, which a GPU would be waited for; a later wrong one is an error as well."""
    product, (q, k, v) = make_product(), make_inputs()
    bias = torch.zeros(2, 1, 1, 37)
    bias[0, ..., 20:] = -10000.0
    found = product(AttentionCall(q, k, v, attn_mask=bias))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda _: pytest.fail("a value is asked for"))
    shown = product._visible(bias)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn1 adds numbers to scores"):
        product._visible(bias + 0.5)
    monkeypatch.undo()
    assert torch.equal(product(AttentionCall(q, k, v, attn_mask=shown)), found)


def test_one_number_for_all_keys_hides_none() -> None:
    product, (q, k, v) = make_product(), make_inputs()
    bias = torch.zeros(2, 1, 1, 37)
    bias[1] = -10000.0
    assert torch.equal(product(AttentionCall(q, k, v, attn_mask=bias)), product(AttentionCall(q, k, v)))
    bias[1] = float("-inf")
    assert not product(AttentionCall(q, k, v, attn_mask=bias))[1].any()


def test_what_it_has_no_meaning_for_is_refused_by_name() -> None:
    product, (q, k, v) = make_product(), make_inputs()
    cases: list[tuple[AttentionCall, str]] = [
        (AttentionCall(q, k, v, dropout_p=0.1), "dropout_p=0.1"),
        (AttentionCall(q, k, v, is_causal=True), "is_causal=True"),
        (AttentionCall(q, k, v, attn_mask=torch.full((1, 1, 1, 37), 0.5)), "neither 0 nor -9000 or less"),
        (AttentionCall(q[:, :2], k[:, :2], v[:, :2]), r"queries \[2, 2, 70, 16\], not \[batch, 3, tokens, 16\]"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            product(call)
        assert "blocks.0.attn1" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_it_computes_in_autocasts_type() -> None:
    product, (q, k, v) = make_product(), make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = product(AttentionCall(q, k.bfloat16(), v))
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, product(AttentionCall(q.bfloat16(), k.bfloat16(), v.bfloat16())))


def test_factors_start_at_one_and_belong_to_a_sample_and_a_head() -> None:
    product, plain, (q, k, v) = make_product(clips=True), make_product(), make_inputs()
    mask = torch.rand(2, 1, 70, 37, generator=torch.Generator().manual_seed(1)) < 0.7
    product.noise_band.set_timestep(torch.tensor([10.0, 990.0]))
    call = AttentionCall(q, k, v, attn_mask=mask)
    assert torch.equal(product(call), plain(call))
    with torch.no_grad():
        for logits in product.parameters():
            logits.normal_(generator=torch.Generator().manual_seed(2))
    found, packed = product(call), PackedAttention.from_fake_quant(product)
    assert torch.equal(packed(call), found)
    tables = product.tables()
    assert tables is not None
    for sample, band in ((0, 0), (1, BANDS - 1)):
        clips = AttentionTensors(*(table[band] for table in tables))
        one = slice(sample, sample + 1)
        alone = attention(q[one], k[one], v[one], spec=product.spec, mask=mask[one], tensors=clips)
        assert torch.equal(found[one], alone)
    before = found[0].clone()
    with torch.no_grad():
        assert product.query_clip is not None
        product.query_clip[BANDS - 1] -= 1
    assert torch.equal(product(call)[0], before)
    assert not torch.equal(product(call)[1], found[1])


def test_factors_between_steps_of_a_table_are_interpolated() -> None:
    product, (q, k, v) = make_product(clips=True), make_inputs(samples=1)
    product.noise_band.use_timesteps_([0.0, 500.0, 1000.0])
    product.follow_bands_()
    assert [tuple(logits.shape) for logits in product.parameters()] == [(3, HEADS)] * 2
    with torch.no_grad():
        for logits in product.parameters():
            logits.normal_(generator=torch.Generator().manual_seed(2))
    product.noise_band.set_timestep(torch.tensor([250.0]), training=True)
    tables = product.tables()
    assert tables is not None
    clips = AttentionTensors(*(table[0] * 0.5 + table[1] * 0.5 for table in tables))
    assert torch.equal(product(AttentionCall(q, k, v)), attention(q, k, v, spec=product.spec, tensors=clips))


class Model(nn.Module):
    """Two attentions of diffusers and a Linear between them, called with a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Attention(query_dim=48, heads=HEADS, dim_head=SIZE, processor=AttnProcessor2_0())
        self.between = nn.Linear(48, 48)
        self.second = Attention(query_dim=48, heads=HEADS, dim_head=SIZE, processor=AttnProcessor2_0())

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        del timestep
        y: Tensor = self.second(self.between(self.first(x)))
        return y


def make_model(**options: Any) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model().requires_grad_(False)
    profile = AttentionProfile(kind="int8", **options)
    swap_attentions_(model, attention_forms(model, profile, quantized=["first.to_q"]), noise_band=NoiseBand(BANDS))
    return model


def test_an_attention_stays_the_module_that_it_is() -> None:
    plain, model = Model().requires_grad_(False), make_model()
    assert list(quantized_attentions(model)) == ["first"]
    assert list(attention_modules(model)) == ["first", "second"]
    assert type(model.first).__name__ == "Attention"
    assert isinstance(model.first, Attention)
    assert type(model.second) is Attention
    assert set(model.state_dict()) == set(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    x, timestep = torch.randn(2, 50, 48, generator=torch.Generator().manual_seed(1)), torch.tensor([1.0, 2.0])
    found, wanted = model(x, timestep), plain(x, timestep)
    assert 0 < error(found, wanted.double()) < BOUND
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(x, timestep), found)
        assert list(quantized_attentions(same)) == ["first"]


def test_patterns_choose_attentions() -> None:
    assert list(quantized_attentions(make_model(include=["*"]))) == ["first", "second"]
    assert list(quantized_attentions(make_model(include=["*"], exclude=["first"]))) == ["second"]
    for options, message in (
        ({"include": ["blocks.*"]}, r"include pattern 'blocks.\*' matches none of the 2 attentions"),
        ({"exclude": ["third"]}, "exclude pattern 'third' matches none"),
        ({"exclude": ["first"]}, "quantizes none of the 2 attentions of Model"),
    ):
        with pytest.raises(ValueError, match=message):
            make_model(**options)


def test_an_attention_that_is_not_torchs_is_refused_at_its_first_call() -> None:
    model, x, timestep = make_model(), torch.zeros(1, 5, 48), torch.zeros(1)
    model.first.set_processor(AttnProcessor())
    with pytest.raises(ValueError, match="first computes a softmax of its own"):
        model(x, timestep)
    model.first.set_processor(lambda attn, hidden_states, **_: attn.to_q(hidden_states))
    with pytest.raises(ValueError, match="first did not call torch's attention"):
        model(x, timestep)
    model.first.set_processor(AttnProcessor2_0())
    model(x, timestep)
    model.first.processor._parallel_config = object()
    with pytest.raises(ValueError, match="first shares its sequence out"):
        model(x, timestep)


def test_what_can_not_be_quantized_is_refused_before_anything_changes() -> None:
    profile = AttentionProfile(kind="int8")
    odd = Attention(query_dim=36, heads=2, dim_head=18)
    model = nn.ModuleDict({"attention": odd})
    with pytest.raises(ValueError, match=r"^attention: head_size=18 must be a multiple of 4"):
        attention_forms(model, profile, quantized=["attention.to_q"])
    hooked = make_model()
    hooked.second.forward = lambda *_: None
    with pytest.raises(ValueError, match="second has hooks"):
        attention_forms(hooked, replace(profile, include=("second",)), quantized=[])
    with pytest.raises(ValueError, match="first is quantized already"):
        attention_forms(hooked, profile, quantized=["first.to_q"])


def test_prepare_takes_it_from_the_profile_and_forms_bring_it_back() -> None:
    profile = make_profile("paper", weight_bits=4, activation_bits=4)
    attentive = replace(profile, attention=AttentionProfile(kind="int8", clips=True))
    prepared = []
    for chosen in (attentive, attentive, profile):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Model()
        config = PrepareConfig(profile=chosen, initializer=load_leaf("init", "rtn"), num_noise_bands=BANDS)
        prepare(model, config)
        prepared.append(model)
    model, other, plain = prepared
    assert list(quantized_attentions(model)) == ["first", "second"]
    assert all(layer.profile.attention is None for layer in quantized_layers(model).values())
    assert set(model.state_dict()) - set(plain.state_dict()) == {
        f"{name}.attention_product.{side}_clip" for name in ("first", "second") for side in ("query", "key")
    }
    assert "attentions" not in forms(plain)
    restore_forms_(other, forms(model))
    with pytest.raises(ValueError, match="0 stored attentions are not the 2 quantized ones"):
        restore_forms_(model, forms(plain))


def test_torchs_attention_elsewhere_is_left_alone() -> None:
    model, (q, k, v) = make_model(), make_inputs()
    model(torch.zeros(1, 5, 48), torch.zeros(1))
    assert error(functional.scaled_dot_product_attention(q, k, v), exact(q, k, v)) < 1e-5
