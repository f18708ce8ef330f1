"""Train, fold, export, load in the consumer, sample: the PSNR of the consumer's video to the packed model's.

    python -m tests.consumers.round_trip docs/benchmarks

writes export-round-trip.json and export-round-trip.md there. Foreign packages are installed as the tests do it
(``conftest.py``). The models are the real classes and pipelines at tiny sizes with random weights, trained for three steps
against their own full-precision outputs: it shows that a target computes what was trained, not how good a video is.
"""

from __future__ import annotations

import copy
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel
from torch import nn

import qvgen
from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.deploy.fixed_inputs import fixed_inputs
from qvgen.evaluation.environment import collect_environment
from qvgen.layers.swap import packed_layers
from tests.consumers.conftest import run_program
from tests.models.hub_folders import COGVIDEOX_VARIANTS, TEXT_SIZE, make_cogvideox_folder, make_wan_folder

PACKAGES = ("comfy-kitchen==0.2.40", "cache-dit==1.5.3", "torchao==0.18.0", "sdnq==0.2.8")
TRAIN_STEPS, SAMPLING_STEPS = 3, 4
PHI_RANK = 3
"""Of the Phi that is kept where the profile's runtime has a branch."""


@dataclass(frozen=True, kw_only=True)
class Trip:
    """One row.

    Attributes:
        family: Name of conf/model.
        profile: The target's profile.
        bits: Widths.
        target: Of `qvgen export`; ``qvgen``: none, the packed folder itself.
        dtype: ``export.dtype``.
        words: Further words of the command.
        loaded_by: What reads the files.
        products: What computes the layers.
    """

    family: str
    profile: str
    bits: str
    target: str
    dtype: str | None
    words: tuple[str, ...] = ()
    loaded_by: str
    products: str


_OURS = {"loaded_by": "diffusers from_pretrained", "products": "qvgen's kernel"}
_PLAIN = {"loaded_by": "diffusers from_pretrained", "products": "diffusers (torch)"}
_COMFY = {"loaded_by": "diffusers' converter, comfy-kitchen", "products": "comfy-kitchen's eager functions"}
_TORCHAO = {"loaded_by": "diffusers from_pretrained", "products": "torchao (dequantized, torch)"}
_SDNQ = {"loaded_by": "diffusers from_pretrained", "products": "SDNQ (dequantized, torch)"}
_SDNQ_8 = {
    "words": ("export.quantized_inputs=true",),
    "loaded_by": "diffusers from_pretrained",
    "products": "SDNQ in 8 bits",
}
_REFERENCE = "reference arithmetic (its kernels need a GPU)"
_SVDQ = {"profile": "svdq_g64", "bits": "w4a4", "dtype": "bfloat16"}


def _both(family: str) -> list[Trip]:
    """The targets that every family has."""
    cache_dit = {"words": ("export.rank=16",), "loaded_by": "cache-dit's loader", "products": _REFERENCE}
    nunchaku = {"loaded_by": "diffusers' config class", "products": _REFERENCE}
    humming = {"loaded_by": "its tensors' names", "products": _REFERENCE, "profile": "w4a8_row", "bits": "w4a8"}
    return [
        Trip(family=family, profile="svdq_g64", bits="w4a4", target="qvgen", dtype=None, **_OURS),
        Trip(family=family, profile="svdq_g64", bits="w4a4", target="bf16", dtype="float32", **_PLAIN),
        Trip(family=family, target="cache_dit", **_SVDQ, **cache_dit),
        Trip(family=family, target="nunchaku_lite", **_SVDQ, **nunchaku),
        Trip(family=family, target="humming", dtype="bfloat16", **humming),
    ]


