"""Attention in 8 bits without training, with every method of conf/init: chosen forms, the same Linears, packed as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qvgen.config.leaves import leaf_names
from qvgen.layers.attention_swap import packed_attentions, quantized_attentions
from qvgen.layers.swap import folded_copy, forms
from qvgen.training.start.file import load_start, save_start
from qvgen.training.start.student import set_up_student_
from qvgen.verbs._parts import ptq_method, sampled_teacher, student_design
from tests.parts import prepared
from tests.runs import shallow, train_config
from tests.verbs.test_ptq import QUICK

OPEN = "profile.attention={{kind:{},smooth_key:auto,rotation:auto}}"
KEYS = (
    "calibration.videos=1", "calibration.steps=2", "method=ptq", "bits=w4a6",
    "model.include=['*.attn1.to_q','*.attn2.to_k','*.ffn.net.2']", "model.num_inference_steps=2", *shallow(1),
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    """The full-precision model, which no method changes."""
    return train_config(*KEYS).model.load_teacher().eval()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all: forms of attention are chosen once."""
    return tmp_path_factory.mktemp("cache")


def started(teacher: nn.Module, cache: Path, *keys: str) -> nn.Module:
    config = train_config(*KEYS, f"calibration.cache={cache}", *keys)
    student, _ = prepared(config)
    sampled = sampled_teacher(config, teacher, encode=config.model.encode)
    set_up_student_(student, design=student_design(config), ptq=ptq_method(config), teacher=sampled)
    return student.eval()


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "int8") for name in leaf_names("init")), ("rtn", "int8_qk"), ("svdquant", "int8_qk")]
)
@torch.no_grad()
def test_attention_works_without_training(
    name: str, kind: str, teacher: nn.Module, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    init = (f"init={name}", *QUICK.get(name, ()), *(("init.other_steps=interpolate",) if name == "static" else ()))
    attention = OPEN.format(kind)
    plain, student = started(teacher, cache, *init), started(teacher, cache, *init, attention)
    assert list(quantized_attentions(student)) == ["blocks.0.attn1", "blocks.0.attn2"]
    assert sum(message.startswith("attention: 1 videos") for message in caplog.messages) <= 1  # the first method's
    assert "attention: keys smoothed in" in caplog.text
    state = student.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    family = train_config(*KEYS).model
    inputs = torch.randn(2, *family.sample_shape, generator=torch.Generator().manual_seed(0))
    condition = family.encode(family.prompts[:2])
    timesteps = torch.tensor([900.0, 100.0])
    packed = folded_copy(student)
    found = [family.predict(model, inputs, timesteps, condition) for model in (student, packed, plain, teacher)]
    assert torch.equal(found[0], found[1])
    assert len(packed_attentions(packed)) == 2
    assert not torch.equal(found[0], found[2])
    if name == "rtn":  # what a run, and fold, go on from
        save_start(student, tmp_path)
        again, _ = prepared(train_config(*KEYS, *init, attention))
        load_start(again, tmp_path)
        assert forms(again) == forms(student)
        assert any(product.form.rotation for product in quantized_attentions(again).values())
        assert torch.equal(family.predict(again.eval(), inputs, timesteps, condition), found[0])
    lost = [float((one - found[3]).norm() / found[3].norm()) for one in found]
    assert 0 < lost[0] < lost[2] + 0.05  # attention in 8 bits adds some hundredths at most
