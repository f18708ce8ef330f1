"""Packed blocks with merged q, k, v and feed-forwards by blocks of rows: the bits of the layers one by one."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from diffusers import ChronoEditTransformer3DModel, CogVideoXTransformer3DModel, WanTransformer3DModel
from diffusers.models.transformers.transformer_chronoedit import WanAttention as ChronoEditAttention
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qvgen
from qvgen.config.leaves import load_leaf
from qvgen.deploy.merged_linear import MergedPackedLinear, can_merge
from qvgen.deploy.packed_fusion import fuse_packed_, kernel_names, prepack_
from qvgen.errors import UserError
from qvgen.initializers.prepare import PrepareConfig
from qvgen.layers import block_fusion, blocked_feed_forward
from qvgen.layers.block_fusion import BlockFusion, ProjectionMerge, register_fusion
from qvgen.layers.blocked_feed_forward import BlockedFeedForward
from qvgen.layers.swap import packed_layers, quantized_layers
from qvgen.models import cogvideox_fusion, wan_fusion
from qvgen.models.wan_fusion import GatedWanBlock
from qvgen.quant.width_table import WidthTable
from qvgen_kernels import fused_op, op, registry
from qvgen_kernels.input_steps import stated_norm
from qvgen_kernels.reference import ReferenceBackend
from tests.profiles import make_profile

WAN = {
    "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "text_dim": 24,
    "freq_dim": 32, "ffn_dim": 96, "num_layers": 2, "patch_size": (1, 2, 2), "rope_max_seq_len": 64,
}  # fmt: skip
COGVIDEOX = {
    "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "time_embed_dim": 16,
    "text_embed_dim": 24, "num_layers": 2, "sample_width": 16, "sample_height": 16, "sample_frames": 5,
    "max_text_seq_length": 8, "temporal_compression_ratio": 4,
}  # fmt: skip
MODELS = {"wan": (WanTransformer3DModel, WAN, 4), "cogvideox": (CogVideoXTransformer3DModel, COGVIDEOX, 3)}
"""Class, configuration and how many layers of a block are merged: q, k, v, and k, v of the text in Wan's."""


