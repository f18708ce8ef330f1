"""Generate videos from a packed directory alone."""

from __future__ import annotations

from qvgen.config.leaves import load_leaf
from qvgen.config.schema import GenerateConfig
from qvgen.data.video import write_video
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.manifest import read_manifest
from qvgen.evaluation.comparison import video_name


def run(config: GenerateConfig) -> None:
    """Write one mp4 per caption and seed: the seed alone decides a video's noise, as it does for the teacher's."""
    manifest = read_manifest(config.packed)
    if not manifest.base_name:
        raise ValueError(f"{config.packed} does not say which model it was made from; load it with qvgen.load_packed")
    family = load_leaf("model", manifest.base_name, **manifest.base_arguments)
    captions = list(config.prompt or family.prompts)
    family.encode(captions)  # a caption that is not understood is refused before anything is written
    transformer = load_packed(config.packed, kernel=config.kernel)
    config.out.mkdir(parents=True, exist_ok=True)
    pairs = [(caption, seed) for caption in captions for seed in config.seed]
    for index, (caption, seed) in enumerate(pairs):
        video = family.generate(
            transformer,
            [caption],
            [seed],
            num_steps=config.num_steps or family.num_inference_steps,
            guidance_scale=family.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        )[0]
        path = config.out / video_name(index, caption, seed=seed, variant="packed")
        write_video(path, video.numpy(), fps=family.fps)
        print(path)
