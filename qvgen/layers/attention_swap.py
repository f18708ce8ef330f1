"""Finding a model's attention modules, and having them compute with 8-bit integers.

An attention module is one of diffusers', with a processor and projections of queries, keys and values, or any other that says
its heads: ``head_shape``, their number and the elements of each (:mod:`qvgen.models.stdit3.layers`). It stays the module that
it is, of a class that derives from its own, with one submodule more (``attention_product``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache, wraps
from typing import Any

from torch import nn

from qvgen.config.plain_json import mapping, text
from qvgen.layers.attention_form import AttentionForm
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.quant_attention import AttentionProduct, FakeQuantAttention, PackedAttention, TakesAttention
from qvgen.quant.attention_profile import AttentionProfile

PRODUCT = "attention_product"
"""Name of the submodule of an attention that computes the product."""

OWN_HEADS = "head_shape"
"""Attribute of an attention module that is not of diffusers' form: (heads of the queries, elements of each)."""

_PROJECTIONS = ("to_q", "to_qkv", "to_kv")


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """A model's attention modules by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if _is_attention(module)}


def quantized_attentions(model: nn.Module) -> dict[str, FakeQuantAttention]:
    """The products of attentions in training, by the name of their attention module."""
    return {name: found for name, found in _products(model).items() if isinstance(found, FakeQuantAttention)}


def packed_attentions(model: nn.Module) -> dict[str, PackedAttention]:
    """The packed products of attentions, by the name of their attention module."""
    return {name: found for name, found in _products(model).items() if isinstance(found, PackedAttention)}


def _products(model: nn.Module) -> dict[str, AttentionProduct]:
    end = f".{PRODUCT}"
    found = {name: module for name, module in model.named_modules() if isinstance(module, AttentionProduct)}
    return {name.removesuffix(end): module for name, module in found.items()}


def attention_forms(
    model: nn.Module, profile: AttentionProfile | None, *, quantized: Iterable[str]
) -> dict[str, AttentionForm]:
    """The attention modules that a profile quantizes, by name, and their forms; changes nothing.

    Args:
        model: Its attentions have full-precision projections, or quantized ones.
        profile: None: no attention is quantized.
        quantized: Names of the Linears that are quantized.

    Raises:
        ValueError: A pattern matches no attention, nothing is left to quantize, or an attention that can't be.
    """
    if profile is None:
        return {}
    modules = attention_modules(model)
    for key, patterns in (("include", profile.include), ("exclude", profile.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in modules):
                raise ValueError(
                    f"profile.attention.{key} pattern {pattern!r} matches none of the {len(modules)} attentions of "
                    f"{type(model).__name__} (the first is {next(iter(modules), 'none')!r}); correct or remove it"
                )
    linears = list(quantized)

    def chosen(name: str) -> bool:
        if any(fnmatchcase(name, pattern) for pattern in profile.exclude):
            return False
        if profile.include:
            return any(fnmatchcase(name, pattern) for pattern in profile.include)
        return any(linear.startswith(f"{name}.") for linear in linears)

    names = [name for name in modules if chosen(name)]
    if not modules:
        raise ValueError(
            f"profile.attention={profile.kind} quantizes attentions that are modules of diffusers' form or have a "
            f"head_shape, and {type(model).__name__} has none; write profile.attention=none"
        )
    if not names:
        raise ValueError(
            f"profile.attention={profile.kind} quantizes none of the {len(modules)} attentions of {type(model).__name__}: "
            "none has a quantized Linear, or all are excluded; name them by profile.attention.include, or write "
            "profile.attention=none"
        )
    return {name: _form(modules[name], profile, name=name) for name in names}


def _form(module: nn.Module, profile: AttentionProfile, *, name: str) -> AttentionForm:
    _check_class(module, name=name)
    heads, size = head_sizes(module, name=name)
    try:
        return AttentionForm.of(profile, heads=heads, head_size=size)
    except ValueError as error:
        raise ValueError(
            f"{name}: {error}, or leave it in floating point by profile.attention.exclude=['{name}']"
        ) from error


def head_sizes(module: nn.Module, *, name: str) -> tuple[int, int]:
    """Heads of an attention module's queries, and the elements of each.

    Raises:
        ValueError: It does not say so.
    """
    if (own := getattr(module, OWN_HEADS, None)) is not None:
        return int(own[0]), int(own[1])
    heads, projection = getattr(module, "heads", None), getattr(module, "to_q", None)
    columns = getattr(projection, "out_features", None)
    if columns is None and (projection := getattr(module, "to_qkv", None)) is not None:
        columns = projection.out_features // 3
    if not isinstance(heads, int) or heads < 1 or not isinstance(columns, int) or columns % heads:
        raise ValueError(
            f"{name} of class {type(module).__name__} has no heads by which to_q can be divided; leave it in floating point "
            f"by profile.attention.exclude=['{name}']"
        )
    return heads, columns // heads


def swap_attentions_(model: nn.Module, forms: Mapping[str, AttentionForm], *, noise_band: NoiseBand) -> None:
    """Let the named attentions compute with 8-bit integers in training, their factors at 1."""
    for name, form in forms.items():
        attention = model.get_submodule(name)
        device = next((parameter.device for parameter in attention.parameters()), None)
        product = FakeQuantAttention(form, noise_band=noise_band, name=name)
        put_product_(attention, product if device is None else product.to(device))


def put_product_(attention: nn.Module, product: AttentionProduct) -> None:
    """Give an attention module its product.

    Raises:
        ValueError: It is no attention module, has a product already, or something stands in place of its forward.
    """
    _check_class(attention, name=product.name)
    attention.__class__ = _class_of(type(attention))
    attention.add_module(PRODUCT, product)


def pack_attentions(model: nn.Module, *, kernel: str) -> dict[str, PackedAttention]:
    """The packed products of a model's attentions in training, by the names of these products."""
    packed = {
        name: PackedAttention.from_fake_quant(one, kernel=kernel) for name, one in quantized_attentions(model).items()
    }
    return {f"{name}.{PRODUCT}": product for name, product in packed.items()}


