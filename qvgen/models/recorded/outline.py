"""A pipeline without weights, whose own code runs with its parts' calls recorded.

    text encoder   answers with numbers that depend on the token and its place alone
    transformer    answers with noise of the right size; its arguments are kept by their names
    scheduler      steps to a pattern of zeros, ones and noise, by which the normalization of latents can be read off
    VAE            keeps what it is to decode, and the call is over

Transformer, VAE and text encoders are of their own classes, on the meta device: a pipeline that asks for the kind of a part
or for a value of its configuration gets the true answer. They say that they are where the pipeline is to compute.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from qvgen.models.recorded.signature import PipelineSignature

_SEED = 20_240_502
_KINDS_OF_TOKENS = 997


class _RecordedError(Exception):
    """Ends a pipeline's call whose recording is complete."""


@dataclass(kw_only=True)
class Recording:
    """The events of one call of a pipeline.

    Attributes:
        calls: Arguments of each call of the transformer, by name.
        outputs: The transformer's answers.
        steps: What the scheduler was given in each step: the prediction, the timestep and the sample.
        stepped: What the last step returned.
        decoded: What the VAE was to decode.
        texts: What ``encode_prompt`` returned.
        mu: Argument of ``set_timesteps`` of that name.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    steps: list[tuple[Tensor, Any, Tensor]] = field(default_factory=list)
    stepped: Tensor | None = None
    decoded: Tensor | None = None
    texts: tuple[Any, ...] = ()
    mu: float | None = None


class Outline:
    """A pipeline whose transformer and VAE have no weights.

    Args:
        signature: What is known of the pipeline.
        parts: All of its parts by name; the transformer and the VAE are on the meta device, tokenizers are real. A text
            encoder that is on the meta device is answered for.
        device: Where the pipeline is to make its tensors.
        dtype: Type of the transformer and VAE.
    """

    def __init__(
        self, signature: PipelineSignature, parts: Mapping[str, Any], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._signature, self._recording, self._until = signature, Recording(), "decode"
        self._generator = torch.Generator()
        self._device = device
        transformer, vae, scheduler = (parts[name] for name in ("transformer", "vae", "scheduler"))
        for part in (transformer, vae):
            _locate_(nn.Module.to(part, dtype), device=device)  # ModelMixin warns of weights, of which there are none
        self._forward = inspect.signature(type(transformer).forward)
        transformer.forward = self._answer
        vae.decode = self._decode
        scheduler.step = _signed_as(scheduler.step, self._step)
        self._set_timesteps = scheduler.set_timesteps
        scheduler.set_timesteps = _signed_as(scheduler.set_timesteps, self._watch_timesteps)
        for name in signature.text_encoders:
            encoder = parts[name]
            if encoder is not None and next(encoder.parameters()).device.type == "meta":
                encoder.forward = functools.partial(_answer_text, encoder.config)
                _locate_(encoder, device=device)
        self.pipeline = getattr(diffusers, signature.name)(**parts, **signature.options)
        self.pipeline.set_progress_bar_config(disable=True)
        self._encode_prompt = self.pipeline.encode_prompt
        self.pipeline.encode_prompt = self._encode

    def record(self, arguments: Mapping[str, Any], *, until: str) -> Recording:
        """Run the pipeline.

        Args:
            arguments: Arguments of its call.
            until: ``texts``, ``call`` or ``decode``: what ends it.

        Raises:
            RuntimeError: It ended by itself.
        """
        self._recording, self._until = Recording(), until
        self._generator.manual_seed(_SEED)
        try:
            self.pipeline(**arguments)
        except _RecordedError:
            return self._recording
        raise RuntimeError(f"a {self._signature.name} did not come to its {until}")

    def _encode(self, *arguments: Any, **named: Any) -> Any:
        found = self._encode_prompt(*arguments, **named)
        self._recording.texts = found if isinstance(found, tuple) else (found,)
        self._end("texts")
        return found

    def _answer(self, *arguments: Any, **named: Any) -> tuple[Tensor, ...]:
        """Stand in for the transformer's forward."""
        bound = self._forward.bind(None, *arguments, **named).arguments
        call = {name: value for name, value in bound.items() if name not in ("self", "kwargs")} | bound.get(
            "kwargs", {}
        )
        self._recording.calls.append(call)
        self._end("call")
        hidden = next(iter(call.values()))
        config = self.pipeline.transformer.config
        shape = list(hidden.shape)
        inputs = config.get("in_channels") or config.get("in_visual_dim") or shape[1]
        channel = 1 if shape[1] == inputs or shape[-1] != inputs else -1
        shape[channel] = config.get("out_channels") or config.get("out_visual_dim") or shape[channel]
        output = self._noise(shape).to(hidden)
        self._recording.outputs.append(output)
        return (output,)

    def _step(self, model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """Stand in for the scheduler's step."""
        self._recording.steps.append((model_output, timestep, sample))
        kind = torch.randint(0, 3, sample.shape, generator=self._generator)
        pattern = torch.where(kind == 2, self._noise(sample.shape), kind.float())
        self._recording.stepped = pattern.to(sample)
        return (self._recording.stepped,)

    def _decode(self, latents: Tensor, *_: Any, **__: Any) -> Any:
        self._recording.decoded = latents
        raise _RecordedError

    def _watch_timesteps(self, *arguments: Any, **named: Any) -> Any:
        self._recording.mu = named.get("mu")
        return self._set_timesteps(*arguments, **named)

    def _noise(self, shape: Any) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def _end(self, place: str) -> None:
        if place == self._until:
            raise _RecordedError


def _signed_as(method: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the signature of a method, which pipelines look at."""

    @functools.wraps(method)
    def answered(*arguments: Any, **named: Any) -> Any:
        return answer(*arguments, **named)

    return answered


def _locate_(module: nn.Module, *, device: torch.device) -> None:
    """Have a module on the meta device say that it is on another one, in the way of its own class."""
    kind = type(module)
    members = {"device": property(lambda _: device), "__module__": kind.__module__}
    module.__class__ = type(kind.__name__, (kind,), members)


def _answer_text(settings: Any, input_ids: Tensor, *_: Any, **__: Any) -> Any:
    """Stand in for a text encoder: hidden states [B, T, D] of the tokens and their places, the same in every call."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    sizes = settings.get_text_config()
    table = torch.randn(_KINDS_OF_TOKENS, sizes.hidden_size, generator=torch.Generator().manual_seed(_SEED))
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    hidden = table.to(input_ids.device)[(input_ids + 31 * places) % _KINDS_OF_TOKENS]
    states = (hidden,) * (sizes.num_hidden_layers + 1)
    return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden.mean(1), hidden_states=states)
