"""The design of a student: everything that decides its layers, parameters and buffers, whatever numbers are in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qvgen.config.defaults import load_section
from qvgen.config.schema.sections import ActivationSwitchConfig, PhiConfig
from qvgen.methods.base import Method, Schedule
from qvgen.quant.grid import Profile


def _default_phi() -> PhiConfig:
    phi: PhiConfig = load_section("phi")
    return phi


@dataclass(frozen=True, kw_only=True)
class StudentDesign:
    """The layers of a student.

    A student of the same family and design has the same parameters and buffers on every device and in every process, so that
    checkpoints and shares of one fit another.

    Attributes:
        profile: Grids and rotation of the quantized layers; without effect for a method that does not quantize.
        method: The training method, which may add to the layers.
        phi: The low-rank helper and its phases, for a method that has one; by default that of conf/train.yaml.
        activation_switch: A policy that changes activation widths while a video is sampled; None, or one without widths: the
            profile's width counts for all steps.
        zero_point_gradient: ``through`` or ``stop``; see ``OptimConfig``.

    Raises:
        ValueError: A gradient that stops at a zero point which the profile's activations don't have.
    """

    profile: Profile
    method: Method
    phi: PhiConfig = field(default_factory=_default_phi)
    activation_switch: ActivationSwitchConfig | None = None
    zero_point_gradient: Literal["through", "stop"] = "through"

    def __post_init__(self) -> None:
        if self.zero_point_gradient != "through" and self.profile.activation.symmetric:
            raise ValueError(
                f"optim.zero_point_gradient={self.zero_point_gradient} says nothing with profile={self.profile.name}, whose "
                "activations have no zero point; leave it out"
            )

    @property
    def phi_rank(self) -> int:
        """Rank of Phi at the start; 0 for a method without it."""
        return max(self.method.phi_ranks(self.phi), default=0)

    @property
    def phi_kept_rank(self) -> int:
        """Rank of Phi at the end of the whole training, where it stays in the packed layers as a branch; 0: it does not."""
        return min(self.method.phi_ranks(self.phi), default=0) if self.phi.keep else 0

    @property
    def phi_keep(self) -> bool:
        """Whether Phi stays."""
        return self.phi_kept_rank > 0

    @property
    def switch_widths(self) -> tuple[int, ...] | None:
        """The two activation widths that a policy chooses from; None where there is none."""
        return None if self.activation_switch is None else self.activation_switch.widths

    def schedule(self, num_steps: int) -> Schedule | None:
        """What the method changes between ``num_steps`` optimizer steps; None for one that changes nothing.

        Raises:
            ValueError: It does not fit into so many steps.
        """
        return self.method.schedule(self.phi, num_steps=num_steps)
