"""What a training method is to the rest of the library: everything that tells one from another is asked of it.

    trains           the student, a full-precision transformer, an autoencoder, or nothing
    phi_ranks        the ranks of the low-rank helper beside each layer's weight, () for a method without it
    prepare_         what else the method adds to a prepared student; start_ gives it its first values, once a PTQ method has
                     chosen where training starts, and finish_ takes it away again before folding
    compares         whether the loss sees predictions, or the noise that they imply
    loss             of the student's prediction, from the teacher's or the data's target
    parameter_groups what the optimizer trains, at which rates
    schedule         what changes between optimizer steps

A leaf is a frozen dataclass that derives from :class:`Method` and overrides what is different; its configuration is a file of
``conf/method``. Nothing else has to know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvgen.config.schema.sections import OptimConfig, PhiConfig
from qvgen.config.schema.value_range import Range
from qvgen.methods.parameter_group import parameter_groups

Trains = Literal["student", "transformer", "autoencoder", "nothing"]
"""``student``: a transformer with fake-quantized Linears, which is folded and packed; ``nothing``: the same without training
(``qvgen ptq``); ``transformer``: one in full precision; ``autoencoder``: a model's VAE."""

Compared = Literal["prediction", "noise"]
"""``prediction``: the model's output, for example a velocity; ``noise``: the noise in the model's input that it implies, by
the objective's ``noise`` (:mod:`qvgen.models.objectives`)."""

CAPTION_DROPOUT = Range("[0, 1]", write="0.05")
CaptionDropout = Annotated[float, CAPTION_DROPOUT]
"""A probability; the papers use 0.05 to 0.1."""


@dataclass(frozen=True, kw_only=True)
class OdeWindow:
    """How a teacher goes from a few-step student's timestep to the next one.

    Attributes:
        substeps: Euler steps.
        guidance_scale: Classifier-free guidance; 1 is none.
    """

    substeps: int
    guidance_scale: float


class Schedule(Protocol):
    """What a method changes between optimizer steps.

    Attributes:
        columns: Names of the numbers that :meth:`metrics` gives, ``group/name``; columns of metrics.csv.
        phases: (rank of Phi, first optimizer step with it), for the plan of a run; empty without Phi.
    """

    columns: tuple[str, ...]

    @property
    def phases(self) -> tuple[tuple[int, int], ...]:
        """Phases of Phi."""

    def apply_(self, student: nn.Module, optimizer: torch.optim.Optimizer | None, *, step: int) -> None:
        """Bring a student to its state of an optimizer step, in place; the first step is 0, the last plus 1 is the end.

        It has to be a pure function of the step: a resumed run calls it with the step that it goes on with, and any step may
        be applied twice. Parameters are never replaced, since DDP and FSDP hold them.

        Args:
            student: The model that is trained, sharded or whole.
            optimizer: Where moments of what was rewritten are to be forgotten; None outside of training.
            step: Optimizer step.
        """

    def metrics(self, step: int) -> Mapping[str, float | int]:
        """Numbers of an optimizer step, by column."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of the leaves of this package; built from ``conf/method/*.yaml`` by ``_target_``.

    Attributes:
        trains: See :data:`Trains`.
        compares: What the three tensors of :meth:`loss` are, see :data:`Compared`.
        caption_dropout: Probability that a training sample loses its caption.
        share_activations: True: layers that read the same input (q, k and v) learn one range of it, so that the packed model
            quantizes it once (:mod:`qvgen.layers.shared_input`); False: each layer learns its own.
    """

    trains: ClassVar[Trains] = "student"
    compares: ClassVar[Compared] = "prediction"
    caption_dropout: CaptionDropout = 0.0
    share_activations: bool = False

    def __post_init__(self) -> None:
        CAPTION_DROPOUT.check(self.caption_dropout, key="method.caption_dropout")

    @property
    def quantizes(self) -> bool:
        """Whether the Linears are fake-quantized, and the result is folded and packed."""
        return self.trains in ("student", "nothing")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss needs the prediction of the frozen full-precision model."""
        return False

    @property
    def taught_by(self) -> str | None:
        """The model whose weights a transformer in full precision starts from and is taught by; None: random ones."""
        return None

    @property
    def window(self) -> OdeWindow | None:
        """The teacher's way over a step of a few-step student, whose mean velocity is the target; None: the data's own."""
        return None

    def phi_ranks(self, phi: PhiConfig) -> tuple[int, ...]:
        """Rank of the helper Phi in each phase, falling; () for a method without it."""
        del phi
        return ()

    def prepare_(self, student: nn.Module) -> None:
        """Add to a prepared student, in place, what the method trains besides the layers' own parameters.

        It is called wherever a student is built, also on the ``meta`` device and before a checkpoint is loaded, and must
        give the same parameters each time.
        """

    def start_(self, student: nn.Module, *, seed: int) -> None:
        """Give what :meth:`prepare_` added its first values, in place, after a PTQ method has set up the student's layers.

        Args:
            student: Whole, on the device that it was set up on; what it holds afterwards is where training starts.
            seed: The run's.
        """

    def finish_(self, student: nn.Module) -> None:
        """Bring a trained student, in place, to layers that can be folded: merge or remove what :meth:`prepare_` added."""

    def loss(
        self,
        prediction: Float[Tensor, ...],
        *,
        teacher: Float[Tensor, ...] | None,
        target: Float[Tensor, ...],
        timestep: Float[Tensor, " B"],
    ) -> Float[Tensor, ""]:
        """Loss of a micro-batch, the mean over its samples: here mean |prediction - wanted|^2.

        Where noise levels are weighted (``loss.weighting``) it is asked for each sample by itself.

        Args:
            prediction: The student's, float32 [B, ...]; the other tensors are of its shape.
            teacher: The full-precision model's for the same input, without gradient; None unless ``needs_teacher``.
            target: The data's own target, for example the flow velocity; all three as ``compares`` says.
            timestep: Of each sample, in [0, 1000).

        Returns:
            float32 [].
        """
        del timestep
        wanted = target if teacher is None else teacher
        return (prediction.float() - wanted.float()).square().mean()

    def parameter_groups(self, model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
        """Groups for the optimizer; see :func:`qvgen.methods.parameter_group.parameter_groups`."""
        return parameter_groups(model, optim)

    def schedule(self, phi: PhiConfig, *, num_steps: int) -> Schedule | None:
        """What changes between optimizer steps; None for a method that changes nothing.

        Raises:
            ValueError: It does not fit into so many steps.
        """
        del phi, num_steps
        return None
