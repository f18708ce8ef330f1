"""The frozen dataclasses of the verbs that train nothing: generate, inspect, compare, assets, precompute, benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvgen.config.bits import Bits
from qvgen.config.prompt import Prompts
from qvgen.config.schema import TrainConfig
from qvgen.config.sections import positive, require


@dataclass(frozen=True, kw_only=True)
class ModelName:
    """The model of `qvgen generate`; None: what the packed directory says."""

    model: str | None


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Everything that `qvgen generate` needs.

    Attributes:
        packed: A packed directory, or the two of a model with two experts; None: full precision.
        model: The model's section, plain; None: what the packed directory says.
        prompt: Captions; None: those of ``prompts``.
        prompts: A file of captions, seeds and negative prompts (:mod:`qvgen.config.prompt`); None: the model's own captions.
        negative_prompt: What guidance leads away from, where a line of ``prompts`` says nothing else; None: the model's own.
        seed: One video is made for each caption and seed, but for lines of ``prompts`` that name their seeds.
        num_steps: Sampling steps, > 0; None: the model's own.
        guidance_scale: Classifier-free guidance, >= 0; None: the model's own.
        delta: Of a packed model's activation switch, >= 0; None: its own.
        out: Where the mp4 files go.
        overwrite: Replace files of the same names that are there already; otherwise they are refused.
        kernel: Backend; ``auto`` picks the best one that is there.
        dry_run: Say what would be done.
        debug: Show tracebacks.
        names: What was chosen.
        typed: The command line's overrides.
    """

    packed: tuple[Path, ...] | None
    model: dict[str, Any] | None
    prompt: tuple[str, ...] | None
    prompts: Prompts | None
    negative_prompt: str | None
    seed: tuple[int, ...]
    num_steps: int | None
    guidance_scale: float | None
    delta: float | None
    out: Path
    overwrite: bool
    kernel: str
    dry_run: bool
    debug: bool
    names: ModelName
    typed: tuple[str, ...]

    def __post_init__(self) -> None:
        require(
            self.packed is not None or self.names.model is not None,
            "packed is missing; write packed=DIR, or model=NAME model.path=FOLDER for the full-precision model",
        )
        require(self.packed is None or 1 <= len(self.packed) <= 2, "packed=[...] takes one directory or two")
        require(self.prompt is None or bool(self.prompt), "prompt=[] is empty; write null or captions")
        for caption in self.prompt or ():
            require(bool(caption.strip()), "prompt holds an empty caption; write what the video is to show")
            require(
                not caption.lower().endswith((".txt", ".jsonl")),
                f"prompt={caption} names a file; write prompts={caption}",
            )
        require(
            self.prompt is None or self.prompts is None,
            "prompt=... and prompts=FILE are given both; write the caption into the file, or leave one out",
        )
        require(
            self.negative_prompt is None or self.guidance_scale is None or self.guidance_scale > 1,
            f"negative_prompt has no effect with guidance_scale={self.guidance_scale}; leave one of them out",
        )
        require(bool(self.seed), "seed=[] is empty; write for example seed=42")
        for seed in self.seed:
            require(0 <= seed < 2**32, f"seed={seed} is outside 0..{2**32 - 1}")
        positive(num_steps=self.num_steps)
        require(
            self.guidance_scale is None or self.guidance_scale >= 0,
            f"guidance_scale={self.guidance_scale} is negative",
        )
        require(self.delta is None or self.delta >= 0, f"delta={self.delta} is negative; write for example delta=0.12")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Everything that `qvgen inspect` needs: one of the two folders.

    Attributes:
        packed: A packed directory.
        run_dir: A run's folder, in place of its packed directory.
        dry_run: Say what would be read.
        debug: Show tracebacks.
    """

    packed: Path | None
    run_dir: Path | None
    dry_run: bool
    debug: bool

    def __post_init__(self) -> None:
        require((self.packed is None) != (self.run_dir is None), "give one of packed=DIR and run_dir=DIR")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Everything that `qvgen compare` needs.

    Attributes:
        runs: Run folders, or folders that hold run folders.
        out: Folder of compare.html and compare.json; None: the runs' common parent.
        dry_run: Say what would be compared.
        debug: Show tracebacks.
    """

    runs: tuple[Path, ...]
    out: Path | None
    dry_run: bool
    debug: bool

    def __post_init__(self) -> None:
        require(bool(self.runs), "runs=[] is empty; write qvgen compare RUN RUN")