TRIPS = (
    *_both("wan"),
    Trip(family="wan", profile="convrot", bits="w4a4", target="qvgen", dtype=None, **_OURS),
    Trip(family="wan", profile="convrot", bits="w4a4", target="comfy", dtype=None, **_COMFY),
    Trip(family="wan", profile="convrot", bits="w4a4", target="comfy", dtype="bfloat16", **_COMFY),
    Trip(family="wan", profile="convrot", bits="w4a4", target="bf16", dtype="bfloat16", **_PLAIN),
    Trip(family="wan", profile="int8", bits="w3a8", target="int8", dtype=None, **_COMFY),
    Trip(family="wan", profile="int8", bits="w4a8", target="sdnq", dtype="float32", **_SDNQ_8),
    Trip(family="wan", profile="w4a8_row", bits="w4a8", target="qvgen", dtype=None, **_OURS),
    Trip(family="wan", profile="w4a8_row", bits="w4a8", target="torchao", dtype="float32", **_TORCHAO),
    Trip(family="wan", profile="w4a8_row", bits="w4a8", target="sdnq", dtype="float32", **_SDNQ),
    *_both("cogvideox-5b"),
)
REFUSED = (("cogvideox-5b", "comfy"), ("cogvideox-5b", "int8"))
"""Family and target: ComfyUI's core has no CogVideoX."""


def model_folder(family: str, path: Path) -> Path:
    """A complete tiny model whose transformer is wide enough for every target: width 128, two blocks."""
    torch.manual_seed(0)
    if family == "wan":
        folder = make_wan_folder(path)
        transformer: nn.Module = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=TEXT_SIZE, freq_dim=32,
            ffn_dim=256, num_layers=2, rope_max_seq_len=32,
        )  # fmt: skip
    else:
        folder = make_cogvideox_folder(path, "5b")
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=128,
            text_embed_dim=TEXT_SIZE, num_layers=2, **COGVIDEOX_VARIANTS["5b"],
        )  # fmt: skip
    transformer.save_pretrained(folder / "transformer")
    return folder


