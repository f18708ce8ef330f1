"""The product of an attention module with 8-bit integers, in training and in a packed model (kernels/attention.md).

    softmax(q k^T c) v      q, k, v [B, H, tokens, D] as the module's own processor makes them

Every processor of diffusers makes q, k and v in its own way (norms, rotary embeddings, joined sequences, images beside text)
and hands them to torch's ``scaled_dot_product_attention``, some by diffusers' dispatcher. So the module's call is left as it
is, and that one function is taken over while it runs, by a mode of torch that sees calls of torch's functions. What is not
found can't be quantized: a processor that calls another kernel, or computes a softmax itself, raises at its first call.

Why not a processor of our own: there are over a hundred, their names, signatures and attributes are looked at by diffusers,
and ``set_attn_processor`` or a merge of projections would bring the old one back in silence.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from qvgen.layers.attention_form import AttentionForm, scaled_spec
from qvgen.layers.noise_band import NoiseBand
from qvgen_kernels.attention import AttentionSpec, AttentionTensors, attention

HIDDEN = -9000.0
"""A number that is added to a score and is not above this one hides the key: diffusers adds -10000, rounded in bfloat16."""

MAX_CLIP = 2.0
"""Upper bound of a learned factor of the largest magnitude; 1, where it starts, is the middle of its range."""

ATTENTION_OPERATOR = torch.ops.qvgen.attention.default
"""The operator that the product of an attention is one node of, in a graph or under a dispatch mode."""

_TORCH_ATTENTION = functional.scaled_dot_product_attention
_SOFTMAXES = frozenset({torch.softmax, torch.Tensor.softmax, functional.softmax, torch._softmax})


class AttentionCall(NamedTuple):
    """The arguments of one call of torch's ``scaled_dot_product_attention``, by torch's names and in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class AttentionProduct(nn.Module):
    """The product of one attention module, and a submodule of it.

    Args:
        form: Its form.
        noise_band: Shared with the quantized Linears of the model.
        name: The attention module's name in its model, for messages.
        kernel: ``auto``, or ``reference`` for the exact one in plain torch; all have the same bits.
    """

    def __init__(self, form: AttentionForm, *, noise_band: NoiseBand, name: str, kernel: str = "auto") -> None:
        super().__init__()
        self.form, self.noise_band, self.name, self.kernel = form, noise_band, name, kernel
        self.spec, self._has_read_a_mask = form.spec(), False

    def tables(self) -> tuple[Tensor, Tensor] | None:
        """Factors of the largest magnitude of queries and of keys, float32 [num_bands, H] each; None: there are none."""
        return None

    def forward(self, call: AttentionCall) -> Tensor:
        """The product for q [B * n, H, M, D] and k, v [B * n, H or fewer with enable_gqa, N, D], ordered by sample.

        Returns:
            [B * n, H, M, D] in q's dtype, or autocast's.

        Raises:
            ValueError: A dropout, a causal order, a first mask that adds what is neither 0 nor hides a key, other heads.
            RuntimeError: A later mask adds other numbers; on a GPU it is raised there, and no call waits for it.
        """
        if call.dropout_p or call.is_causal:
            raise ValueError(
                f"{self.name} calls attention with dropout_p={call.dropout_p} and is_causal={call.is_causal}, which 8-bit "
                f"attention does not have; {self._instead}"
            )
        query, key, value = _in_one_type(call)
        if call.enable_gqa and key.shape[1] != query.shape[1]:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        if query.ndim != 4 or (query.shape[1], query.shape[3]) != (self.form.heads, self.form.head_size):
            raise ValueError(
                f"{self.name} attends with queries {list(query.shape)}, not [batch, {self.form.heads}, tokens, "
                f"{self.form.head_size}]; {self._instead}"
            )
        mask = None if call.attn_mask is None else self._visible(call.attn_mask)
        spec = self.spec if call.scale is None else scaled_spec(self.form, call.scale)
        tables = self.tables()
        if tables is None:
            return attention(query, key, value, spec=spec, mask=mask, kernel=self.kernel)
        samples = 1 if self.noise_band.current is None else self.noise_band.current.numel()
        if query.shape[0] % samples:
            raise ValueError(
                f"{self.name} attends for {query.shape[0]} of {samples} samples at a time, and learned factors are of a "
                "sample's noise band; quantize without profile.attention.clips, or give it one sample at a time"
            )
        query_clip, key_clip = (self.noise_band.row_values(table, query).flatten() for table in tables)
        return _by_sample(query, key, value, mask=mask, spec=spec, clips=(query_clip, key_clip), kernel=self.kernel)

    @property
    def _instead(self) -> str:
        return f"leave it in floating point by profile.attention.exclude=['{self.name}']"

    def _visible(self, mask: Tensor) -> Tensor:
        """The mask of an SDPA call, of any shape that torch broadcasts to [B, H, M, N], as bool of four dimensions."""
        if mask.dtype is not torch.bool:
            shown = mask == 0
            is_either = (shown | (mask <= HIDDEN)).all()
            message = f"{self.name} adds numbers to scores that are neither 0 nor {HIDDEN:g} or less; {self._instead}"
            if torch.compiler.is_compiling() or type(mask) is not Tensor or mask.is_meta or self._has_read_a_mask:
                torch._assert_async(is_either, message)  # in a graph no value can be asked for; to ask is to wait
            elif not bool(is_either):
                raise ValueError(message)
            else:
                self._has_read_a_mask = True  # a processor makes the masks of all its calls in one way
            # One finite number for all keys of a query changes no softmax: it sees them all.
            mask = shown | (~shown.any(-1, keepdim=True) & mask.isfinite())
        return mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)

    def extra_repr(self) -> str:
        """Form for ``print(model)``."""
        return self.form.label


