"""The Hugging Face hub: the packed folder with a model card, ready to be uploaded as it is.

    a copy of the folder (:mod:`qvgen.deploy.exporters.packed_copy`), with base=FOLDER a whole pipeline
    README.md       the model card, made from the manifest and the run's report (:mod:`qvgen.deploy.model_card`)

With ``upload=true`` the folder is uploaded too, by huggingface_hub, once it is written; a token and the name of the
repository are asked for before anything is computed. Parity reports go along. Nothing is deleted in a repository that is
there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from qvgen.deploy.exporters.base import ExportFile
from qvgen.deploy.exporters.packed_copy import PackedCopy
from qvgen.deploy.manifest import Manifest
from qvgen.deploy.model_card import CARD_FILE, CardSources, card_of
from qvgen.errors import UnfitEnvironmentError, UserError, one_line


@dataclass(frozen=True, kw_only=True)
class Hub(PackedCopy):
    """The target; it implements :class:`qvgen.deploy.exporters.base.Publisher`.

    Attributes:
        repo: ORG/NAME that the folder has on the hub, for the card's lines that load it; None: a placeholder stands there.
        report: The run's report.json, whose numbers the card shows; None: the one beside the packed folder, if there is one.
        evaluation: Folder of `qvgen evaluate`, or its evaluation.json, whose intervals the card shows; None: it shows none.
        upload: True also uploads the folder to ``repo``, which is made if need be.
        private: Whether a repository that is made is private.
    """

    repo: str | None
    report: str | None
    evaluation: str | None
    upload: bool
    private: bool

    runtime: ClassVar[str] = "the Hugging Face hub, for diffusers with qvgen"

    def __post_init__(self) -> None:
        if self.repo is not None:
            try:
                validate_repo_id(self.repo)
            except HFValidationError as error:
                raise UserError(f"export.repo={self.repo} is no ORG/NAME: {one_line(error)}") from error
        if self.upload and self.repo is None:
            raise UserError("export.upload=true needs a repository; write export.repo=ORG/NAME")

    def packed_files(self, packed: Path, manifest: Manifest) -> list[ExportFile]:
        """The copy and its card."""
        files = super().packed_files(packed, manifest)
        card = card_of(
            packed,
            sources=CardSources(report=_path(self.report), evaluation=_path(self.evaluation)),
            repository=self.repo,
            part=self.packed_folder(manifest),
        )
        return [*files, ExportFile(path=CARD_FILE, content=card.encode())]

    def check_upload(self) -> None:
        """See :class:`qvgen.deploy.exporters.base.Publisher`."""
        if self.upload and get_token() is None:
            raise UserError(
                "export.upload=true needs a token of the hub and there is none; log in with `hf auth login` or set HF_TOKEN, "
                "or leave upload out and upload the folder later"
            )

    def publish(self, folder: Path) -> str:
        """See :class:`qvgen.deploy.exporters.base.Publisher`.

        Raises:
            UnfitEnvironmentError: The hub can't be reached or refuses it; the folder stays, and the message says how to
                upload it.
        """
        if not self.upload or self.repo is None:
            return ""
        try:
            hub = HfApi()
            hub.create_repo(self.repo, private=self.private, exist_ok=True)
            commit = hub.upload_folder(
                repo_id=self.repo, folder_path=folder, commit_message="Upload a packed model by qvgen"
            )
        except (HTTPError, OSError) as error:
            raise UnfitEnvironmentError(
                f"{folder} is written, and could not be uploaded to {self.repo}: {one_line(error)}; upload it with "
                f"`hf upload {self.repo} {folder} .`"
            ) from error
        return f"uploaded: {commit.commit_url}"


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
