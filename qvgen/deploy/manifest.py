"""manifest.json: everything about a packed checkpoint that is not a tensor. Plain data; it never names code to run.

    {"format": "qvgen-packed", "version": 1,
     "base": {"name", "revision", "arguments", "transformer", "config"},     transformer: one of SUPPORTED_TRANSFORMERS
     "num_noise_bands", "timesteps", "strict_timesteps", "activation_switch", "layers": [...], "skipped": [...],
     "training": {...}, "sha256": of model.safetensors}

Every layer says {name, shape [N, K], bits, granularity, group_size, zero_point, scale_dtype, bias, activation {bits,
granularity, group_size, zero_point, scale_dtype, range "dynamic" or "static", clip_table}, rotation, input_scale,
branch_rank, plan, profile, bytes, weight_error}; clip_table is the number of noise bands (or static steps) with table
entries of their own, plan is a BitPlan's, weight_error is |Q(W) - W|^2 / |W|^2 against the trained master weight, null
where it is not known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvgen.deploy.delta_switch import DeltaSwitchConfig
from qvgen.layers.layer_form import LayerForm
from qvgen.layers.packed_linear import PackedLinear
from qvgen.quant.bit_plan import BitPlan
from qvgen.quant.grid import Grid, Profile

FORMAT, VERSION = "qvgen-packed", 1
MANIFEST_FILE, WEIGHTS_FILE = "manifest.json", "model.safetensors"

SUPPORTED_TRANSFORMERS = ("WanTransformer3DModel", "CogVideoXTransformer3DModel")
"""Classes of diffusers that a manifest may name."""


@dataclass(frozen=True, kw_only=True)
class LayerEntry:
    """One packed layer of a manifest."""

    name: str
    out_features: int
    in_features: int
    bias: bool
    form: LayerForm
    nbytes: int
    weight_error: float | None

    def to_dict(self, *, num_noise_bands: int) -> dict[str, Any]:
        """As the manifest stores it."""
        form, profile = self.form, self.form.profile
        weight, activation = asdict(profile.weight), asdict(profile.activation)
        kind = "static" if form.static else "dynamic"
        return {
            "name": self.name,
            "shape": [self.out_features, self.in_features],
            **weight,
            "bias": self.bias,
            "activation": {**activation, "range": kind, "clip_table": num_noise_bands},
            "rotation": profile.rotation,
            "input_scale": form.input_scale,
            "branch_rank": form.branch_rank,
            "plan": None if form.plan is None else form.plan.to_dict(),
            "profile": profile.name,
            "bytes": self.nbytes,
            "weight_error": self.weight_error,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerEntry:
        """Inverse of :meth:`to_dict`; raises KeyError, TypeError or ValueError for anything malformed."""
        activation = {key: value for key, value in data["activation"].items() if key not in ("range", "clip_table")}
        wanted = "static" if activation["granularity"] == "per_tensor" else "dynamic"
        if data["activation"]["range"] != wanted:
            raise ValueError(f"activation range {data['activation']['range']!r} of a {activation['granularity']} grid")
        weight = {key: data[key] for key in ("bits", "granularity", "zero_point", "group_size", "scale_dtype")}
        out_features, in_features = (int(size) for size in data["shape"])
        if out_features < 1 or in_features < 1:
            raise ValueError(f"shape {data['shape']} is not positive")
        profile = Profile(
            name=str(data["profile"]),
            weight=Grid(**weight),
            activation=Grid(**activation),
            rotation=data["rotation"],
        )
        return cls(
            name=str(data["name"]),
            out_features=out_features,
            in_features=in_features,
            bias=bool(data["bias"]),
            form=LayerForm(
                profile=profile,
                plan=None if data.get("plan") is None else BitPlan.from_dict(data["plan"]),
                input_scale=bool(data.get("input_scale", False)),  # .get: checkpoints from before there was any
                branch_rank=int(data.get("branch_rank", 0)),
            ),
            nbytes=int(data["bytes"]),
            weight_error=None if data["weight_error"] is None else float(data["weight_error"]),
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole manifest.

    Attributes:
        base_name: Name of the model family's configuration (conf/model), for example ``tiny``.
        base_arguments: What the run gave to the family in place of its configuration's values: sizes, sampling; plain
            values, no paths.
        base_revision: What identifies the full-precision weights, for example their sha256.
        transformer: Class of diffusers, one of ``SUPPORTED_TRANSFORMERS``.
        transformer_config: Arguments of that class.
        num_noise_bands: Bands of the clip tables.
        timesteps: What the entries of static tables were calibrated for, rising; None where there are none.
        strict_timesteps: Whether other timesteps are refused, in place of interpolating.
        activation_switch: The policy that chooses activation widths while sampling; None: there is none.
        layers: Packed layers, in the model's order.
        skipped: Names of the Linears that stayed in full precision.
        training: How it was made: method, init, seed, steps; free-form, for people.
        sha256: Of the file model.safetensors.
    """

    base_name: str
    base_revision: str
    base_arguments: dict[str, Any]
    transformer: str
    transformer_config: dict[str, Any]
    num_noise_bands: int
    timesteps: tuple[float, ...] | None
    strict_timesteps: bool
    activation_switch: DeltaSwitchConfig | None
    layers: tuple[LayerEntry, ...]
    skipped: tuple[str, ...]
    training: dict[str, Any]
    sha256: str

    def to_json(self) -> bytes:
        """The file's content."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "base": {
                "name": self.base_name,
                "revision": self.base_revision,
                "arguments": self.base_arguments,
                "transformer": self.transformer,
                "config": self.transformer_config,
            },
            "num_noise_bands": self.num_noise_bands,
            "timesteps": None if self.timesteps is None else list(self.timesteps),
            "strict_timesteps": self.strict_timesteps,
            "activation_switch": None if self.activation_switch is None else self.activation_switch.to_dict(),
            "layers": [layer.to_dict(num_noise_bands=self.num_noise_bands) for layer in self.layers],
            "skipped": list(self.skipped),
            "training": self.training,
            "sha256": self.sha256,
        }
        return (json.dumps(content, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Manifest:
        """Parse and check a manifest.

        Raises:
            ValueError: Names the source and what is wrong with it.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{source} is no JSON ({error}); export the checkpoint again") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{source} is no manifest of format {FORMAT!r}; give the folder that fold wrote")
        if data.get("version") != VERSION:
            raise ValueError(f"{source} has version {data.get('version')!r}; this qvgen reads version {VERSION}")
        try:
            base, switch = data["base"], data.get("activation_switch")
            manifest = cls(
                base_name=str(base["name"]),
                base_revision=str(base["revision"]),
                base_arguments=dict(base["arguments"]),
                transformer=str(base["transformer"]),
                transformer_config=dict(base["config"]),
                num_noise_bands=int(data["num_noise_bands"]),
                timesteps=None if data.get("timesteps") is None else tuple(map(float, data["timesteps"])),
                strict_timesteps=bool(data.get("strict_timesteps", False)),
                activation_switch=None if switch is None else DeltaSwitchConfig.from_dict(switch),
                layers=tuple(LayerEntry.from_dict(layer) for layer in data["layers"]),
                skipped=tuple(map(str, data["skipped"])),
                training=dict(data["training"]),
                sha256=str(data["sha256"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"is malformed: {error}"
            raise ValueError(f"{source} {what}; export the checkpoint again") from error
        if manifest.num_noise_bands < 1:
            raise ValueError(f"{source}: num_noise_bands={manifest.num_noise_bands} is not positive; export it again")
        if manifest.transformer not in SUPPORTED_TRANSFORMERS:
            known = ", ".join(SUPPORTED_TRANSFORMERS)
            raise ValueError(f"{source} names the transformer {manifest.transformer!r}; this qvgen runs {known}")
        return manifest


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a packed directory.

    Raises:
        ValueError: There is none, or it is not one that this version reads.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing; give a packed directory, for example outputs/.../packed")
    return Manifest.from_json(path.read_text(encoding="utf-8", errors="replace"), source=str(path))


def layer_entry(name: str, layer: PackedLinear) -> LayerEntry:
    """What a manifest says about a packed layer."""
    return LayerEntry(
        name=name,
        out_features=layer.out_features,
        in_features=layer.in_features,
        bias=layer.bias is not None,
        form=layer.form,
        nbytes=layer.nbytes(),
        weight_error=layer.weight_error,
    )


def file_sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