@dataclass(frozen=True, kw_only=True)
class AssetsConfig:
    """Everything that `qvgen assets` needs.

    Attributes:
        names: Which assets; None: all.
        out: Where they go; None: the user's cache folder.
        clips: Folder for a table of the fetched clips; None: no table.
        dry_run: Show the table, fetch nothing.
        debug: Show tracebacks.
    """

    names: tuple[str, ...] | None
    out: Path | None
    clips: Path | None
    dry_run: bool
    debug: bool

    def __post_init__(self) -> None:
        require(self.names is None or bool(self.names), "names=[] is empty; write null for all assets")


@dataclass(frozen=True, kw_only=True)
class DataNames:
    """What was chosen from the groups of `qvgen precompute`."""

    model: str
    data: str


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Everything that `qvgen precompute` needs.

    Attributes:
        model: The model family, one with a VAE.
        data: The clips and their cache.
        prompts: Further captions to encode, or a file of them (:mod:`qvgen.config.prompt`); None: the model's own.
        devices: Processes on this machine; >= 1.
        shard: This machine's share, 0 <= shard < num_shards.
        num_shards: Machines that share the clips; >= 1.
        threads: CPU threads of each process, as ``strategy.threads`` of training; > 0.
        run_dir: Where the further processes log.
        dry_run: Count what is missing, encode nothing.
        debug: Show tracebacks.
        names: What was chosen from each group.
        plain: All of the above as a plain dict.
    """

    model: Any
    data: Any
    prompts: Prompts | None
    devices: int
    shard: int
    num_shards: int
    threads: int
    run_dir: Path
    dry_run: bool
    debug: bool
    names: DataNames
    plain: dict[str, Any]

    def __post_init__(self) -> None:
        positive(devices=self.devices, num_shards=self.num_shards, threads=self.threads)
        require(0 <= self.shard < self.num_shards, f"shard={self.shard} is not in 0..{self.num_shards - 1}")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Everything that `qvgen benchmark` needs.

    Attributes:
        run: Model, data, profile and evaluation: as `qvgen train` has them.
        what: The benchmark: the name of a file or folder of qvgen/verbs/benchmarks.
        methods: Files of conf/init; ``NAME+rN`` on a profile that rotates by N.
        widths: Bit-widths.
        seeds: Seeds, each >= 0.
        videos: Videos per cell of ``ptq``; > 0.
        timed_steps: Optimizer steps per cell of ``training``, repetitions per layer of ``ptq_cost``, rounds of ``kernels``,
            ``denoising_step`` and ``loading``; > 0.
        shapes: Of ``kernels``: MxK-N, or MxK-H-N for a feed-forward.
        threads: Numbers of threads of ``kernels``, ``denoising_step`` and ``loading``, each > 0.
        blocks: Transformer blocks that ``denoising_step`` runs, or of the larger file of ``loading``; > 0.
        out: Folder of the results.
        overwrite: Replace results of another command that are there already; otherwise they are refused.
    """

    run: TrainConfig
    what: str
    methods: tuple[str, ...]
    widths: tuple[Bits, ...]
    seeds: tuple[int, ...]
    videos: int
    timed_steps: int
    shapes: tuple[str, ...]
    threads: tuple[int, ...]
    blocks: int
    out: Path
    overwrite: bool

    def __post_init__(self) -> None:
        positive(
            blocks=self.blocks, videos=self.videos, timed_steps=self.timed_steps, threads=min(self.threads, default=1)
        )
        require(
            self.what != "ptq" or self.run.evaluation.samples > 0,
            "evaluation.samples=0 measures nothing; a benchmark needs more",
        )
        require(
            self.what != "loading" or self.blocks > 1,
            f"blocks={self.blocks} is no second size beside one block; write for example blocks=6",
        )
        for key in ("methods", "widths", "seeds", "shapes", "threads"):
            require(bool(getattr(self, key)), f"{key}=[] is empty; leave it out for the default")
        for method in self.methods:
            rotation = method.partition("+r")[2]
            require(
                "+" not in method or rotation.isdigit(),
                f"methods holds {method!r}; write a file of conf/init, or for example gptq+r16",
            )
