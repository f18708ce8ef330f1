"""A clean copy of the packed folder, which ``from_pretrained`` of its class loads: what targets that keep it as it is share.

    model.safetensors, manifest.json     as they are: no value and no bit changes
    config.json, the index               what diffusers reads, made from the manifest (a folder of before lacks them)
    base=FOLDER                          a whole pipeline: these files in its transformer's folder, all other parts beside it

Whatever else lies in the packed folder stays behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from qvgen.deploy.card_facts import base_repository
from qvgen.deploy.exporters.base import ExportFile, Fit
from qvgen.deploy.exporters.pipeline_parts import packed_component, pipeline_files
from qvgen.deploy.manifest import MANIFEST_FILE, WEIGHTS_FILE, Manifest
from qvgen.deploy.packed_file import map_tensors
from qvgen.deploy.packed_record import CONFIG_FILE, INDEX_FILE, config_json, index_json
from qvgen.layers.packed_linear import PackedLinear
from qvgen.models.folder.hub_folder import HubFolder


@dataclass(frozen=True, kw_only=True)
class PackedCopy:
    """A target; it implements :class:`qvgen.deploy.exporters.base.PackedTarget`.

    Attributes:
        base: Folder of the full-precision model, whose other parts make the export a whole pipeline; of a model with two
            experts, the export of one may be the base of the other's. None: the transformer alone.
    """

    base: str | None

    runtime: ClassVar[str]
    profiles: ClassVar[tuple[str, ...]] = ()
    needs_original_names: ClassVar[bool] = False
    dtype: ClassVar[str | None] = None
    bound: ClassVar[str] = "The kernels of qvgen are held to this arithmetic to the bit."

    def fit(self, layer: PackedLinear) -> Fit:
        """Every layer as it is."""
        return Fit(weight=(), inputs=(), runs_as=layer.form.label)

    def packed_folder(self, manifest: Manifest) -> str:
        """The transformer's folder of a pipeline, or the export itself."""
        base = self._base(manifest)
        return "." if base is None else packed_component(base, manifest)

    def packed_files(self, packed: Path, manifest: Manifest) -> list[ExportFile]:
        """The four files, and those of the other parts."""
        base, below = self._base(manifest), Path(self.packed_folder(manifest))
        sizes = {name: tensor.nbytes for name, tensor in map_tensors(packed).items()}
        own: dict[str, bytes | Path] = {
            WEIGHTS_FILE: packed / WEIGHTS_FILE,
            MANIFEST_FILE: packed / MANIFEST_FILE,
            CONFIG_FILE: config_json(manifest),
            INDEX_FILE: index_json(sizes, file=WEIGHTS_FILE),
        }
        files = [ExportFile(path=str(below / name), content=content) for name, content in own.items()]
        return files if base is None else [*files, *pipeline_files(base, without=str(below))]

    def _base(self, manifest: Manifest) -> HubFolder | None:
        if self.base is None:
            return None
        return HubFolder.find(self.base, repository=base_repository(manifest.base_name), model=manifest.base_name)