class FakeQuantAttention(AttentionProduct):
    """The product in training.

    Args:
        form: Its form.
        noise_band: Shared with the quantized Linears of the model.
        name: The attention module's name in its model.

    Attributes:
        query_clip: Parameter float32 [num_bands, H], logits: the factor is 2 sigmoid(query_clip) and starts at 1; or None.
        key_clip: Likewise of the keys.
    """

    query_clip: nn.Parameter | None
    key_clip: nn.Parameter | None

    def __init__(self, form: AttentionForm, *, noise_band: NoiseBand, name: str) -> None:
        super().__init__(form, noise_band=noise_band, name=name)
        self.query_clip = self.key_clip = None
        self.follow_bands_()

    def follow_bands_(self) -> None:
        """Have a row of factors for each noise band, all at 1 where their number is another one than before.

        A method that takes ranges from a table gives the model other bands than it was swapped with.
        """
        shape = (self.noise_band.num_bands, self.form.heads)
        if not self.form.clips or (self.query_clip is not None and self.query_clip.shape == shape):
            return
        device = None if self.query_clip is None else self.query_clip.device
        self.query_clip, self.key_clip = (nn.Parameter(torch.zeros(shape, device=device)) for _ in range(2))

    def tables(self) -> tuple[Tensor, Tensor] | None:
        """Factors in (0, 2), float32 [num_bands, H] each; training gathers from the tables that fold stores."""
        if self.query_clip is None or self.key_clip is None:
            return None
        return MAX_CLIP * self.query_clip.float().sigmoid(), MAX_CLIP * self.key_clip.float().sigmoid()


class PackedAttention(AttentionProduct):
    """The product in a packed model.

    Args:
        form: Its form.
        noise_band: Shared with the packed layers of the model.
        name: The attention module's name in its model.
        kernel: Backend of the model's packed layers: ``reference`` is taken, any other is one of theirs.
        device: Where the tables are made (``meta`` for shapes alone).

    Attributes:
        query_clip: buffer float32 [num_bands, H], factors in (0, 2); or None.
        key_clip: Likewise of the keys.
    """

    query_clip: Tensor | None
    key_clip: Tensor | None

    def __init__(
        self,
        form: AttentionForm,
        *,
        noise_band: NoiseBand,
        name: str,
        kernel: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            form, noise_band=noise_band, name=name, kernel="reference" if kernel == "reference" else "auto"
        )
        for table in ("query_clip", "key_clip"):
            ones = torch.ones(noise_band.num_bands, form.heads, device=device) if form.clips else None
            self.register_buffer(table, ones)

    @classmethod
    @torch.no_grad()
    def from_fake_quant(cls, trained: FakeQuantAttention, *, kernel: str = "auto") -> Self:
        """Pack the factors that an attention was trained with."""
        tables = trained.tables()
        device = None if tables is None else tables[0].device
        packed = cls(trained.form, noise_band=trained.noise_band, name=trained.name, kernel=kernel, device=device)
        if tables is not None:
            packed.query_clip, packed.key_clip = tables
        return packed

    def tables(self) -> tuple[Tensor, Tensor] | None:
        """Factors in (0, 2), float32 [num_bands, H] each."""
        return None if self.query_clip is None or self.key_clip is None else (self.query_clip, self.key_clip)

    def value_ranges(self) -> dict[str, tuple[float, float]]:
        """Least and largest value of each tensor."""
        return {"query_clip": (0.0, MAX_CLIP), "key_clip": (0.0, MAX_CLIP)} if self.form.clips else {}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # A factor in half precision would no longer be the one that was trained: only the device may change.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self


class TakesAttention(TorchFunctionMode):
    """While it is on, torch's attention is the product that is given, and no other softmax is computed.

    Args:
        product: The product.
        taken: One entry more for every call that was taken over. (A list, and no count of its own, because torch.compile
            traces it.)
    """

    def __init__(self, product: AttentionProduct, taken: list[bool]) -> None:
        super().__init__()
        self.product = product
        self.taken = taken

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over torch's attention, refuse a softmax, and leave any other function of torch as it is."""
        del types
        if func is _TORCH_ATTENTION:
            self.taken.append(True)
            found: Tensor = self.product(AttentionCall(*args, **(kwargs or {})))
            return found
        if func in _SOFTMAXES:
            raise ValueError(
                f"{self.product.name} computes a softmax of its own, not torch's attention; {self.product._instead}"
            )
        if func is torch.Tensor.unflatten:  # torch.compile can't trace it by its class, which calls super()
            return args[0].unflatten(*args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _in_one_type(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in the type to which autocast casts the arguments of torch's attention."""
    kind = call.query.device.type
    if not torch.is_autocast_enabled(kind):
        return call.query, call.key, call.value
    dtype = torch.get_autocast_dtype(kind)
    return call.query.to(dtype), call.key.to(dtype), call.value.to(dtype)


def _by_sample(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    spec: AttentionSpec,
    clips: tuple[Tensor, Tensor],
    kernel: str,
) -> Tensor:
    """The product with factors [B * H] of every sample and head: heads of a batch are like heads of one sample.

    A mask that differs between samples or heads is repeated for all of them.
    """
    samples, heads = query.shape[:2]
    if mask is not None and (mask.shape[0] > 1 or mask.shape[1] > 1):
        mask = mask.expand(samples, heads, -1, -1).flatten(0, 1).unsqueeze(0)
    q, k, v = (tensor.flatten(0, 1).unsqueeze(0) for tensor in (query, key, value))
    y = attention(q, k, v, spec=spec, mask=mask, tensors=AttentionTensors(*clips), kernel=kernel)
    return y.reshape(query.shape)
