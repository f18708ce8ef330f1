"""manifest.json: everything about a packed checkpoint that is not a tensor. Plain data; it never names code to run.

    {"format": "qvgen-packed", "version": 1,
     "base": {"name", "revision", "arguments", "transformer", "config"},     transformer: a class of diffusers
     "num_noise_bands", "timesteps", "strict_timesteps", "guided", "activation_switch", "layers": [...],
     "attentions": [...] (:mod:`qvgen.deploy.attention_entry`), "skipped": [...], "training": {...}, "sha256": of the file}

Every layer says {name, shape [N, K], bits, granularity, group_size, zero_point, scale_dtype, bias, activation {bits,
granularity, group_size, zero_point, scale_dtype, arithmetic, clip, range "dynamic" or "static", clip_table},
rotation, rotation_kind, input_scale, branch_rank, plan, profile, bytes, weight_error}; clip_table is the number of noise
bands (or static steps) with table entries of their own, plan is a WidthTable's, weight_error is |Q(W) - W|^2 / |W|^2
against the trained master weight, null where it is not known.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvgen.config.plain_json import flag, items, mapping, number, parse_json, read_bytes, text, whole
from qvgen.deploy.attention_entry import ATTENTION_VERSION, AttentionEntry, read_attentions
from qvgen.deploy.delta_switch import DeltaSwitchConfig
from qvgen.deploy.transformer_class import transformer_class
from qvgen.layers.layer_form import LayerForm
from qvgen.layers.packed_linear import PackedLinear
from qvgen.models.base import LOCAL_ARGUMENTS
from qvgen.quant.grid import MAX_BITS, MIN_BITS, Grid, Profile
from qvgen.quant.width_table import WidthTable

FORMAT, VERSION = "qvgen-packed", 1
MANIFEST_FILE, WEIGHTS_FILE = "manifest.json", "model.safetensors"

MAX_FEATURES, MAX_BANDS = 2**20, 2**16
"""Most columns or rows of a layer, and most noise bands, that a manifest may give; the widest Linear has 30 720 rows."""


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
        """The layer as the manifest stores it, in plain values."""
        form, profile = self.form, self.form.profile
        weight, activation = asdict(profile.weight), asdict(profile.activation)
        kind = "static" if form.static else "dynamic"
        return {
            "name": self.name,
            "shape": [self.out_features, self.in_features],
            **{name: value for name, value in weight.items() if name not in ("arithmetic", "clip")},
            "bias": self.bias,
            "activation": {**activation, "range": kind, "clip_table": num_noise_bands},
            "rotation": profile.rotation,
            "rotation_kind": profile.rotation_kind,
            "input_scale": form.input_scale,
            "branch_rank": form.branch_rank,
            "plan": None if form.width_table is None else form.width_table.to_dict(),
            "profile": profile.name,
            "bytes": self.nbytes,
            "weight_error": self.weight_error,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerEntry:
        """Inverse of :meth:`to_dict`; raises KeyError, TypeError or ValueError for anything malformed."""
        activation = mapping(data["activation"], "activation")
        wanted = "static" if activation["granularity"] == "per_tensor" else "dynamic"
        if activation["range"] != wanted:
            raise ValueError(f"activation range {activation['range']!r} of a {activation['granularity']} grid")
        whole(activation["clip_table"], "clip_table", low=1, high=MAX_BANDS)
        shape = items(data["shape"], "shape")
        if len(shape) != 2:
            raise ValueError(f"shape {shape} of a layer has no two sizes")
        rows, columns = (whole(size, "a size of shape", low=1, high=MAX_FEATURES) for size in shape)
        profile = Profile(
            name=text(data["profile"], "profile"),
            weight=_grid(data, columns=columns),
            activation=_grid(activation, columns=columns),
            rotation=whole(data["rotation"], "rotation", high=columns),
            rotation_kind=data.get("rotation_kind", "sylvester"),  # .get: older files have no other kind
        )
        error = data["weight_error"]
        return cls(
            name=text(data["name"], "name"),
            out_features=rows,
            in_features=columns,
            bias=flag(data["bias"], "bias"),
            form=LayerForm(
                profile=profile,
                width_table=None if data.get("plan") is None else WidthTable.from_dict(data["plan"]),
                # The first manifests lack input_scale: there was none.
                input_scale=flag(data.get("input_scale", False), "input_scale"),
                branch_rank=whole(data.get("branch_rank", 0), "branch_rank", high=min(rows, columns)),
            ),
            nbytes=whole(data["bytes"], "bytes"),
            weight_error=None if error is None else number(error, "weight_error"),
        )


def _grid(data: Mapping[str, Any], *, columns: int) -> Grid:
    """The grid of a side, with every value of its own type."""
    group = data["group_size"]
    return Grid(
        bits=whole(data["bits"], "bits", low=MIN_BITS, high=MAX_BITS),
        granularity=data["granularity"],
        zero_point=data["zero_point"],
        group_size=None if group is None else whole(group, "group_size", low=1, high=columns),
        scale_dtype=data["scale_dtype"],
        arithmetic=data.get("arithmetic", "reciprocal"),  # .get: older files have no other, and learned clips
        clip=flag(data.get("clip", True), "clip"),
    )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole manifest.

    Attributes:
        base_name: Name of the model family's configuration (conf/model), for example ``tiny``.
        base_arguments: Values that the run gave to the family in place of its configuration's: sizes, sampling; plain
            values, no paths.
        base_revision: Identifier of the full-precision weights, for example their sha256.
        transformer: Class of diffusers; see :mod:`qvgen.deploy.transformer_class`.
        transformer_config: Arguments of that class.
        num_noise_bands: Bands of the clip tables.
        timesteps: Timesteps of a sampler that the entries of static tables, or of an imported checkpoint's clips, are for,
            rising; None: equal noise bands.
        strict_timesteps: Whether other timesteps are refused, in place of interpolating.
        guided: Whether tables have two entries for each timestep: those of calls with captions, then those of guidance's
            calls without them.
        activation_switch: The policy that chooses activation widths while sampling; None: there is none.
        layers: Packed layers, in the model's order.
        attentions: Quantized attentions, likewise.
        skipped: Names of the Linears that stayed in full precision.
        training: How it was made: method, init, seed, steps; free-form, for people.
        sha256: Checksum of the file model.safetensors.
    """

    base_name: str
    base_revision: str
    base_arguments: dict[str, Any]
    transformer: str
    transformer_config: dict[str, Any]
    num_noise_bands: int
    timesteps: tuple[float, ...] | None
    strict_timesteps: bool
    guided: bool
    activation_switch: DeltaSwitchConfig | None
    layers: tuple[LayerEntry, ...]
    skipped: tuple[str, ...]
    training: dict[str, Any]
    sha256: str
    attentions: tuple[AttentionEntry, ...] = ()

    def __post_init__(self) -> None:
        if local := sorted(set(self.base_arguments) & set(LOCAL_ARGUMENTS)):
            raise ValueError(f"base arguments name {local[0]!r}, which is of one machine and for its user to say")

    def to_dict(self) -> dict[str, Any]:
        """The file's content, in plain values."""
        return {
            "format": FORMAT,
            "version": ATTENTION_VERSION if self.attentions else VERSION,
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
            **({"guided": True} if self.guided else {}),
            "activation_switch": None if self.activation_switch is None else self.activation_switch.to_dict(),
            "layers": [layer.to_dict(num_noise_bands=self.num_noise_bands) for layer in self.layers],
            **({"attentions": [entry.to_dict() for entry in self.attentions]} if self.attentions else {}),
            "skipped": list(self.skipped),
            "training": self.training,
            "sha256": self.sha256,
        }

    def to_json(self) -> bytes:
        """The file's content."""
        return (json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, *, source: str) -> Manifest:
        """Parse and check a manifest: each value of its own type and within what a model can have.

        Raises:
            ValueError: Names the source and what is wrong with it.
        """
        try:
            data = parse_json(content, source=source)
        except ValueError as error:
            raise ValueError(f"{error}; export the checkpoint again") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{source} is no manifest of format {FORMAT!r}; give the folder that fold wrote")
        wanted = ATTENTION_VERSION if data.get("attentions") else VERSION
        if type(version := data.get("version")) is not int or version != wanted:
            why = f"; attention in 8 bits is another arithmetic since version {wanted}, export the checkpoint again"
            why = why if data.get("attentions") else ""
            raise ValueError(f"{source} has version {version!r}; this qvgen reads version {wanted}{why}")
        try:
            manifest = _parse(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"is malformed: {error}"
            raise ValueError(f"{source} {what}; export the checkpoint again") from error
        try:
            transformer_class(manifest.transformer)
        except ValueError as error:
            raise ValueError(f"{source}: {error}; install the diffusers that it was made with") from error
        return manifest


def _parse(data: Mapping[str, Any]) -> Manifest:
    """A manifest of parsed JSON; raises KeyError, TypeError or ValueError for anything malformed."""
    base, switch, timesteps = mapping(data["base"], "base"), data.get("activation_switch"), data.get("timesteps")
    layers = tuple(LayerEntry.from_dict(mapping(layer, "a layer")) for layer in items(data["layers"], "layers"))
    if not layers:
        raise ValueError("it names no packed layer")
    bands = whole(data["num_noise_bands"], "num_noise_bands", low=1, high=MAX_BANDS)
    if other := [n for layer in data["layers"] if (n := layer["activation"]["clip_table"]) != bands]:
        raise ValueError(f"clip_table={other[0]} of a layer is not num_noise_bands={bands}")
    if any(layer.form.static for layer in layers) and timesteps is None:
        raise ValueError("its layers have static ranges and it has no timesteps")
    guided = flag(data.get("guided", False), "guided")  # .get: older files have no such tables
    if guided and bands != 2 * len(items(timesteps, "timesteps of guided tables")):
        raise ValueError(
            f"num_noise_bands={bands} is not two for each of its {len(timesteps)} timesteps, as guided tables are"
        )
    sha256 = text(data["sha256"], "sha256")
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"sha256={sha256[:80]!r} is no sha256 of 64 hex digits")
    return Manifest(
        base_name=text(base["name"], "base.name"),
        base_revision=text(base["revision"], "base.revision"),
        base_arguments=mapping(base["arguments"], "base.arguments"),
        transformer=text(base["transformer"], "base.transformer"),
        transformer_config=mapping(base["config"], "base.config"),
        num_noise_bands=bands,
        timesteps=None if timesteps is None else tuple(number(t, "timesteps") for t in items(timesteps, "timesteps")),
        strict_timesteps=flag(data.get("strict_timesteps", False), "strict_timesteps"),
        guided=guided,
        activation_switch=None if switch is None else DeltaSwitchConfig.from_dict(switch),
        layers=layers,
        attentions=read_attentions(data),
        skipped=tuple(text(name, "skipped") for name in items(data["skipped"], "skipped")),
        training=mapping(data["training"], "training"),
        sha256=sha256,
    )


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a packed directory.

    Raises:
        ValueError: There is none, or it is not one that this version reads.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        if (directory / "config.json").is_file():
            raise ValueError(
                f"{directory} has a config.json and no {MANIFEST_FILE}: it was written by save_pretrained; load it by "
                "the from_pretrained of its class in diffusers, and qvgen.save_packed writes a packed directory"
            )
        raise ValueError(f"{path} is missing; give a packed directory, for example outputs/.../packed")
    return Manifest.from_json(read_bytes(path), source=str(path))


def layer_entry(name: str, layer: PackedLinear) -> LayerEntry:
    """The entry of a packed layer in the manifest."""
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
