"""What every PTQ method is to the rest: something that sets a fake-quantized layer up."""

from __future__ import annotations

from typing import Protocol

from qvgen.layers.fake_quant_linear import FakeQuantLinear


class Initializer(Protocol):
    """Protocol of the leaves of this package; built from ``conf/init/*.yaml`` by ``_target_``."""

    def initialize_(self, layer: FakeQuantLinear) -> None:
        """Set the scales and zero points of a layer, in place, from its own weight.

        Args:
            layer: Its master weight [N, K] is final (rotated if the profile rotates); Phi is started afterwards.
        """
