"""A small report with every field filled by a value of its own; the numbers are made up."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from qvgen.evaluation.distance import FlipCount
from qvgen.evaluation.environment import Environment, Machine
from qvgen.evaluation.quality_data import Quality, Sampling, SamplingCost, VariantQuality
from qvgen.evaluation.report_data import (
    Checks,
    HeldOutError,
    LayerReport,
    ModelSize,
    ReportData,
    RunInfo,
    SkippedLayer,
    VideoComparison,
)

INJECTION = "\"'><img src=x onerror=alert(1)><script>alert(2)</script>"

METRICS_CSV = """\
step,train/loss,train/gradient_norm,train/learning_rate,phi/rank,phi/gamma_min,quant/weight_sqnr_db,val/relative_error
0,0.4,1.5,0.001,4,1.0,,
1,0.3,1.2,0.002,4,0.0,12.5,
1,,,,,,,0.2
2,0.2,1.1,0.001,2,0.5,,
3,0.1,0.9,0.0005,0,0.0,13.0,
3,,,,,,,0.1
"""


def frames(shift: int) -> np.ndarray:
    video = np.zeros((4, 16, 16, 3), dtype=np.uint8)
    for f in range(4):
        video[f, 4:10, f + shift : f + shift + 6] = (200, 40 * f, 90)
    return video


def report_data(**changes: Any) -> ReportData:
    """The example, with some fields replaced."""
    videos = tuple(
        VideoComparison(
            prompt=prompt,
            seed=40 + i,
            fps=8,
            teacher=frames(0),
            start=frames(3),
            fake_quantized=frames(1),
            packed=frames(2),
        )
        for i, prompt in enumerate(["a red three moving up left", INJECTION])
    )
    accuracy = {"digit": 0.9, "color": 1.0, "motion": None}
    data = ReportData(
        run=RunInfo(
            model="tiny",
            bits="w3a4",
            weight_bits=3,
            activation_bits=4,
            profile="paper",
            method="qvgen",
            init="mse",
            seed=17,
            steps=4,
            command=f"python train.py bits=w3a4 note={INJECTION}",
            config_yaml=f"model: tiny\nnote: {INJECTION}\n",
        ),
        relative_error=HeldOutError(
            rtn=0.2718, ptq=0.2214, qat=0.0502, packed=0.0503, num_samples=256, split="held_out", seed=5
        ),
        size=ModelSize(bf16=1_000_000, packed=250_000),
        checks=Checks(
            packed_codes_equal=True,
            num_codes=36_864,
            packed_vs_fake_max_abs=3.1e-6,
            trajectory_psnr_db=math.inf,
            flipped_pixels=FlipCount(num_flipped=3, num_values=6144),
            flipped_codes=None,
            phi_rank_final=0,
            phi_kept=False,
        ),
        videos=videos,
        quality=Quality(
            variants=(
                VariantQuality(name="teacher", compared={}, flicker=0.5, accuracy=accuracy),
                VariantQuality(
                    name="ptq-start",
                    compared={"psnr_db": 15.6, "ssim": 0.31, "lpips": 0.4},
                    flicker=9.5,
                    accuracy=accuracy,
                ),
                VariantQuality(
                    name="packed",
                    compared={"psnr_db": 23.4, "ssim": 0.91, "lpips": 0.07},
                    flicker=1.45,
                    accuracy=accuracy,
                ),
            ),
            num_videos=64,
            num_still_videos=7,
            seeds="0..63",
            num_steps=20,
            guidance_scale=3.0,
            metrics={"psnr_db": "PSNR", "ssim": "SSIM", "lpips": "LPIPS"},
            left_out={},
            start_absent=None,
        ),
        sampling=Sampling(
            costs=(
                SamplingCost(
                    name="teacher",
                    dtype="bfloat16",
                    kernels=(),
                    seconds_per_video=4.2,
                    weight_bytes=1_000_000,
                    working_bytes=7_000_000,
                ),
                SamplingCost(
                    name="packed",
                    dtype="float32",
                    kernels=("vnni",),
                    seconds_per_video=1.4,
                    weight_bytes=300_000,
                    working_bytes=5_000_000,
                ),
            ),
            device="2 CPU threads",
            conditions="64 videos, after the shown ones; peak memory: as it was measured",
        ),
        layers=(
            LayerReport(
                name="blocks.0.to_q",
                shape=(96, 64),
                weight_bits=3,
                activation_bits=4,
                num_bytes=3000,
                weight_error=0.02,
                output_error=None,
            ),
            LayerReport(
                name="blocks.0.ffn",
                shape=(384, 80),
                weight_bits=3,
                activation_bits=4,
                num_bytes=12_000,
                weight_error=0.03,
                output_error=0.04,
            ),
        ),
        skipped=(SkippedLayer(name="proj_out", reason="excluded by 'proj_*'"),),
        seconds={"init": 1.0, "train": 20.0, "fold": 0.5, "evaluate": 2.0, "generate": 3.0},
        environment=Environment(
            versions={"python": "3.11.7", "torch": "2.13.0"},
            git_sha="0123456789abcdef0123456789abcdef01234567",
            git_dirty=True,
            machine=Machine(cpu="A CPU", num_cores=2, num_threads=1, memory_gib=16.0, gpus=(), system="Linux x86_64"),
        ),
    )
    return dataclasses.replace(data, **changes)