def follow_bands_(model: nn.Module) -> None:
    """Give attentions in training the noise bands that the model has now."""
    for product in quantized_attentions(model).values():
        product.follow_bands_()


def attention_records(model: nn.Module) -> list[dict[str, Any]]:
    """Names and forms of the attentions in training, in plain values."""
    return [{"name": name, **product.form.to_dict()} for name, product in quantized_attentions(model).items()]


def restore_attentions_(model: nn.Module, stored: Sequence[Any]) -> None:
    """Bring a prepared model's attentions to stored :func:`attention_records`: their forms, and which are in 8 bits at all.

    Raises:
        ValueError: The model has not quantized one of these, or with other heads; KeyError or TypeError: malformed.
    """
    forms = {}
    for record in stored:
        values = dict(mapping(record, "an attention"))
        forms[text(values.pop("name"), "name of an attention")] = AttentionForm.from_dict(values)
    own = quantized_attentions(model)
    if bool(forms) != bool(own) or not forms.keys() <= own.keys():  # a mixed-precision method leaves one in 8 bits
        raise ValueError(
            f"{len(forms)} stored attentions are not the {len(own)} quantized ones of the model, nor some of them"
        )
    use_attention_forms_(model, forms)


def use_attention_forms_(model: nn.Module, forms: Mapping[str, AttentionForm]) -> None:
    """Give attentions in training these forms; one that is not among them computes in floating point again.

    Raises:
        ValueError: A form with other heads than the attention's, or with factors where it has none.
    """
    for name, product in quantized_attentions(model).items():
        if name in forms:
            form = forms[name]
            if replace(form, smooth_key=product.form.smooth_key, rotation=product.form.rotation) != product.form:
                raise ValueError(f"the attention {name} is {product.form.label}, which can't become {form.label}")
            product.form, product.spec = form, form.spec()
            continue
        attention = model.get_submodule(name)
        attention.__class__ = type(attention).__bases__[0]
        delattr(attention, PRODUCT)


def _is_attention(module: nn.Module) -> bool:
    has_projections = any(hasattr(module, name) for name in _PROJECTIONS)
    return hasattr(module, OWN_HEADS) or (hasattr(module, "processor") and has_projections)


def _check_class(module: nn.Module, *, name: str) -> None:
    if not _is_attention(module):
        raise ValueError(
            f"{name} is {type(module).__name__}, no attention with a processor and projections, or a head_shape"
        )
    if hasattr(module, PRODUCT):
        raise ValueError(f"{name} is quantized already; prepare a full-precision model")
    if "forward" in vars(module):
        raise ValueError(f"{name} has hooks in place of its forward; quantize the model before hooks are put on it")


def quantized_call(
    attention: Any, product: AttentionProduct, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The call ``plain(*args, **kwargs)`` of an attention module, whose calls of torch's attention are its product's.

    Raises:
        ValueError: It calls another attention, or shares its sequence out between processes.
    """
    caller = getattr(attention, "processor", attention)
    if getattr(caller, "_parallel_config", None) is not None:
        raise ValueError(
            f"{product.name} shares its sequence out between processes, which 8-bit attention can't; write "
            "profile.attention=none or strategy.context_parallel=1"
        )
    taken: list[bool] = []
    with TakesAttention(product, taken):
        found = plain(*args, **kwargs)
    if not taken:
        raise ValueError(
            f"{product.name} did not call torch's attention in its {type(caller).__name__}, so nothing was quantized; "
            f"use diffusers' attention backend native, or {product._instead}"
        )
    return found


@cache
def _class_of(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of an attention whose product is quantized: its own class in all but the product, name included."""
    plain = kind.forward

    @wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return quantized_call(self, self.attention_product, plain, (self, *args), kwargs)

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        del protocol
        return _empty, (kind,), self.__dict__

    own = {"forward": forward, "__reduce_ex__": reduce, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**own, "__qualname__": kind.__qualname__})


def _empty(kind: type[nn.Module]) -> nn.Module:
    """An attention without anything in it, for copies and pickles, which fill it."""
    made = _class_of(kind)
    return made.__new__(made)
