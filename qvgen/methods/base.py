"""What a training method is to the rest of the library."""

from __future__ import annotations

from typing import Literal, Protocol

Target = Literal["teacher", "data"]


class Method(Protocol):
    """Protocol of the leaves of this package; built from ``conf/method/*.yaml`` by ``_target_``.

    Attributes:
        name: As in reports.
        quantizes: Whether the student's Linears are fake-quantized.
        uses_phi: Whether they carry the low-rank helper.
        target: What the student's prediction is compared with: the frozen full-precision teacher's prediction,
            or the data's own target (the flow velocity).
        caption_dropout: Probability in [0, 1] that a training sample loses its caption.
        share_activations: Whether layers that read the same input learn one range of it together
            (:mod:`qvgen.layers.shared_input`).
    """

    @property
    def name(self) -> str:
        """Short name."""

    @property
    def quantizes(self) -> bool:
        """Quantization-aware?"""

    @property
    def uses_phi(self) -> bool:
        """With Phi?"""

    @property
    def target(self) -> Target:
        """Target of the loss."""

    @property
    def caption_dropout(self) -> float:
        """Share of samples without caption."""

    @property
    def share_activations(self) -> bool:
        """One activation quantizer for q, k and v?"""


def check_dropout(value: float) -> None:
    """Raise ValueError unless a caption dropout is a probability."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"method.caption_dropout={value} is outside [0, 1]; the papers use 0.05 to 0.1")
