"""The frozen dataclasses of the verbs that train nothing: generate, inspect, compare, precompute, benchmark.

Meanings and ranges have their one home here, as in :mod:`qvgen.config.schema.sections`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from qvgen.config.bits import Bits
from qvgen.config.prompts.prompt import Prompts
from qvgen.config.schema.sections import require, require_groups
from qvgen.config.schema.train import TrainConfig
from qvgen.config.schema.value_range import Range, check_ranges


@dataclass(frozen=True, kw_only=True)
class ModelName:
    """The model of `qvgen generate`; None: the one that the packed directory names."""

    model: str | None


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Everything that `qvgen generate` needs.

    Attributes:
        packed: A packed directory, or both of a model with two experts, [HIGH,LOW]; None: full precision.
        model: The model that text encoder and VAE come from, as model=NAME model.path=FOLDER; None: what the packed
            directory says.
        prompt: A caption, or a list of captions; None: those of ``prompts``.
        prompts: A file of captions: one to a line, or .jsonl with seeds, negative prompts and images
            (:mod:`qvgen.config.prompts.prompt`); None: the model's own captions.
        negative_prompt: What guidance leads away from, where a line of ``prompts`` says nothing else; "" is none; None:
            the model's own.
        image: Image that the videos begin with, where a line of ``prompts`` names none: what an image-to-video model needs;
            None: there is none.
        seed: A number or a list: one video is made for each caption and seed, but for lines of ``prompts`` that name
            seeds of their own.
        num_steps: Sampling steps; None: the model's own.
        guidance_scale: Factor of classifier-free guidance, 1 for none; None: the model's own.
        delta: Threshold of a packed model whose activations switch widths while sampling; None: what the packed
            directory says.
        out: Folder of the mp4 files.
        overwrite: True replaces files of the same names that are there already; False refuses to.
        kernel: Backend that runs the packed model; ``auto`` picks the best one that is there, a name never falls back.
        fused_norms: True computes LayerNorms in the packed layers behind them: fewer passes over a GPU's memory, but other
            last bits than the fake-quantized model's (docs/numerics.md).
        devices: Processes on this machine that share out the videos, one for each GPU. A number, a list of visible GPUs
            ([0,2]), or ``auto``: all visible GPUs, and 1 without one.
        context_parallel: Processes that sample one video together, each a part of its tokens; a divisor of ``devices``, whose
            groups share out the videos (docs/distributed.md). 1: each samples whole videos.
        hang_minutes: A command of several ``devices`` ends after so many minutes in which one of its processes reported
            nothing of its item and waited for no other one; null: it waits for days.
        dry_run: True says what would be done.
        debug: True shows the traceback of an error.
        names: The option that was chosen from each group.
        typed: The command line's overrides.
        plain: All of the above as a plain dict.
    """

    packed: tuple[Path, ...] | None
    model: dict[str, Any] | None
    prompt: tuple[str, ...] | None
    prompts: Prompts | None
    negative_prompt: str | None
    image: Path | None
    seed: Annotated[tuple[int, ...], Range("0..4294967295")]
    num_steps: Annotated[int | None, Range("> 0")]
    guidance_scale: Annotated[float | None, Range(">= 0")]
    delta: Annotated[float | None, Range(">= 0", write="0.12")]
    out: Path
    overwrite: bool
    kernel: str
    fused_norms: bool
    devices: Annotated[int, Range("> 0")]
    context_parallel: Annotated[int, Range("> 0")]
    hang_minutes: Annotated[float | None, Range("> 0")]
    dry_run: bool
    debug: bool
    names: ModelName
    typed: tuple[str, ...]
    plain: dict[str, Any]

    def __post_init__(self) -> None:
        check_ranges(self)
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
        require_groups(self.devices, self.context_parallel)
        require(bool(self.seed), "seed=[] is empty; write for example seed=42")
        require(
            self.packed is not None or not self.fused_norms,
            "fused_norms=true is of packed layers; write packed=DIR, or leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Everything that `qvgen inspect` needs: one of the two folders.

    Attributes:
        packed: A packed directory.
        run_dir: A run's folder, in place of its packed directory.
        dry_run: True says what would be read.
        debug: True shows the traceback of an error.
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
        runs: Run folders, or folders that hold run folders, or folders of `qvgen evaluate`; on the command line without a
            key: qvgen compare RUN RUN.
        out: Folder of compare.html and compare.json; None: the runs' common parent.
        published: Show a paper's numbers beside evaluations, in a table of their own: ``qvgen`` (CogVideoX-2B) or
            ``dvd_quant`` (HunyuanVideo); None: none.
        dry_run: True says what would be compared.
        debug: True shows the traceback of an error.
    """

    runs: tuple[Path, ...]
    out: Path | None
    published: str | None
    dry_run: bool
    debug: bool

    def __post_init__(self) -> None:
        require(bool(self.runs), "runs=[] is empty; write qvgen compare RUN RUN")


@dataclass(frozen=True, kw_only=True)
class DataNames:
    """The option that was chosen from each group of `qvgen precompute`."""

    model: str
    data: str


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Everything that `qvgen precompute` needs.

    Attributes:
        model: The model family, one with a VAE.
        data: The clips and their cache.
        prompts: Further captions to encode: a list, or a file of them (:mod:`qvgen.config.prompts.prompt`), whose negative
            prompts are encoded too; None: the model's own.
        devices: Processes on this machine that share the clips, one for each GPU. ``auto``: all visible GPUs, and 1 without
            one. A number, or a list of visible GPUs ([0,2]). Tasks of torchrun or SLURM are the processes themselves.
        shard: This machine's share of the clips, 0 .. num_shards - 1, where several machines fill one cache.
        num_shards: Number of machines that share the clips; 1: all processes that fill the cache share them out themselves.
        hang_minutes: A command of several ``devices`` ends after so many minutes in which one of its processes reported
            nothing of its item and waited for no other one; null: it waits for days.
        threads: CPU threads of each process, as ``strategy.threads`` of training; another number may encode other last
            bits.
        run_dir: Folder of the logs of the further processes.
        dry_run: True counts what is missing and what it takes, and encodes nothing.
        debug: True shows the traceback of an error.
        names: The option that was chosen from each group.
        plain: All of the above as a plain dict.
    """

    model: Any
    data: Any
    prompts: Prompts | None
    devices: Annotated[int, Range("> 0")]
    shard: Annotated[int, Range(">= 0")]
    num_shards: Annotated[int, Range("> 0")]
    hang_minutes: Annotated[float | None, Range("> 0")]
    threads: Annotated[int, Range("> 0")]
    run_dir: Path
    dry_run: bool
    debug: bool
    names: DataNames
    plain: dict[str, Any]

    def __post_init__(self) -> None:
        check_ranges(self)
        require(self.shard < self.num_shards, f"shard={self.shard} is not in 0..{self.num_shards - 1}")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Everything that `qvgen benchmark` needs.

    Attributes:
        run: Model, data, profile and evaluation: as `qvgen train` has them.
        what: The benchmark, the name of a file or folder of qvgen/verbs/benchmarks: ``ptq`` (held-out error of every PTQ
            method), ``ptq_cost`` (their seconds and memory at the model's size), ``methods`` (training methods in equal
            steps), ``training`` (optimizer steps), ``training_ratios`` (what quantization adds to a step), ``kernels``
            (packed linears on this CPU), ``attention`` (of one head, in 8 bits), ``fake_quantization`` (passes of a
            trainable Linear), ``denoising_step`` (a call of the transformer, bfloat16 and packed), ``profiles`` (quality of
            every profile), ``loading`` (of a packed directory), ``svdq_accumulation`` (sums in half precision), ``clips``
            (where clips of inputs lose least) or ``strategies`` (which strategy fits how many GPUs, planned).
        encoder: A text encoder that ``ptq`` measures in place of the model: ``minilm``, the one that `qvgen assets` fetches
            (model=minilm means the same), or the folder of a BertModel and its tokenizer. None: the model.
        methods: Files of conf/init, for ``methods`` of conf/method too; ``NAME+rN`` rotates by N, and for ``methods``
            ``NAME+KEY=VALUE`` changes a key of its cells (``qvgen+phi.start=zero``). None: all, those of plug-ins too, and
            with the rotations that they ask for; for ``methods`` the start and all that train.
        profiles: Files of conf/profile that ``profiles`` compares; None: all, those of plug-ins too.
        widths: Bit-widths, each as ``bits``.
        seeds: Seeds of calibration and training; held-out inputs and videos are the same for all.
        videos: Videos of each cell of ``ptq``, for the PSNR to the full-precision model's, and of ``svdq_accumulation``.
        timed_steps: Optimizer steps of ``training``, repetitions of ``ptq_cost``, rounds of the others that measure time.
        shapes: Shapes of ``kernels``, ``fake_quantization`` and ``training_ratios``: MxK-N, for ``kernels`` also MxK-H-N,
            for ``training_ratios`` also block@FxHxW and step. Of ``attention``: TOKENSxD. None: the benchmark's own.
        tune: True: ``kernels`` looks for the fastest tiles of the GPU's kernels and keeps them in the user's cache.
        threads: Numbers of threads of ``kernels``, ``attention``, ``fake_quantization``, ``denoising_step`` and
            ``loading``.
        blocks: Transformer blocks that ``denoising_step`` runs, scaled to the whole model, or of the larger file of
            ``loading``.
        out: Folder of the results: NAME.json with every measured value, NAME.md with the table.
        overwrite: True replaces results of another command that are there already; False refuses to. The same command
            goes on with a benchmark that was stopped.
    """

    run: TrainConfig
    what: str
    encoder: str | None
    methods: tuple[str, ...] | None
    profiles: tuple[str, ...] | None
    widths: tuple[Bits, ...]
    seeds: Annotated[tuple[int, ...], Range("0..4294967295")]
    videos: Annotated[int, Range("> 0")]
    timed_steps: Annotated[int, Range("> 0")]
    shapes: tuple[str, ...] | None
    tune: bool
    threads: Annotated[tuple[int, ...], Range("> 0")]
    blocks: Annotated[int, Range("> 0")]
    out: Path
    overwrite: bool

    @property
    def model_name(self) -> str:
        """Name of what is measured."""
        return self.run.names.model if self.encoder is None else Path(self.encoder).name

    def __post_init__(self) -> None:
        check_ranges(self)
        samples = self.run.evaluation.samples
        require(self.what != "ptq" or samples > 0, "evaluation.samples=0 measures nothing; a benchmark needs more")
        require(
            self.what != "loading" or self.blocks > 1,
            f"blocks={self.blocks} is no second size beside one block; write for example blocks=6",
        )
        require(
            self.encoder is None or self.what == "ptq",
            f"encoder={self.encoder} is of what=ptq, not of what={self.what}",
        )
        require(not self.run.export, "a benchmark exports nothing; leave export out")
        require(not self.tune or self.what == "kernels", f"tune=true is of what=kernels, not of what={self.what}")
        for key in ("methods", "profiles", "widths", "seeds", "shapes", "threads"):
            require(getattr(self, key) != (), f"{key}=[] is empty; leave it out for the default")
        for method in self.methods or ():
            rotation = method.partition("+r")[2]
            require(
                self.what == "methods" or "+" not in method or rotation.isdigit(),
                f"methods holds {method!r}; write a file of conf/init, or for example gptq+r16",
            )
