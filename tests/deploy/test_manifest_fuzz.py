"""Manifests with a nasty value in every place: each loads as the one before did, or is a ValueError of one line, at once.

The manifest of a real packed directory is walked, and each of its values, keys and lists is replaced in turn; layers are
alike, so one of them stands for all. Time and memory are bounded in a process of its own: its address space is limited, so
that whoever allocates what a number asks for ends in a MemoryError, which is no ValueError. Some of them are given to
diffusers' from_pretrained too, which must refuse and accept the same.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import WanTransformer3DModel

import qvgen.deploy.quantizer  # noqa: F401 - before the address space is limited
from qvgen.cli import BAD_INPUT, main
from qvgen.config.build import build
from qvgen.config.compose import compose_plain
from qvgen.config.plain_json import MAX_BYTES, MAX_DEPTH, parse_json
from qvgen.deploy.checkpoint import check_packed
from qvgen.deploy.manifest import read_manifest
from qvgen.verbs._packed_family import load_family

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 7, 64, 65, 2**16, 2**31, 2**62, -(2**63), 0.0, -0.5, 1.5, 1e300, 1e-300, "", "3", "x" * 300,
    "a\nb", "\x1b[2J", "../x", [], [[]], [0, 0], [-1, 2**62], {}, {"a": 1}, [None] * 3,
]  # fmt: skip
TEXTS = [
    "NaN", "-Infinity", "1e999", "9" * 30, "9" * 5000, "[" * 100 + "]" * 100, '{"a": 1, "a": 2}', '"\\ud800"',
]  # fmt: skip
"""JSON that no Python value is written as."""
FREE = {"base.name", "base.revision", "base.arguments", "training", "profile", "weight_error"}
"""Places whose values are a person's or another program's; whatever has their type is accepted, so that few are tried."""


def is_free(path: tuple[Any, ...]) -> bool:
    return bool(
        FREE & {".".join(map(str, path[:2])), str(path[0]), *(str(path[2]) for _ in path[2:3] if path[0] == "layers")}
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a manifest; of its layers one in a block."""
    if path:
        yield path
    if isinstance(value, dict) and not (path and is_free(path)):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in (8,) if path == ("layers",) else range(min(len(value), 2)):
            yield from places(value[index], (*path, index))


def changed(manifest: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy with another value in one place."""
    copy: Any = json.loads(json.dumps(manifest))
    parent = copy
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return dict(copy)


def without(manifest: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """A copy without one key or entry."""
    copy: Any = json.loads(json.dumps(manifest))
    parent = copy
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    return dict(copy)


def variants(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what was done, text of the manifest)."""
    marker = "@@here@@"
    for index, path in enumerate(places(manifest)):
        name = ".".join(map(str, path))
        for value in NASTY[index % 6 :: 12 if is_free(path) else 6]:  # each of them in every sixth place
            yield f"{name}={value!r:.60}", json.dumps(changed(manifest, path, value))
        for text in TEXTS[index % 4 :: 4]:  # refused before anyone asks for the place
            yield f"{name}={text:.20}", json.dumps(changed(manifest, path, marker)).replace(f'"{marker}"', text)
        yield f"without {name}", json.dumps(without(manifest, path))


def verdict(folder: Path, text: str) -> str:
    """Empty if the directory is whole, else the one line that says why not; any other error passes."""
    (folder / "manifest.json").write_text(text)
    try:
        check_packed(folder)
    except ValueError as error:
        return str(error)
    return ""


def diffusers_verdict(folder: Path, text: str) -> str:
    """The same of diffusers' loader, which finds the manifest in config.json, without what stands elsewhere in that file."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": "@@here@@"}
    described = f'{{"quant_method": "qvgen", "manifest": {text}}}'
    file.write_text(json.dumps(config).replace('"@@here@@"', described))
    try:
        WanTransformer3DModel.from_pretrained(folder)
    except ValueError as error:
        return str(error)
    finally:
        file.write_text(json.dumps(config))
    return ""


def try_numbers(folder: Path, text: str, *, config: str) -> str:
    """What diffusers' loader says of a config.json with the arguments of a manifest; any other error passes."""
    arguments = json.loads(text)["base"]["config"]
    changed_config = json.loads(config) | (arguments if isinstance(arguments, dict) else {})
    (folder / "config.json").write_text(json.dumps(changed_config))
    try:
        WanTransformer3DModel.from_pretrained(folder)
    except ValueError as error:
        return str(error)
    finally:
        (folder / "config.json").write_text(config)
    return ""


def main_program(folder: Path) -> None:
    """Try every variant; print what is wrong with a verdict."""
    import resource
    import warnings

    warnings.simplefilter("error")
    manifest, config = json.loads((folder / "manifest.json").read_text()), (folder / "config.json").read_text()
    assert verdict(folder, json.dumps(manifest)) == ""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
    count = 0
    for what, text in variants(manifest):
        count += 1
        message = verdict(folder, text)
        if message and (len(message.splitlines()) != 1 or str(folder) not in message):
            sys.stdout.write(f"{what}: {message}\n")
        if not message and (wrong := accepted_wrongly(json.loads(text), manifest)):
            sys.stdout.write(f"{what}: accepted with {wrong}\n")
        if what.startswith("base.config.") and "@@" not in text and not count % 3 and is_plain(text):
            said = try_numbers(folder, text, config=config)
            if len(said.splitlines()) > 1:
                sys.stdout.write(f"{what} in config.json: {said}\n")
        if count % 12 or what.removeprefix("without ").startswith(("base.config", "sha256")):
            continue
        by_diffusers = diffusers_verdict(folder, text)
        if not message and by_diffusers:
            sys.stdout.write(f"{what}: refused by diffusers alone: {by_diffusers}\n")
        if message and not by_diffusers:
            sys.stdout.write(f"{what}: accepted by diffusers alone\n")
    sys.stdout.write(f"tried {count}\n")


def is_plain(text: str) -> bool:
    """Whether a manifest is JSON that this library reads."""
    try:
        parse_json(text.encode(), source="manifest.json")
    except ValueError:
        return False
    return True


def accepted_wrongly(given: Any, right: Any, path: tuple[Any, ...] = ()) -> str:
    """The first place where an accepted manifest has a value of another type than the right one; empty: none."""
    if path and is_free(path):
        return ""
    if isinstance(right, dict):
        return next(
            (w for key in right if key in given and (w := accepted_wrongly(given[key], right[key], (*path, key)))), ""
        )
    if isinstance(right, list):
        pairs = enumerate(zip(given, right, strict=False))
        return next((w for index, pair in pairs if (w := accepted_wrongly(*pair, (*path, index)))), "")
    both = {type(given), type(right)}
    return "" if len(both) == 1 or both == {int, float} or type(None) in both else f"{path}={given!r}"


@pytest.fixture
def packed(packed_block: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed_block, tmp_path / "packed"))