def make_fake(name: str) -> nn.Module:
    model_class, config, _ = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(**config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    profile = make_profile("paper", weight_bits=4, activation_bits=4)
    qvgen.prepare(model, PrepareConfig(profile=profile, initializer=load_leaf("init", "rtn")))
    return model.eval().requires_grad_(False)


def make_packed(name: str, fake: nn.Module | None = None) -> nn.Module:
    model = copy.deepcopy(fake) if fake is not None else make_fake(name)
    qvgen.fold(model)
    return model


def call(
    name: str, model: nn.Module, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    timestep, text = torch.tensor([100.0, 900.0]), torch.randn(2, 8, 24, generator=generator).to(dtype)
    shape = (2, 4, 2, 8, 8) if name == "wan" else (2, 2, 4, 16, 16)
    x = torch.randn(shape, generator=generator).to(dtype)
    rotary = {}
    if name == "cogvideox":
        rotary = {"image_rotary_emb": tuple(torch.randn(2 * 8 * 8, 32, generator=generator) for _ in "cs")}
    with torch.no_grad():
        inputs = {"hidden_states": x, "timestep": timestep, "encoder_hidden_states": text}
        moved = {name: value.to(device) for name, value in inputs.items()}
        rotary = {name: tuple(value.to(device) for value in pair) for name, pair in rotary.items()}
        found: torch.Tensor = model(**moved, return_dict=False, **rotary)[0]
    return found


def fuse_as_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let blocks on the CPU take the way of other devices."""
    for family in (cogvideox_fusion, wan_fusion):
        monkeypatch.setattr(family, "gains_by_fusing", lambda x: True)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 512), (torch.bfloat16, 512), (torch.bfloat16, 16)])
def test_fused_blocks_give_the_bits_of_single_layers(
    name: str, dtype: torch.dtype, rows: int, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked_feed_forward, "ROWS", rows)
    fake = make_fake(name)
    plain, fused = make_packed(name, fake), make_packed(name, fake)
    count = fuse_packed_(fused)
    if elsewhere:
        fuse_as_elsewhere(monkeypatch)
    merged = MODELS[name][2] + (1 if name == "wan" else 0)
    assert (count.merged, count.feed_forwards, count.gated) == (2 * merged, 2, 2)
    plain, fused = (model.to(dtype) for model in (plain, fused))
    assert torch.equal(call(name, fused, dtype), call(name, plain, dtype))
    if dtype == torch.float32:
        assert torch.equal(call(name, fused), call(name, fake))


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_of_it_is_that_of_the_single_layers(name: str, tmp_path) -> None:
    packed = make_packed(name)
    qvgen.save_packed(packed, tmp_path / "first")
    loaded = qvgen.load_packed(tmp_path / "first")
    assert sum(isinstance(module, BlockedFeedForward) for module in loaded.modules()) == 2
    assert set(loaded.state_dict()) == set(packed.state_dict())
    qvgen.save_packed(loaded, tmp_path / "second")
    for file in ("model.safetensors", "manifest.json"):
        first, second = (tmp_path / part / file for part in ("first", "second"))
        if file.endswith("safetensors"):
            assert first.read_bytes() == second.read_bytes()
    merged_parts = {
        id(part) for module in loaded.modules() if isinstance(module, MergedPackedLinear) for part in module.parts
    }
    for layer in packed_layers(loaded).values():  # the weight of a merged layer is prepacked once
        assert bool(layer._prepacked) == (id(layer) not in merged_parts)
    assert torch.equal(call(name, copy.deepcopy(loaded)), call(name, packed))


def test_what_was_trained_apart_stays_apart() -> None:
    fake = make_fake("wan")
    layers = quantized_layers(fake)
    layers["blocks.0.attn1.to_k"].activation_quantizer.clip_high.add_(0.1)
    layers["blocks.1.attn1.to_q"].set_width_table_(WidthTable(switch=(4, 8)))
    layers["blocks.1.attn2.to_v"].set_branch_(torch.ones(1, 64), torch.ones(64, 1))
    packed = make_packed("wan", fake)
    assert fuse_packed_(packed).merged == 2  # k and v of the text in the first block
    assert torch.equal(call("wan", packed), call("wan", fake))
    parts = [packed.get_submodule(f"blocks.0.attn1.to_{side}") for side in "qk"]
    assert not can_merge(parts)
    assert can_merge(parts[:1] * 2)


@pytest.mark.parametrize("rows", [512, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_are_of_samples_or_tokens_and_layers_of_several_widths(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked_feed_forward, "ROWS", rows)
    fake = make_fake("wan")
    for name in ("blocks.0.attn1.to_out.0", "blocks.1.ffn.net.2"):
        quantized_layers(fake)[name].set_width_table_(WidthTable(switch=(4, 8)))
    plain, fused = make_packed("wan", fake).to(dtype), make_packed("wan", fake).to(dtype)
    assert fuse_packed_(fused).gated == 2
    assert torch.equal(call("wan", fused, dtype), call("wan", plain, dtype))  # leaves the samples' timesteps behind
    generator = torch.Generator().manual_seed(0)
    x, text = (
        torch.randn(2, 32, 64, generator=generator).to(dtype),
        torch.randn(2, 8, 64, generator=generator).to(dtype),
    )
    rotary = (torch.randn(1, 32, 1, 32, generator=generator), torch.randn(1, 32, 1, 32, generator=generator))
    for shape in ((2, 6, 64), (2, 32, 6, 64)):
        temb = torch.randn(shape, generator=generator).to(dtype)
        for mine, theirs in zip(fused.blocks, plain.blocks, strict=True):
            assert isinstance(mine, GatedWanBlock)
            assert torch.equal(mine(x, text, temb, rotary), theirs(x, text, temb, rotary))


def test_blocks_with_other_layers_or_processors_keep_their_gates() -> None:
    packed = make_packed("wan")
    packed.blocks[0].attn1.to_out[0] = nn.Linear(64, 64)
    packed.blocks[1].attn1.set_processor(type("Other", (WanAttnProcessor,), {})())
    plain = copy.deepcopy(packed)
    assert fuse_packed_(packed).gated == 0
    assert torch.equal(call("wan", packed), call("wan", plain))


def test_blocks_of_any_family_share_what_it_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    # ChronoEdit's attention is a copy of Wan's, with the same switch; no family here is of it
    monkeypatch.setattr(block_fusion, "_loaders", dict(block_fusion._loaders))
    model = ChronoEditTransformer3DModel(**{**WAN, "image_dim": None, "rope_temporal_skip_len": 8})
    profile = make_profile("paper", weight_bits=4, activation_bits=4)
    qvgen.prepare(model, PrepareConfig(profile=profile, initializer=load_leaf("init", "rtn")))
    plain = make_packed("", model.eval().requires_grad_(False))
    fused = copy.deepcopy(plain)
    count = fuse_packed_(fused)
    assert (count.merged, count.feed_forwards, count.gated) == (0, 2, 0)

    def merge(module: nn.Module) -> ProjectionMerge | None:
        is_own = isinstance(module, ChronoEditAttention) and not module.is_cross_attention
        return ProjectionMerge(parts=("to_q", "to_k", "to_v"), into="to_qkv") if is_own else None

    def gate(module: nn.Module) -> nn.Module | None:
        replaced.append(type(module))
        return None

    replaced: list[type] = []
    register_fusion("chronoedit", lambda: BlockFusion(merge=merge, gate=gate))
    count = fuse_packed_(fused)
    assert (count.merged, count.gated) == (2 * 3, 0)
    assert type(model) in replaced
    assert BlockedFeedForward in replaced  # gates are asked for once feed-forwards run by blocks
    assert torch.equal(call("wan", fused), call("wan", plain))
    assert fused.blocks[0].attn1.to_qkv._prepacked is not None  # it ran


def test_attention_to_images_stays_in_parts() -> None:
    # diffusers' switch asks for a merged k and v of the image too, which differ in nothing but their input
    model = WanTransformer3DModel(**WAN, image_dim=16, added_kv_proj_dim=64)
    profile = make_profile("paper", weight_bits=4, activation_bits=4)
    qvgen.prepare(model, PrepareConfig(profile=profile, initializer=load_leaf("init", "rtn")))
    plain = make_packed("", model.eval().requires_grad_(False))
    fused = copy.deepcopy(plain)
    assert fuse_packed_(fused).merged == 2 * 3
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 512, 24, generator=generator),
        "encoder_hidden_states_image": torch.randn(1, 512, 16, generator=generator),
    }
    assert torch.equal(*(found(**inputs, return_dict=False)[0] for found in (fused, plain)))


def test_a_merged_layer_follows_its_parts() -> None:
    packed = make_packed("wan")
    fuse_packed_(packed)
    assert prepack_(packed)
    before = call("wan", packed)
    part = packed.get_submodule("blocks.0.attn1.to_v")
    part.codes.bitwise_xor_(0x11)
    part._prepacked = {}
    changed = call("wan", packed)
    assert not torch.equal(changed, before)
    part.codes.bitwise_xor_(0x11)
    assert torch.equal(call("wan", packed), before)
    assert "64 -> 64 + 64 + 64" in repr(packed.get_submodule("blocks.0.attn1.to_qkv"))


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_packed_model_compiles_without_graph_break(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model_class, config, merged = MODELS[name]
    monkeypatch.setitem(MODELS, name, (model_class, config | {"num_layers": 1}, merged))
    fuse_as_elsewhere(monkeypatch)
    packed = make_packed(name)
    fuse_packed_(packed)
    prepack_(packed)
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    assert torch.equal(call(name, compiled), call(name, packed))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, of Wan's norm of queries
@pytest.mark.parametrize("name", MODELS)
def test_fused_blocks_under_autocast_are_single_layers_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = make_fake(name)
    plain, fused = make_packed(name, fake), make_packed(name, fake)
    fuse_packed_(fused)
    fuse_as_elsewhere(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(name, fused), call(name, plain))


class StatedNorm(nn.Module):
    """A LayerNorm in torch's place whose sums are those of kernels/README.md."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = stated_norm(x.flatten(0, -2), self.weight, self.bias, eps=self.eps)
        return rows.reshape(x.shape).to(x.dtype)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_norms_are_the_stated_ones_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    fake = make_fake(name)
    plain, fused, by_torch = (make_packed(name, fake).to(dtype) for _ in range(3))
    fuse_packed_(by_torch)
    fuse_packed_(fused, fused_norms=True)
    ends = ("norm1", "norm2", "norm3") if name == "wan" else ("norm1.norm", "norm2.norm")
    for block in plain.blocks if name == "wan" else plain.transformer_blocks:
        for end in ends:
            if isinstance(block.get_submodule(end), nn.LayerNorm):
                block.set_submodule(end, StatedNorm(block.get_submodule(end)))
    found = call(name, fused, dtype)
    assert torch.equal(found, call(name, plain, dtype))
    if dtype == torch.float32:
        assert not torch.equal(found, call(name, by_torch, dtype))
        assert (found - call(name, by_torch, dtype)).square().mean() < 1e-4 * found.square().mean()


def test_fused_norms_of_a_model_that_has_none_are_refused(tmp_path) -> None:
    packed = make_packed("wan")
    for block in packed.blocks:
        block.attn1.to_out[0] = nn.Linear(64, 64)
    with pytest.raises(UserError, match="fused_norms=true: no block of WanTransformer3DModel"):
        fuse_packed_(packed, fused_norms=True)
    qvgen.save_packed(make_packed("wan"), tmp_path)
    assert all(block.fused_norms for block in qvgen.load_packed(tmp_path, fused_norms=True).blocks)
    assert not any(block.fused_norms for block in qvgen.load_packed(tmp_path).blocks)


class NothingIsRead(TorchDispatchMode):
    """Refuses operators that would wait for a device: those that read a value or whose output's size depends on one."""

    waits = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.is_nonzero.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.waits, f"{func} reads a value"
        own = {
            torch.ops.qvgen.fused_linear.default: fused_op._fused_linear,
            torch.ops.qvgen.packed_linear.default: op._packed_linear,
        }
        if func in own:
            self.calls[func.name()] += 1
            with self:  # what happens inside of the operator is looked at too
                return own[func](*args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_a_call_reads_no_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fuse_as_elsewhere(monkeypatch)
    packed = make_packed(name)
    for layer in packed_layers(packed).values():
        layer.kernel = "dequantize"
    fuse_packed_(packed)
    prepack_(packed)
    expected = call(name, packed)
    with NothingIsRead() as mode:
        found = call(name, packed)
    assert torch.equal(found, expected)
    # q k v, to_out of text and video, ff1, ff2 of both; Wan: q k v, the text's q, ff1, ff2
    assert mode.calls["qvgen::fused_linear"] == 2 * (6 if name == "cogvideox" else 4)


class Tight(ReferenceBackend):
    """A backend on a device whose memory ends while layers are prepacked."""

    name = "tight"
    left = 10**9

    def _arrange(self, parts, *, spec):
        Tight.left -= 1
        if Tight.left < 0:
            raise torch.OutOfMemoryError("out of memory")
        return super()._arrange(parts, spec=spec)


def test_memory_that_ends_while_prepacking_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    registry.register_backend(Tight())
    model = make_packed("wan")
    for layer in packed_layers(model).values():
        layer.kernel = "tight"
    fuse_packed_(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.setattr(Tight, "left", 5)
    with pytest.raises(torch.OutOfMemoryError):
        prepack_(model)
    assert kernel_names(model) == ()  # no copy is kept of the layers that were ready
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(torch.OutOfMemoryError):
        call("wan", model)
    monkeypatch.setattr(Tight, "left", 10**9)
    found = call("wan", model)  # with memory it runs
    assert kernel_names(model) == ("tight",)
    monkeypatch.setattr(Tight, "left", 3)
    with pytest.raises(torch.OutOfMemoryError):
        prepack_(model)
    assert torch.equal(call("wan", model), found)  # what was ready before is ready still
