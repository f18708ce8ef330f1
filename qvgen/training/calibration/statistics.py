"""Statistics for PTQ methods: the full-precision model samples videos while its layers are watched, once per content key.

    FOLDER/KEY/LAYER.safetensors            abs_max, and second_moment, inputs, ranges by timestep where they were asked for
    FOLDER/KEY/videos/LAYER-N.safetensors   the same of one video, while several processes share the videos out

KEY is a hash of the weights, prompts, seeds, steps, sizes and kinds of statistics. Layers are watched in as many passes as
``calibration.memory_gib`` makes necessary; every pass samples the same videos again. What a layer's inputs were is collected
video by video and joined in their order (:mod:`qvgen.initializers.layer_part`): the same bits whoever samples which video.
Processes on one cache share the passes out, or the videos of each where there are fewer passes than processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qvgen import work_item
from qvgen.config.prompts.image_prompt import facts_of
from qvgen.config.prompts.prompt import PromptedVideo
from qvgen.config.schema.sections import CalibrationConfig
from qvgen.data.claims import POLL_SECONDS, Claims
from qvgen.data.sealed_tensors import DamagedFileError, read_sealed, write_sealed
from qvgen.evaluation.placement import placed
from qvgen.evaluation.prompts import calibration_prompts
from qvgen.evaluation.sampled_teacher import SampledTeacher
from qvgen.initializers.base import LayerStatistics, Need, StepRanges
from qvgen.initializers.calibration import ROWS_PER_CALL, Calibration, passes
from qvgen.initializers.layer_part import MAX_INPUTS, LayerPart
from qvgen.layers.swap import select_linears
from qvgen.models.base import local_arguments
from qvgen.models.few_step import own_timesteps, sampling_steps
from qvgen.training.source_checksum import foreign_sources

log = logging.getLogger(__name__)

FORMAT = 3
"""Part of the key; one more when the same settings would give other statistics."""

_NO_PART_OF_SAMPLING = ("published", "prompts", "include", "exclude")
"""Keys of conf/model that change no video; neither do a family's local arguments, for which its revision stands."""

SEED_OFFSET = 10_000
"""Videos of the calibration have other noise than those that are compared."""