def test_every_value_of_a_manifest_may_be_anything(packed: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.deploy.test_manifest_fuzz", str(packed)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    *wrong, last = done.stdout.splitlines() or [""]
    assert done.returncode == 0, done.stderr[-3000:]
    assert wrong == []
    assert int(last.removeprefix("tried ")) > 400


def test_deep_large_and_doubled_manifests_are_refused(packed: Path) -> None:
    whole = (packed / "manifest.json").read_text()
    cases = {
        "[" * 100_000: "nested more than",
        '{"a":' * 5000 + "1" + "}" * 5000: "nested more than",
        whole.replace('"version": 1,', '"version": 1, "version": 1,'): "the key 'version' is there twice",
        whole + " " * MAX_BYTES: f"is larger than {MAX_BYTES} bytes",
        whole.replace('"bits": 3', '"bits": NaN', 1): "NaN is no number of JSON",
        whole.replace('"bits": 3', '"bits": 1e400', 1): "the number 1e400 is not finite",
        whole.replace('"bits": 3', f'"bits": {"1" * 5000}', 1): "is longer than 64 bits",
    }
    for text, message in cases.items():
        (packed / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            read_manifest(packed)
        assert len(str(caught.value).splitlines()) == 1
    deepest: Any = 1
    for _ in range(MAX_DEPTH):
        deepest = [deepest]
    assert parse_json(json.dumps(deepest).encode(), source="memory") == deepest
    with pytest.raises(ValueError, match="nested more than"):
        parse_json(json.dumps([deepest]).encode(), source="memory")


@pytest.mark.parametrize("verb", ["inspect", "generate"])
def test_the_verbs_end_in_one_line(verb: str, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads((packed / "manifest.json").read_text())
    cases: list[dict[str, Any]] = [
        changed(whole, ("base", "config", "num_layers"), 2**31),
        changed(whole, ("base", "arguments"), []),
        changed(whole, ("layers", 0, "rotation"), 2**62),
    ]
    for content in cases:
        (packed / "manifest.json").write_text(json.dumps(content))
        assert (
            main([verb, f"packed={packed}", *([f"out={tmp_path / 'out'}"] if verb == "generate" else [])]) == BAD_INPUT
        )
        (line,) = capsys.readouterr().err.splitlines()
        assert str(packed) in line
    assert not (tmp_path / "out").exists()


def test_arguments_of_the_family_may_be_anything(packed: Path) -> None:
    whole = json.loads((packed / "manifest.json").read_text())
    config = build("generate", compose_plain("generate", [f"packed={packed}"]))
    arguments = whole["base"]["arguments"]
    refused: list[str] = []
    for index, (key, right) in enumerate(arguments.items()):
        for value in (NASTY[index % 6 :: 6], [0, -1, 2**62])[isinstance(right, int)]:
            (packed / "manifest.json").write_text(json.dumps(changed(whole, ("base", "arguments", key), value)))
            try:
                load_family(config)
            except ValueError as error:
                refused.append(str(error))
            else:
                assert not isinstance(right, int), f"{key}={value!r}"
    assert len(refused) > len(arguments)
    assert all(str(packed) in message and len(message.splitlines()) == 1 for message in refused)


if __name__ == "__main__":
    main_program(Path(sys.argv[1]))