def train_and_pack(family: str, folder: Path, out: Path, *, profile: str, bits: str) -> Path:
    """Quantization-aware training against the full-precision model's outputs, folded and saved."""
    classes = {"wan": WanTransformer3DModel, "cogvideox-5b": CogVideoXTransformer3DModel}
    teacher = classes[family].from_pretrained(folder / "transformer", torch_dtype=torch.float32).eval()
    student = copy.deepcopy(teacher).train()
    kept = profile == "svdq_g64"
    options = qvgen.PrepareOptions(phi_rank=PHI_RANK if kept else 0, phi_keep=kept)
    qvgen.prepare(student, bits=bits, profile=profile, init="mse", options=options)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for step in range(TRAIN_STEPS):
        inputs = fixed_inputs(teacher, timestep=900.0 - 300 * step)
        assert inputs is not None
        inputs["hidden_states"] = inputs["hidden_states"].roll(step, -1)
        with torch.no_grad():
            wanted = teacher(**inputs, return_dict=False)[0]
        loss = (student(**inputs, return_dict=False)[0] - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    student.eval()
    qvgen.fold(student)
    qvgen.save_packed(student, out, base_name=family, training={"steps": TRAIN_STEPS})
    return out


def travel(
    trips: Sequence[Trip], work: Path, run_program: Callable[[Path], str], *, sampling_steps: int
) -> list[dict[str, Any]]:
    """Make all models and exports below a folder, run the consumers' program on its plan: each trip and its results."""
    folders: dict[str, Path] = {}
    packed: dict[tuple[str, ...], Path] = {}
    plan = []
    for index, trip in enumerate(trips):
        if trip.family not in folders:
            folders[trip.family] = model_folder(trip.family, work / trip.family)
        key = (trip.family, trip.profile, trip.bits)
        if key not in packed:
            out = work / "-".join(("packed", *key))
            packed[key] = train_and_pack(trip.family, folders[trip.family], out, profile=trip.profile, bits=trip.bits)
        export = work / f"export-{index}"
        if trip.target != "qvgen":
            dtype = "null" if trip.dtype is None else trip.dtype
            words = [f"packed={packed[key]}", f"target={trip.target}", f"out={export}", f"export.dtype={dtype}"]
            assert main(["export", *words, *trip.words]) == DONE
        layers = len(packed_layers(qvgen.load_packed(packed[key], kernel="reference")))
        paths = {"model": str(folders[trip.family]), "packed": str(packed[key]), "export": str(export)}
        row = {
            "family": trip.family,
            "target": trip.target,
            "dtype": trip.dtype,
            "layers": layers,
            "steps": sampling_steps,
        }
        plan.append({**row, **paths})
    for family, target in REFUSED:
        out = packed[family, "svdq_g64", "w4a4"]
        assert (
            main(["export", f"packed={out}", f"target={target}", f"out={work / 'none'}", "approximate=true"])
            == BAD_INPUT
        )
    file = work / "plan.json"
    file.write_text(json.dumps(plan))
    answers = json.loads(run_program(file).splitlines()[-1])  # a loader says something first
    return [
        {**asdict(trip), **{name: float(value) for name, value in answer.items()}}
        for trip, answer in zip(trips, answers, strict=True)
    ]


def page(rows: Sequence[Mapping[str, Any]], *, command: str) -> list[str]:
    """The Markdown table."""
    environment = collect_environment()
    versions = environment.versions

    def db(value: float | None) -> str:
        return "-" if value is None else "inf" if value == float("inf") else f"{value:.1f}"

    lines = [
        "# Exports in their consumers: from training to a video",
        "",
        f"{environment.machine.cpu}, no GPU; torch {versions['torch']}, diffusers {versions['diffusers']}, "
        f"{', '.join(PACKAGES)}.",
        f"Transformers of width 128 and two blocks, random weights; the blocks' Linears are trained for {TRAIN_STEPS} steps,",
        f"with svdq_g64 beside a Phi of rank {PHI_RANK} that is kept. Videos of 9 x 32 x 48 by diffusers' pipeline,",
        f"{SAMPLING_STEPS} steps with guidance, float32, the same seed. PSNR in dB over 8-bit frames (inf: equal).",
        "",
        f"    {command}",
        "",
        "| model | profile | target | other weights | loaded by | products by | to our packed video "
        "| to ours, its other weights rounded alike | the same, with sums in half precision | ours to full precision |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        dbs = [db(row.get(key)) for key in ("same_rounding_db", "half_sums_db", "packed_to_full_db")]
        cells = [
            row["family"], f"{row['profile']} {row['bits']}", row["target"], row["dtype"] or "as packed", row["loaded_by"],
            row["products"], f"**{db(row['psnr_db'])}**", *dbs,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    refused = "; ".join(f"{target} for {family}" for family, target in REFUSED)
    return [
        *lines,
        "",
        f"Refused: {refused}, which ComfyUI's core does not have.",
        "The target `qvgen` is the packed folder itself in diffusers. `bf16`, `torchao` and `sdnq` (but where it multiplies",
        "in 8 bits) leave inputs unquantized: what they differ by is what quantized inputs cost. The kernels of cache-dit",
        "and nunchaku_lite need a GPU: cache-dit's own loader made the layers, diffusers' configuration class named them,",
        "and their products were replaced by qvgen's reference of the same formula: in float32, and in the last column but",
        "one with the kernels' sums in half precision, whose effect on",
        "layers is in [svdq-accumulation](svdq-accumulation-tiny.md). comfy-kitchen's eager functions are what ComfyUI runs",
        "without a GPU; they rotate by a matrix product, which sums in another order and may change a code. humming's",
        "kernels need a GPU too: its own schemas and packer take such a folder (tests/consumers/test_weight_exports.py), and",
        "the products here are qvgen's reference of their arithmetic, without their two roundings to half precision.",
    ]


def _consumers(plan: Path) -> str:
    return run_program(PACKAGES, "round_trip_program.py", str(plan))


def write(out: Path) -> None:
    """Make the table and its values."""
    command = shlex.join(["python", "-m", "tests.consumers.round_trip", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as work:
        rows = travel(TRIPS, Path(work), _consumers, sampling_steps=SAMPLING_STEPS)
    out.mkdir(parents=True, exist_ok=True)
    named = [{key: str(value) if value == float("inf") else value for key, value in row.items()} for row in rows]
    environment = collect_environment()
    head = {"command": command, "machine": environment.machine.to_json_dict(), "versions": dict(environment.versions)}
    (out / "export-round-trip.json").write_text(json.dumps({**head, "rows": named}, indent=1) + "\n")
    (out / "export-round-trip.md").write_text("\n".join(page(rows, command=command)) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