class CalibratedModel:
    """A layer's name -> its statistics, sampled when they are first asked for and not in the cache.

    Args:
        teacher: The full-precision model.
        calibration: What it samples, and where statistics are kept; without prompts the model's own captions.
        needs: Kinds of statistics, a method's ``needs``.
        num_bands: Noise bands.
    """

    def __init__(
        self, teacher: SampledTeacher, calibration: CalibrationConfig, *, needs: Collection[Need], num_bands: int
    ) -> None:
        self.teacher, self.calibration, self.num_bands = teacher, calibration, num_bands
        self.needs: frozenset[Need] = frozenset(needs)
        family = teacher.family
        self.steps = sampling_steps(family, calibration.steps, needs=self.needs)
        chosen = select_linears(teacher.transformer, include=family.include, exclude=family.exclude).quantized
        sizes = [(name, teacher.transformer.get_submodule(name).in_features) for name in chosen]
        budget = int(calibration.memory_gib * 2**30)
        self._passes = passes(sizes, needs=self.needs, num_bands=num_bands, budget_bytes=budget)  # type: ignore[arg-type]
        self.folder = Path(calibration.cache).expanduser() / self._content_key()

    @property
    def key(self) -> str:
        """Key of all that decides the statistics' values, 32 hex digits."""
        return self.folder.name

    def _content_key(self) -> str:
        teacher, family = self.teacher, self.teacher.family
        section = teacher.model.section
        left_out = local_arguments(family) - {"_target_"} | {*_NO_PART_OF_SAMPLING}
        # Unset, these say nothing of the model, and are no part of what its statistics depend on.
        left_out |= {key for key in ("timesteps", "sampler", "guidance_distilled") if not section.get(key)}
        model = {key: value for key, value in section.items() if key not in left_out}
        scheduler = family.component_config("scheduler") if hasattr(family, "component_config") else None
        parts = [
            FORMAT, family.revision, model, scheduler, [facts_of(video) for video in self._videos()], self.steps,
            teacher.seed, sorted(self.needs), self.num_bands, ROWS_PER_CALL, MAX_INPUTS,
        ]  # fmt: skip
        if foreign := foreign_sources({"model": section}):  # its code may change while its revision stays
            parts.append(foreign)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def _videos(self) -> list[PromptedVideo]:
        prompts = calibration_prompts(self.calibration, self.teacher.family)
        return prompts.in_turn(self.calibration.videos, first_seed=self.teacher.seed + SEED_OFFSET)

    def __call__(self, name: str) -> LayerStatistics:
        """The statistics of a layer.

        Raises:
            ValueError: It was never called, or its inputs were not finite.
        """
        found = self._read(name)
        if found is None:
            (names,) = (names for names in self._passes if name in names)
            self._sample(names, due=lambda other: other == name or self._read(other) is None)
            found = read_statistics(self.folder, name)
        return found

    def missing_passes(self) -> list[Sequence[str]]:
        """Layers of each pass that is not in the cache whole."""
        return [names for names in self._passes if any(self._read(name) is None for name in names)]

    def by_video(self, num_processes: int) -> bool:
        """Whether so many processes share out the videos of a pass, and not whole passes."""
        return len(self._passes) < num_processes and self.calibration.videos > 1

    def sample_missing(self, *, num_processes: int = 1) -> None:
        """Sample what is not in the cache, of all layers: other processes will read it there.

        Processes that do so at the same time share it out. What another process samples is left out and looked at again
        behind all others: it is in the cache then, or that process is gone.

        Args:
            num_processes: How many do, as far as it is known; they all say the same.
        """
        sample = self._sample_videos if self.by_video(num_processes) else self._sample_pass
        left = self.missing_passes()
        with Claims(self.folder, key="calibration.cache") as claims:
            while left:
                elsewhere = [names for names in left if not sample(names, claims)]
                if len(elsewhere) == len(left):
                    work_item.wait()
                    time.sleep(POLL_SECONDS)
                left = elsewhere

    def sample_videos(self, videos: Sequence[PromptedVideo] | None = None) -> None:
        """Let the full-precision model sample the calibration's videos, or these, for whoever watches it."""
        teacher, family = self.teacher, self.teacher.family
        with placed(teacher.transformer), torch.no_grad(), work_item.heard_of([teacher.transformer]):
            for video in self._videos() if videos is None else videos:
                family.generate(
                    teacher.transformer,
                    [video.caption],
                    [video.seed],
                    num_steps=self.steps,
                    guidance_scale=family.guidance_scale,
                    negative_prompts=[video.negative],
                    encode=teacher.encode,
                )

    def _sample_pass(self, names: Sequence[str], claims: Claims) -> bool:
        """Sample a pass; False where another process does."""
        if not claims.take(key := self._claim(names)):
            return False
        if due := [name for name in names if self._read(name) is None]:
            self._collect(due)
        claims.give_back(key)
        return True

    def _sample_videos(self, names: Sequence[str], claims: Claims) -> bool:
        """Sample videos of a pass that no other process has, and join all of them; False where some are not there yet."""
        for number in range(self.calibration.videos):
            files = [_part_file(self.folder, name, number) for name in names]
            if not all(file.exists() for file in files) and claims.take(key := self._claim(names, number)):
                # In this order: whoever joins them writes the statistics before the parts are deleted.
                if not all(file.exists() for file in files) and any(self._read(name) is None for name in names):
                    log.info("calibration: video %d of %d, %d layers", number + 1, self.calibration.videos, len(names))
                    for name, part in self._collected(names, number).items():
                        file = _part_file(self.folder, name, number)
                        write_sealed(file, part.tensors(), key=_key(self.folder, file.stem))
                claims.give_back(key)
        if all(self._read(name) is not None for name in names):
            return True
        files = [_part_file(self.folder, name, number) for name in names for number in range(self.calibration.videos)]
        if not all(file.exists() for file in files) or not claims.take(key := self._claim(names)):
            return False
        is_joined = all(self._read(name) is not None or self._join(name) for name in names)
        for file in files if is_joined else ():
            file.unlink(missing_ok=True)
        claims.give_back(key)
        return is_joined

    def _join(self, name: str) -> bool:
        """Write a layer's statistics from those of each video; False where one of them is damaged, which is deleted."""
        total: LayerPart | None = None
        for number in range(self.calibration.videos):
            file = _part_file(self.folder, name, number)
            try:
                part = LayerPart.of(read_sealed(file, key=_key(self.folder, file.stem)))
            except (DamagedFileError, FileNotFoundError) as error:
                log.warning("%s; it is sampled again", error)
                file.unlink(missing_ok=True)
                return False
            total = part.behind(total)
        assert total is not None, "there is a video"
        self._write(name, total)
        return True

    def _claim(self, names: Sequence[str], number: int | None = None) -> str:
        what = "" if number is None else f"/{number}"
        return hashlib.sha256(f"{self.key}/{names[0]}{what}".encode()).hexdigest()

    def _sample(self, names: Sequence[str], *, due: Callable[[str], bool]) -> None:
        """Sample those layers of a pass that are due, unless another process on the same cache has done so meanwhile."""
        with Claims(self.folder, key="calibration.cache") as claims, claims.held(self._claim(names)) as waited:
            if waited and all(self._read(name) is not None for name in names):
                return
            self._collect([name for name in names if due(name)])

    def _read(self, name: str) -> LayerStatistics | None:
        """A layer's statistics in the cache; None where they are missing, or damaged, which is said."""
        try:
            return read_statistics(self.folder, name)
        except FileNotFoundError:
            return None
        except DamagedFileError as error:
            log.warning("%s; it is sampled again", error)
            return None

    def _collect(self, names: list[str]) -> None:
        """Sample all videos for some layers, and write their statistics."""
        log.info(
            "calibration: %d videos of %d steps for %d of %d layers",
            self.calibration.videos, self.steps, len(names), sum(map(len, self._passes)),
        )  # fmt: skip
        totals: dict[str, LayerPart] = {}
        with placed(self.teacher.transformer):  # for all videos
            for number in range(self.calibration.videos):
                for name, part in self._collected(names, number).items():
                    totals[name] = part.behind(totals.get(name))
        for name, total in totals.items():
            self._write(name, total)

    def _collected(self, names: Sequence[str], number: int) -> dict[str, LayerPart]:
        """What one video says of some layers."""
        teacher, video = self.teacher, self._videos()[number]
        work_item.begin(
            f"calibration: video {number + 1} of {self.calibration.videos} for {names[0]} and {len(names) - 1} more"
        )
        model = teacher.transformer
        watch = Calibration(
            model, names=names, needs=self.needs, num_bands=self.num_bands, seed=teacher.seed,
            timesteps=own_timesteps(teacher.family), part=number,
        )  # fmt: skip
        with watch:
            self.sample_videos([video])
        return {name: watch.part(name) for name in names}

    def _write(self, name: str, total: LayerPart) -> None:
        found = total.statistics(name)
        tensors = {"abs_max": found.abs_max, "num_rows": torch.tensor(found.num_rows)}
        if found.second_moment is not None:
            tensors["second_moment"] = found.second_moment
        if found.inputs is not None:
            tensors["inputs"] = found.inputs
        if found.ranges is not None:
            tensors["timesteps"] = torch.tensor(found.ranges.timesteps, dtype=torch.float64)
            tensors |= {"low": found.ranges.low, "high": found.ranges.high}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_sealed(_file(self.folder, name), tensors, key=_key(self.folder, name))


def read_statistics(folder: Path, name: str) -> LayerStatistics:
    """A layer's statistics, as a :class:`CalibratedModel` wrote them to its folder.

    Raises:
        DamagedFileError: The file is not what it was when it was written.
        OSError: It is missing, or can't be read.
    """
    tensors = read_sealed(_file(folder, name), key=_key(folder, name))
    return LayerStatistics(
        abs_max=tensors["abs_max"],
        second_moment=tensors.get("second_moment"),
        inputs=tensors.get("inputs"),
        num_rows=int(tensors["num_rows"]),
        ranges=_read_ranges(tensors),
    )


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _part_file(folder: Path, name: str, number: int) -> Path:
    return folder / "videos" / f"{name}-{number}.safetensors"


def _key(folder: Path, name: str) -> str:
    return f"{folder.name}/{name}"


def _read_ranges(tensors: Mapping[str, Tensor]) -> StepRanges | None:
    if "timesteps" not in tensors:
        return None
    return StepRanges(timesteps=tuple(tensors["timesteps"].tolist()), low=tensors["low"], high=tensors["high"])
