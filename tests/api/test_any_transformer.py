"""The Python interface on transformers of diffusers that no family of qvgen knows.

They are prepared, trained in a plain loop, folded, saved and loaded; checked against the fake-quantized model that was
trained, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import qvgen
from qvgen.config.bits import Bits
from qvgen.config.leaves import load_profile
from qvgen.initializers.rtn import RoundToNearest
from qvgen.layers.attention_swap import attention_records, packed_attentions
from qvgen.layers.swap import packed_layers, quantized_layers

BATCH = 2
Inputs = Callable[[torch.Generator], dict[str, Any]]


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


def ltx() -> tuple[nn.Module, Inputs]:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=16,
    )  # fmt: skip

    def inputs(generator: torch.Generator) -> dict[str, Any]:
        return {
            "hidden_states": normal(BATCH, 2 * 4 * 4, 8, generator=generator),
            "encoder_hidden_states": normal(BATCH, 5, 16, generator=generator),
            "timestep": torch.tensor([900.0, 20.0]),
            "encoder_attention_mask": torch.ones(BATCH, 5),
            "num_frames": 2, "height": 4, "width": 4,
        }  # fmt: skip

    return model, inputs


def latte() -> tuple[nn.Module, Inputs]:
    model = diffusers.LatteTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, patch_size=2,
        sample_size=8, caption_channels=16, cross_attention_dim=32, attention_bias=True, norm_elementwise_affine=False,
        activation_fn="gelu-approximate", video_length=3, num_embeds_ada_norm=1000, norm_type="ada_norm_single",
    )  # fmt: skip

    def inputs(generator: torch.Generator) -> dict[str, Any]:
        return {
            "hidden_states": normal(BATCH, 4, 3, 8, 8, generator=generator),
            "timestep": torch.tensor([900, 20]),
            "encoder_hidden_states": normal(BATCH, 5, 16, generator=generator),
        }

    return model, inputs


def mochi() -> tuple[nn.Module, Inputs]:
    model = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=4, max_sequence_length=8,
    )  # fmt: skip

    def inputs(generator: torch.Generator) -> dict[str, Any]:
        return {
            "hidden_states": normal(BATCH, 4, 2, 8, 8, generator=generator),
            "encoder_hidden_states": normal(BATCH, 8, 16, generator=generator),
            "timestep": torch.tensor([900.0, 20.0]),
            "encoder_attention_mask": torch.ones(BATCH, 8, dtype=torch.bool),
        }

    return model, inputs


def hunyuan_video() -> tuple[nn.Module, Inputs]:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=3,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip

    def inputs(generator: torch.Generator) -> dict[str, Any]:
        return {
            "hidden_states": normal(BATCH, 4, 1, 4, 4, generator=generator),
            "timestep": torch.tensor([900, 20]),
            "encoder_hidden_states": normal(BATCH, 6, 16, generator=generator),
            "encoder_attention_mask": torch.ones(BATCH, 6),
            "pooled_projections": normal(BATCH, 8, generator=generator),
            "guidance": torch.tensor([6000.0, 6000.0]),
        }

    return model, inputs


def flux() -> tuple[nn.Module, Inputs]:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip

    def inputs(generator: torch.Generator) -> dict[str, Any]:
        return {
            "hidden_states": normal(BATCH, 16, 4, generator=generator),
            "encoder_hidden_states": normal(BATCH, 6, 32, generator=generator),
            "pooled_projections": normal(BATCH, 32, generator=generator),
            "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3),
            "timestep": torch.tensor([0.9, 0.02]),
        }  # fmt: skip

    return model, inputs


MODELS = {"ltx": ltx, "latte": latte, "mochi": mochi, "hunyuan_video": hunyuan_video, "flux": flux}


def make(name: str) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    return MODELS[name]()


def call(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    result: Tensor = model(**inputs, return_dict=False)[0]
    return result


def train_(model: nn.Module, teacher: nn.Module, inputs: Inputs, *, steps: int) -> list[float]:
    batch = inputs(torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    model.train()
    for _ in range(steps):
        with torch.no_grad():
            wanted = call(teacher, batch)
        loss = (call(model, batch) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi turns it off, in its own way
@pytest.mark.parametrize("name", MODELS)
def test_prepare_train_fold_save_and_load(name: str, tmp_path: Path) -> None:
    model, inputs = make(name)
    teacher, _ = make(name)
    teacher.eval().requires_grad_(False)
    report = qvgen.prepare(model, bits="w4a8", init="mse")
    assert report.quantized == tuple(quantized_layers(model))
    assert all("blocks" in layer for layer in report.quantized)
    assert report.skipped  # embeddings and projections at both ends
    losses = train_(model, teacher, inputs, steps=10)
    assert sum(losses[-3:]) < sum(losses[:3])
    batch = inputs(torch.Generator().manual_seed(2))
    with torch.no_grad():
        trained = call(model, batch)
    assert qvgen.fold(model, kernel="reference") == len(report.quantized)
    qvgen.save_packed(model, tmp_path / "packed")
    loaded = qvgen.load_packed(tmp_path / "packed", kernel="reference")
    assert type(loaded) is type(teacher)
    assert list(packed_layers(loaded)) == list(report.quantized)
    with torch.no_grad():
        assert torch.equal(call(loaded, batch), trained)
    into, _ = make(name)
    with torch.no_grad():
        assert torch.equal(call(qvgen.load_packed(tmp_path / "packed", into, kernel="reference"), batch), trained)


def attentive(**options: Any) -> qvgen.Profile:
    return replace(load_profile("paper", Bits.parse("w4a8")), attention=qvgen.AttentionProfile(kind="int8", **options))


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("name", ["ltx", "latte", "mochi"])
def test_attention_in_8_bits(name: str, tmp_path: Path) -> None:
    """Spatial and temporal attention, to captions too, and captions that are cut off by numbers added to scores."""
    model, inputs = make(name)
    teacher, _ = make(name)
    qvgen.prepare(model, profile=attentive(clips=name != "mochi"), init="rtn")
    batch = inputs(torch.Generator().manual_seed(2))
    if name == "ltx":
        batch["encoder_attention_mask"] = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        found, exact = call(model.eval(), batch), call(teacher.eval(), batch)
    assert 0 < float((found - exact).square().sum() / exact.square().sum()) < 0.05
    names = [entry["name"] for entry in attention_records(model)]
    assert len(names) == {"ltx": 4, "latte": 6, "mochi": 2}[name]
    qvgen.fold(model)
    with torch.no_grad():
        assert torch.equal(call(model, batch), found)
    qvgen.save_packed(model, tmp_path)
    loaded = qvgen.load_packed(tmp_path)
    assert list(packed_attentions(loaded)) == names
    with torch.no_grad():
        assert torch.equal(call(loaded, batch), found)


def test_heads_that_no_kernel_has_are_refused_before_anything_changes() -> None:
    model, _ = make("hunyuan_video")
    with pytest.raises(ValueError, match=r"refiner_blocks.0.attn: head_size=10 must be a multiple of 4"):
        qvgen.prepare(model, profile=attentive(), init="rtn")
    assert not quantized_layers(model)


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_forms_of_attention_are_chosen_by_what_the_caller_runs(tmp_path: Path) -> None:
    model, inputs = make("ltx")
    profile, calls = attentive(rotation="auto"), []
    with torch.no_grad():
        for block in model.transformer_blocks[1:]:
            block.attn1.norm_k.weight[::16] *= 30.0  # one column of every head
    batch = inputs(torch.Generator().manual_seed(0))

    def calibrate(given: nn.Module) -> None:
        calls.append(call(given, batch))

    config = qvgen.PrepareConfig(profile=profile, initializer=RoundToNearest(), include=["*.to_q"])
    for keys in ({"config": config}, {"profile": profile, "init": "rtn"}):
        with pytest.raises(
            ValueError, match=r"rotation=auto, which calibration chooses; pass .*, or write true or false"
        ):
            qvgen.prepare(model, **keys)
    qvgen.prepare(model, profile=profile, init="rtn", calibrate=calibrate)
    assert len(calls) == 1
    found = {entry["name"]: entry["rotation"] for entry in attention_records(model)}
    assert found["transformer_blocks.1.attn1"]
    qvgen.fold(model)
    qvgen.save_packed(model, tmp_path)
    loaded = packed_attentions(qvgen.load_packed(tmp_path))
    assert {name: product.form.rotation for name, product in loaded.items()} == found


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_an_attention_that_takes_samples_one_by_one_has_no_factors_for_them() -> None:
    model, inputs = make("mochi")
    qvgen.prepare(model, profile=attentive(clips=True), init="rtn")
    with torch.no_grad(), pytest.raises(ValueError, match="attn1 attends for 1 of 2 samples.*without .*clips"):
        call(model.eval(), inputs(torch.Generator().manual_seed(2)))


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec.*is deprecated")
def test_lightnings_own_trainer_can_be_put_around_it(tmp_path: Path) -> None:
    model, inputs = make("ltx")
    teacher, _ = make("ltx")
    qvgen.prepare(model, bits=4, init="rtn", options=qvgen.PrepareOptions(phi_rank=4))
    steps = 6
    decay = qvgen.PhiDecay(qvgen.DecaySchedule(ranks=(4, 2), num_steps=steps, tail_share=0.1))

    class Distillation(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student = model

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            decay.apply_(self.student, self.trainer.optimizers[0], step=self.global_step)

        def training_step(self, seed: Tensor, batch_idx: int) -> Tensor:
            batch = inputs(torch.Generator().manual_seed(int(seed)))
            with torch.no_grad():
                wanted = call(teacher, batch)
            return (call(self.student, batch) - wanted).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.student.parameters(), lr=1e-3)

    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Distillation(), DataLoader(torch.arange(100), batch_size=1))
    decay.apply_(model, None, step=steps)
    assert qvgen.fold(model, kernel="reference") == 20
    qvgen.save_packed(model, tmp_path / "packed")
    assert qvgen.load_packed(tmp_path / "packed", kernel="reference").config.num_layers == 2


def test_a_method_that_needs_statistics_gets_them_from_the_callers_function() -> None:
    model, inputs = make("ltx")
    with pytest.raises(ValueError, match=r"init=gptq needs calibration .second_moment.; pass calibrate=FUNCTION"):
        qvgen.prepare(model, bits=3, init="gptq")
    assert not quantized_layers(model)
    batches = [inputs(torch.Generator().manual_seed(seed)) for seed in range(4)]
    with torch.no_grad():
        wanted = [call(model, batch) for batch in batches]

    def error(init: str) -> float:
        prepared, _ = make("ltx")
        qvgen.prepare(
            prepared, bits="w3a8", init=init, calibrate=lambda model: [call(model, batch) for batch in batches]
        )
        prepared.eval()
        with torch.no_grad():
            return sum(
                float((call(prepared, batch) - right).square().sum())
                for batch, right in zip(batches, wanted, strict=True)
            )

    assert error("gptq") < error("rtn")


@pytest.mark.parametrize("init", ["mse", "static"])
def test_a_few_step_model_has_a_band_for_each_timestep(init: str, tmp_path: Path) -> None:
    """Clips, statistics and static tables are of its timesteps, in the packed folder too."""
    model, inputs = make("ltx")
    batch = inputs(torch.Generator().manual_seed(0)) | {"timestep": torch.tensor([1000.0, 522.0])}
    batch["hidden_states"][1] *= 0.1
    options = qvgen.PrepareOptions(timesteps=[1000, 757, 522])

    def calibrate(given: nn.Module) -> None:
        for last in (522.0, 757.0):
            call(given, batch | {"timestep": torch.tensor([1000.0, last])})

    qvgen.prepare(model, bits=4, init=init, calibrate=calibrate, options=options)
    layers = quantized_layers(model)
    assert {layer.noise_band.timesteps for layer in layers.values()} == {(522.0, 757.0, 1000.0)}
    qvgen.fold(model.eval())
    qvgen.save_packed(model, tmp_path)
    loaded = qvgen.load_packed(tmp_path)
    layer = packed_layers(loaded)["transformer_blocks.0.attn2.to_q"]
    table = layer.static_scale if init == "static" else layer.clip_low
    assert table.shape == (3,)
    assert init == "mse" or float(table[2]) > 1.5 * float(table[0])  # the second sample of a batch is quieter
    with torch.no_grad():
        assert torch.equal(call(loaded, batch), call(model, batch))


@pytest.mark.parametrize(
    ("timesteps", "said"),
    [
        ("scheduler", r"^timesteps=scheduler is no list of numbers; write for example \[1000,757,522\]$"),
        ([522, 757], r"^timesteps=\[522,757\] does not fall; write them in the order of sampling: \[757,522\]$"),
        ([1500, 757], r"^timesteps=\[1500,757\]: 1500 is outside of the schedule"),
    ],
)
def test_timesteps_that_are_none_are_refused(timesteps: Any, said: str) -> None:
    model, _ = make("ltx")
    with pytest.raises(ValueError, match=said):
        qvgen.prepare(model, bits=4, init="rtn", options=qvgen.PrepareOptions(timesteps=timesteps))
    assert not quantized_layers(model)


def test_what_can_not_be_saved_is_refused_before_training() -> None:
    class Mine(diffusers.LTXVideoTransformer3DModel):
        pass

    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            del timestep
            return self.linear(x)  # type: ignore[no-any-return]

    for model, message in (
        (
            Mine(num_attention_heads=2, attention_head_dim=16, num_layers=1),
            "'Mine' is no model",
        ),
        (Unknown(), "'Unknown' is no model of diffusers"),
        (diffusers.AutoencoderKL(), "AutoencoderKL.forward takes no timestep"),
    ):
        with pytest.raises(ValueError, match=message):
            qvgen.prepare(model, bits=4)
        assert not quantized_layers(model)


def test_arguments_that_contradict_each_other_are_refused() -> None:
    model, _ = make("ltx")
    profile = qvgen.Profile(
        name="mine",
        weight=qvgen.Grid(
            bits=4, granularity="per_channel", zero_point="integer", group_size=None, scale_dtype="float32"
        ),
        activation=qvgen.Grid(
            bits=8, granularity="per_token", zero_point="integer", group_size=None, scale_dtype="float32"
        ),
        rotation=0,
    )
    for options, message in (
        ({}, "profile='paper' needs bits"),
        ({"bits": 9}, "bits=9 is outside 2..8"),
        ({"bits": 4, "profile": profile}, "bits=4 beside a Profile"),
        ({"bits": 4, "profile": "papre"}, "unknown profile=papre; did you mean 'paper'"),
        ({"bits": 4, "init": "mean"}, "unknown init=mean"),
        ({"bits": 4, "init": "vidit_q_mp"}, "chooses the bits of each layer in a whole run"),
        ({"bits": 4, "options": qvgen.PrepareOptions(include=["*.none"])}, "matches none of the"),
    ):
        with pytest.raises(ValueError, match=message):
            qvgen.prepare(model, **options)
    qvgen.prepare(model, profile=profile, init="rtn")
    with pytest.raises(ValueError, match="quantized already"):
        qvgen.prepare(model, bits=4)


def test_a_manifest_of_any_class_is_held_to_its_file(tmp_path: Path) -> None:
    model, _ = make("hunyuan_video")
    qvgen.prepare(model, bits=4, init="rtn")
    qvgen.fold(model)
    qvgen.save_packed(model, tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    for change, message in (
        ({"num_layers": 2**31}, "num_layers=2147483648"),
        ({"num_single_layers": 10**6}, "num_single_layers=1000000 blocks"),
        ({"rope_axes_dim": [2, 4, "x"]}, "rope_axes_dim"),
        ({"num_attention_heads": 3}, "has shape"),
        ({"pooled_projection_dim": 9}, "has shape"),
        ({"evil": 1}, "has 'evil', which HunyuanVideoTransformer3DModel does not take"),
    ):
        config = {**content["base"]["config"], **change}
        (tmp_path / "manifest.json").write_text(json.dumps({**content, "base": {**content["base"], "config": config}}))
        with pytest.raises(ValueError, match=message):
            qvgen.load_packed(tmp_path)
    for name in ("DiffusionPipeline", "AutoencoderKL", "os", "__class__", "ModelMixin"):
        base = {**content["base"], "transformer": name}
        (tmp_path / "manifest.json").write_text(json.dumps({**content, "base": base}))
        with pytest.raises(ValueError, match="no model of diffusers|takes no timestep"):
            qvgen.load_packed(tmp_path)


def test_public_names_are_listed_and_documented() -> None:
    assert set(qvgen.__all__) <= set(dir(qvgen))
    for name in qvgen.__all__:
        assert name == "__version__" or len(getattr(qvgen, name).__doc__.strip()) > 20, name


def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/python.md", "exec"), names)
    assert len(packed_layers(names["packed"])) == len(names["report"].quantized) == 20
