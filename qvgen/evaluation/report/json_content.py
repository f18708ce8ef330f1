"""The content of report.json: what other programs read about a run.

JSON knows no infinity and no NaN. A non-finite number is written as the string "inf", "-inf" or "nan", which Python's
``float()`` reads back, so that null keeps its one meaning: not measured. The PSNR of two equal videos is the usual
case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qvgen.evaluation.distance import FlipCount
from qvgen.evaluation.json_number import json_number
from qvgen.evaluation.quality_data import Quality, Sampling
from qvgen.evaluation.report.verdict import judge_all, rule
from qvgen.evaluation.report_data import ReportData, ValidationVideo, VideoComparison


def to_json_dict(data: ReportData, validation: Sequence[ValidationVideo] = ()) -> dict[str, Any]:
    """Return the content of report.json: plain dicts, lists, strings, numbers, booleans and None."""
    run, error, checks = data.run, data.relative_error, data.checks
    return {
        "model": run.model,
        "bits": run.bits,
        "weight_bits": run.weight_bits,
        "activation_bits": run.activation_bits,
        "profile": run.profile,
        "method": run.method,
        "init": run.init,
        "seed": run.seed,
        "steps": run.steps,
        "layers_quantized": [layer.name for layer in data.layers],
        "layers_skipped": [layer.name for layer in data.skipped],
        "attentions_quantized": list(data.attentions),
        "relative_error": {name: json_number(getattr(error, name)) for name in ("rtn", "ptq", "qat", "packed")},
        "relative_error_measured_on": {
            "num_samples": error.num_samples,
            "split": error.split,
            "seed": error.seed,
            "num_clips": error.num_clips,
            "caution": error.caution,
        },
        "packed_codes_equal": checks.packed_codes_equal,
        "num_codes": checks.num_codes,
        "packed_vs_fake_max_abs": json_number(checks.packed_vs_fake_max_abs),
        "trajectory_psnr_db": json_number(checks.trajectory_psnr_db),
        "flipped_pixels": _flips(checks.flipped_pixels),
        "flipped_codes": _flips(checks.flipped_codes),
        "phi_rank_final": checks.phi_rank_final,
        "phi_kept": checks.phi_kept,
        "bytes": {"bf16": data.size.bf16, "packed": data.size.packed},
        "seconds": {stage: json_number(value) for stage, value in data.seconds.items()},
        "quality": _quality(data.quality),
        "verdict": verdict_json(data.quality),
        "sampling": _sampling(data.sampling),
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "weight_bits": layer.weight_bits,
                "activation_bits": layer.activation_bits,
                "bytes": layer.num_bytes,
                "weight_error": json_number(layer.weight_error),
                "output_error": json_number(layer.output_error),
            }
            for layer in data.layers
        ],
        "skipped": [{"name": layer.name, "reason": layer.reason} for layer in data.skipped],
        "videos": [_video(video, data.quality) for video in data.videos],
        "validation": [_validation(video) for video in validation],
        "versions": dict(data.environment.versions),
        "git_sha": data.environment.git_sha,
        "git_dirty": data.environment.git_dirty,
        "machine": data.environment.machine.to_json_dict(),
        "command": run.command,
        "config": run.config_yaml,
    }


def _validation(video: ValidationVideo) -> dict[str, Any]:
    return {
        "step": video.step,
        "prompt_index": video.prompt_index,
        "prompt": video.prompt,
        "seed": video.seed,
        "psnr_db": json_number(video.psnr_db),
        "ssim": json_number(video.ssim),
        "suite": {name: json_number(value) for name, value in video.suite.items()},
    }


def _flips(flips: FlipCount | None) -> dict[str, int] | None:
    return None if flips is None else {"flipped": flips.num_flipped, "of": flips.num_values}


def _video(video: VideoComparison, quality: Quality) -> dict[str, Any]:
    own = quality.negative_prompt
    negative = None if own is None else own if video.negative_prompt is None else video.negative_prompt
    return {"prompt": video.prompt, "negative_prompt": negative, "seed": video.seed, "fps": video.fps}


def _quality(quality: Quality) -> dict[str, Any]:
    return {
        "num_videos": quality.num_videos,
        "num_still_videos": quality.num_still_videos,
        "seeds": quality.seeds,
        "num_steps": quality.num_steps,
        "guidance_scale": quality.guidance_scale,
        "left_out": dict(quality.left_out),
        "start_absent": quality.start_absent,
        "negative_prompt": quality.negative_prompt,
        "variants": {
            variant.name: {
                **{name: json_number(variant.compared.get(name)) for name in quality.metrics},
                "flicker": json_number(variant.flicker),
                "activation_bits": json_number(variant.activation_bits),
                "accuracy": {name: json_number(value) for name, value in variant.accuracy.items()},
            }
            for variant in quality.variants
        },
    }


def verdict_json(quality: Quality) -> dict[str, Any]:
    """The verdict on each variant's videos, the packed model's first, and the rule that it follows."""
    verdicts = {
        name: {"level": verdict.level, "metrics": dict(verdict.metrics)} for name, verdict in judge_all(quality).items()
    }
    return {"level": verdicts.get("packed", {"level": None})["level"], "rule": rule(), "variants": verdicts}


def _sampling(sampling: Sampling | None) -> dict[str, Any] | None:
    if sampling is None:
        return None
    return {
        "device": sampling.device,
        "conditions": sampling.conditions,
        "variants": {
            cost.name: {
                "dtype": cost.dtype,
                "kernels": list(cost.kernels),
                "seconds_per_video": json_number(cost.seconds_per_video),
                "weight_bytes": cost.weight_bytes,
                "peak_bytes": cost.peak_bytes,
            }
            for cost in sampling.costs
        },
    }
