"""Whole pipelines of diffusers with a packed transformer, offloaded from a device that is not the CPU.

``enable_model_cpu_offload``, ``enable_sequential_cpu_offload`` and ``enable_group_offload`` of a pipeline give the samples of
the pipeline that lives on the device, to the bit. The device is the stand-in of tests/stand_in_device.py, and
tests/layers/test_other_device.py runs this file in a process of its own.
"""

import pytest
import torch
from diffusers import WanPipeline

import qvgen
from qvgen.layers.swap import packed_layers
from tests.models.hub_folders import make_wan_folder
from tests.stand_in_device import reading_allowed, register, stand_in_device

register()

WAYS = {
    "whole models": lambda pipe, device: pipe.enable_model_cpu_offload(device=device),
    "layers in sequence": lambda pipe, device: pipe.enable_sequential_cpu_offload(device=device),
    "groups of blocks": lambda pipe, device: pipe.enable_group_offload(
        onload_device=device, offload_type="block_level", num_blocks_per_group=1
    ),
    "groups of leaves": lambda pipe, device: pipe.enable_group_offload(onload_device=device, offload_type="leaf_level"),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return make_wan_folder(tmp_path_factory.mktemp("hub") / "wan")


@pytest.fixture(scope="module")
def packed(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    model = WanPipeline.from_pretrained(hub).transformer
    qvgen.prepare(model, bits=4, init="rtn")
    qvgen.fold(model)
    qvgen.save_packed(model, folder)
    return folder


def make_pipeline(hub, packed):
    pipe = WanPipeline.from_pretrained(hub, transformer=qvgen.load_packed(packed))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe):
    made = pipe(
        prompt="a red square", height=32, width=32, num_frames=1, num_inference_steps=1, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return made.frames.cpu()


@pytest.fixture(scope="module")
def expected(hub, packed):
    with stand_in_device(float64=True) as device, reading_allowed():
        return sample(make_pipeline(hub, packed).to(device))


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_pipelines_sample_what_the_one_on_the_device_does(hub, packed, expected, way):
    with stand_in_device(float64=True) as device, reading_allowed():
        pipe = make_pipeline(hub, packed)
        WAYS[way](pipe, device)
        for _ in range(2):
            assert torch.equal(sample(pipe), expected)
        assert device not in {layer.codes.device for layer in packed_layers(pipe.transformer).values()}
