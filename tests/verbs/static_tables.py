"""Static tables by sampling step (arXiv 2502.15077) beside dynamic ranges, on a tiny Latte of spatial and temporal blocks.

    python -m tests.verbs.static_tables docs/benchmarks

It takes a minute of processor time, writes static-latte.json and static-latte.md, and needs no weights: the model is
as it was made, and once more after a short training on moving squares, so that its activations follow the timestep.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKL, LatteTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional

from qvgen.config.bits import Bits
from qvgen.config.defaults import load_section
from qvgen.config.leaves import load_leaf, load_profile
from qvgen.config.prompts.prompt import Prompts
from qvgen.evaluation.environment import collect_environment
from qvgen.evaluation.held_out import relative_error_of
from qvgen.evaluation.sampled_inputs import SampledInputs
from qvgen.evaluation.sampled_teacher import SampledTeacher
from qvgen.layers.swap import quantized_layers
from qvgen.models.named_family import NamedFamily
from qvgen.training.design.student import StudentDesign
from qvgen.training.start.ptq_method import PTQMethod
from qvgen.training.start.student import prepare_student, set_up_student_
from tests.models.ltx_folders import LATTE_TRANSFORMER, make_latte_folder

STEPS, SEED, TRAINING_STEPS = 10, 42, 400
SIZES = {
    "height": 32,
    "width": 48,
    "num_frames": 9,
    "sampling_frames": 9,
    "num_inference_steps": STEPS,
    "guidance_scale": 2.0,
}
CAPTIONS = ["a red boat", "two dogs run"]
WIDTHS = ("8", "w4a8", "4")
METHODS = ("rtn", "smoothquant", "static", "static, one entry")
LABELS = {
    "rtn": "dynamic, `rtn`",
    "smoothquant": "dynamic, `smoothquant`",
    "static": "static by step, `static`",
    "static, one entry": "static, one range for all steps",
}


def make_model(folder: Path) -> None:
    """Two spatial and two temporal blocks of width 64, and a VAE whose latents have a deviation of 1."""
    make_latte_folder(folder)
    torch.manual_seed(0)
    sizes = LATTE_TRANSFORMER | {"num_attention_heads": 4, "cross_attention_dim": 64}
    LatteTransformer3DModel(**sizes).save_pretrained(folder / "transformer")
    vae: Any = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        latents = vae.encode(squares(32).transpose(1, 2).flatten(0, 1)).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / float(latents.std()))
    vae.save_pretrained(folder / "vae")


def squares(count: int) -> Tensor:
    """Clips of a bright square that moves over a plain ground; float32 [count, 3, 9, 32, 48] in [-1, 1]."""
    clips = torch.zeros(count, 3, 9, 32, 48)
    for index, clip in enumerate(clips):
        clip += (index % 7) / 7 - 0.8
        for frame in range(9):
            left = (3 * index + (4 if index % 2 else 1) * frame) % 32
            clip[index % 3, frame, index % 16 : index % 16 + 12, left : left + 16] = 0.9
    return clips


def train_(folder: Path) -> list[float]:
    """Train the transformer to predict the noise of encoded clips; the mean losses of the first and last tenth."""
    family = NamedFamily.load("latte", path=str(folder), dtype="float32", text_encoder_dtype="float32", **SIZES).family
    transformer = family.load_teacher().requires_grad_(True).train()
    latents, encoded = family.encode_video(squares(32)), family.encode(CAPTIONS)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=2e-3)
    generator, losses = torch.Generator().manual_seed(SEED), []
    for _ in range(TRAINING_STEPS):
        rows = torch.randint(len(latents), (8,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        sigma = torch.stack([family.objective.sample_sigma(generator=generator) for _ in rows])
        noisy = family.objective.add_noise(latents[rows], noise, sigma=sigma)
        condition = {name: value[rows % 2] for name, value in encoded.items()}
        found = family.predict(transformer, noisy, family.objective.timestep(sigma), condition)
        loss = functional.mse_loss(found, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    transformer.eval().save_pretrained(folder / "transformer")
    tenth = TRAINING_STEPS // 10
    return [sum(part) / tenth for part in (losses[:tenth], losses[-tenth:])]


def use_one_entry_(student: nn.Module) -> None:
    """Give every step the range that holds those of all steps."""
    for layer in quantized_layers(student).values():
        quantizer: Any = layer.activation_quantizer
        scale, zero = quantizer.scale.detach(), quantizer.zero_point.detach()
        low, high = (-scale * zero).amin(), (scale * (quantizer.grid.qmax - zero)).amax()
        one = (high - low) / quantizer.grid.qmax
        quantizer.start_from_(one.expand_as(scale), (-low / one).round().expand_as(zero))


def step_ratios(student: nn.Module) -> dict[str, float]:
    """Largest scale of a layer over its smallest one, the median over the layers of each kind of block."""
    kinds: dict[str, list[float]] = {"spatial": [], "temporal": []}
    for name, layer in quantized_layers(student).items():
        scale = layer.activation_quantizer.scale.detach()  # type: ignore[union-attr]
        if "blocks." in name:
            kinds["temporal" if name.startswith("temporal") else "spatial"].append(float(scale.max() / scale.min()))
    return {f"{kind}_ratio": median(found) for kind, found in kinds.items()}


def final_latents(family: Any) -> Callable[[nn.Module], list[Tensor]]:
    """A model -> the latents that it samples, one video of each caption; they are not decoded."""

    def sample(model: nn.Module) -> list[Tensor]:
        found: list[Tensor] = []
        decode = family._decode_sampled
        family._decode_sampled = lambda latents, **options: found.append(latents.float()) or decode(latents, **options)
        options = {"num_steps": STEPS, "guidance_scale": family.guidance_scale}
        family.generate(model, CAPTIONS, [SEED, SEED + 1], **options)
        family._decode_sampled = decode
        return found

    return sample


def rows_of(folder: Path, weights: str) -> Iterator[dict[str, Any]]:
    """A row for each width and method."""
    types = {"dtype": "float32", "text_encoder_dtype": "float32", "prompts": CAPTIONS}
    model = NamedFamily.load("latte", path=str(folder), **types, **SIZES)
    teacher = SampledTeacher(
        model=model, transformer=model.family.load_teacher(), encode=model.family.encode, seed=SEED
    )
    inputs = SampledInputs(teacher, prompts=Prompts.of(CAPTIONS), num_samples=40, num_steps=STEPS)
    reference, sample = list(inputs.predictions(teacher.transformer)), final_latents(model.family)
    wanted = sample(teacher.transformer)
    calibration = load_section("calibration", videos=2, steps=STEPS, cache=str(folder / "statistics"))
    for bits in WIDTHS:
        design = StudentDesign(
            profile=load_profile("paper", Bits.parse(bits)), method=load_leaf("method", "ptq"), phi=load_section("phi")
        )

        def row(student: nn.Module, method: str, ratios: dict[str, float], bits: str = bits) -> dict[str, Any]:
            return {
                "weights": weights, "bits": bits, "method": method, **ratios,
                "call_error": inputs.relative_error(student, reference),
                "latent_error": relative_error_of(sample(student), wanted),
            }  # fmt: skip

        for name in METHODS[:-1]:
            student, _ = prepare_student(model.family, design, seed=None)
            ptq = PTQMethod(name=name, init=load_leaf("init", name), calibration=calibration)
            set_up_student_(student, design=design, ptq=ptq, teacher=teacher)
            yield row(student.eval(), name, step_ratios(student) if name == "static" else {})
        use_one_entry_(student)
        yield row(student, METHODS[-1], {})


def page(rows: list[dict[str, Any]], *, command: str, losses: list[float], cpu: str) -> list[str]:
    """The Markdown page."""
    lines = [
        "# Static quantization by sampling step beside dynamic quantization, on a tiny Latte",
        "",
        "`model=latte` over a folder with two spatial and two temporal blocks of width 64, all 38 Linears quantized;",
        f"{STEPS} DDIM steps, guidance 2. The weights are random, or those after a short training on moving squares",
        f"({TRAINING_STEPS} steps of 8 clips, a loss of {losses[0]:.2f} in the first tenth and {losses[1]:.2f} in the last):",
        "no trained video model was at hand, and none of these numbers is the paper's. Calls: the relative error of the",
        "transformer's output where the full-precision model samples, at the steps of the tables; latents: that of two",
        f"videos that the quantized model samples by itself. {cpu}.",
        "",
        f"    {command}",
        "",
    ]
    for weights in dict.fromkeys(row["weights"] for row in rows):
        names = [f"W{Bits.parse(width).weight}A{Bits.parse(width).activation}" for width in WIDTHS]
        heads = [f"{name} {what}" for name in names for what in ("calls", "latents")]
        lines += [f"## {weights}", "", f"| inputs | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for method in METHODS:
            found = [row for row in rows if (row["weights"], row["method"]) == (weights, method)]
            cells = [f"{row[key]:.2g}" for row in found for key in ("call_error", "latent_error")]
            lines.append(f"| {LABELS[method]} | {' | '.join(cells)} |")
        ratios = next(row for row in rows if row["weights"] == weights and "spatial_ratio" in row)
        lines += [
            "",
            f"A layer's largest scale is {ratios['spatial_ratio']:.2f} times its smallest one in spatial blocks and "
            f"{ratios['temporal_ratio']:.2f} times in",
            "temporal ones (medians over the layers, W8A8).",
            "",
        ]
    return lines[:-1]


def write(out: Path) -> None:
    """Make the table and its values."""
    command = shlex.join(["python", "-m", "tests.verbs.static_tables", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        make_model(folder)
        rows = list(rows_of(folder, "Random weights"))
        losses = train_(folder)
        rows += rows_of(folder, "After a short training")
    environment = collect_environment()
    head = {"command": command, "machine": environment.machine.to_json_dict(), "versions": dict(environment.versions)}
    out.mkdir(parents=True, exist_ok=True)
    content = {**head, "training_losses": losses, "rows": rows}
    (out / "static-latte.json").write_text(json.dumps(content, indent=1) + "\n")
    cpu = str(head["machine"]["cpu"])  # type: ignore[index]
    (out / "static-latte.md").write_text("\n".join(page(rows, command=command, losses=losses, cpu=cpu)) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
