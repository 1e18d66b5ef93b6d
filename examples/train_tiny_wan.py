"""Train the small text-to-video model in ``examples/tiny_wan`` from nothing, on clips made on the fly.

Two stages. First the autoencoder (``AutoencoderKLWan``), then, on a pool of its latents, the diffusion transformer
(``WanTransformer3DModel``, flow matching) together with the text encoder. The result is a ``WanPipeline`` folder.

    accelerate launch --num_processes 2 --mixed_precision bf16 examples/train_tiny_wan.py --out out/tiny_wan
    python examples/train_tiny_wan.py --smoke --out out/smoke        # seconds, on a CPU: checks the script only

A run that was killed goes on with ``--resume`` where its last checkpoint was: see ``training.py``.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from check_clips import generate, reconstruct
from check_colours import score
from check_shapes import shape_score
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from tiny_wan_data import render, sample_scenes
from tiny_wan_model import Settings, Size, build_text_encoder, build_transformer, build_vae
from torch import nn
from training import Trainer, build_tokenizer, noise_levels, plot_log, settings_from
from transformers import UMT5EncoderModel

# ------------------------------------------------------------------------------------------------------ autoencoder


class AutoencoderLoss(nn.Module):
    """The autoencoder with its training loss, as one module, so that data parallelism sees every gradient."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and squared error for clips ``[batch, 3, frames, height, width]`` in [-1, 1]."""
        moments = encode_whole(self.vae, clips)
        mean, log_variance = moments.float().chunk(2, 1)
        log_variance = log_variance.clamp(-20, 10)
        latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        decoded = decode_whole(self.vae, latents).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        squared = F.mse_loss(decoded, clips)
        loss = F.l1_loss(decoded, clips) + 4 * squared + 1e-4 * kl
        for axis in (2, 3, 4):  # edges and motion
            loss = loss + 0.2 * F.l1_loss(decoded.diff(dim=axis), clips.diff(dim=axis))
        return loss, squared.detach()


def encode_whole(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """The moments that ``vae.encode`` gives, with all frames after the first in one go instead of four at a time.

    The convolutions are causal and hand their last frames on, so how the frames are cut does not change the result.
    """
    cache: list[Any] = [None] * vae._cached_conv_counts["encoder"]
    out = [vae.encoder(clips[:, :, :1], feat_cache=cache, feat_idx=[0])]
    if clips.shape[2] > 1:
        out.append(vae.encoder(clips[:, :, 1:], feat_cache=cache, feat_idx=[0]))
    return vae.quant_conv(torch.cat(out, 2))


def decode_whole(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """What ``vae.decode`` gives before it clamps (clamping would stop gradients), in one go after the first frame."""
    cache: list[Any] = [None] * vae._cached_conv_counts["decoder"]
    latents = vae.post_quant_conv(latents)
    out = [vae.decoder(latents[:, :, :1], feat_cache=cache, feat_idx=[0], first_chunk=True)]
    if latents.shape[2] > 1:
        out.append(vae.decoder(latents[:, :, 1:], feat_cache=cache, feat_idx=[0]))
    return torch.cat(out, 2)


# -------------------------------------------------------------------------------------------- transformer with text


class Denoiser(nn.Module):
    """Text encoder and transformer as one module, fed as ``WanPipeline`` feeds them."""

    def __init__(self, text_encoder: UMT5EncoderModel, transformer: WanTransformer3DModel, text_length: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.transformer = transformer
        self.text_length = text_length

    def forward(self, noisy: torch.Tensor, level: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The velocity ``noise - data``, shaped like ``noisy`` ``[batch, z, frames, height, width]``.

        ``level`` ``[batch]`` is the noise level in [0, 1]; ``ids`` and ``mask`` are ``[batch, words]``.
        """
        text = self.text_encoder(ids, mask).last_hidden_state * mask.unsqueeze(-1)
        text = F.pad(text, (0, 0, 0, self.text_length - text.shape[1]))
        return self.transformer(noisy, level * 1000, text, return_dict=False)[0]


@dataclass
class Pool:
    """Latents and captions of one clip size, on the device."""

    latents: torch.Tensor  # [clips, z, frames, height, width], bf16, normalised
    ids: torch.Tensor  # [clips, words]
    mask: torch.Tensor


# --------------------------------------------------------------------------------------------------------- training


class WanTrainer(Trainer):
    """Both stages."""

    def __init__(self, settings: Settings, out: Path, resume: bool) -> None:
        super().__init__(settings, out, resume)
        self.tokenizer = build_tokenizer()
        self.vae = build_vae(settings).to(self.device)
        text_encoder = build_text_encoder(settings, len(self.tokenizer))
        self.denoiser = Denoiser(text_encoder, build_transformer(settings), 512).to(self.device)

    def clips(self, batch: int, size: Size, *parts: int | str, heldout: bool = False) -> tuple[torch.Tensor, list[str]]:
        """Fresh clips ``[batch, 3, *size]`` in [-1, 1] and their captions."""
        seed = self.seed_of(*parts)
        scenes = sample_scenes(batch, seed, heldout=heldout)
        frames, height, width = size
        clips = render(scenes, seed, frames=frames, height=height, width=width, device=self.device)
        return clips * 2 - 1, [scene.caption for scene in scenes]

    def train_vae(self) -> None:
        """Stage one."""
        settings = self.settings
        if settings.channels_last:
            for module in self.vae.modules():
                if isinstance(module, nn.Conv3d):
                    module.to(memory_format=torch.channels_last_3d)
        model = AutoencoderLoss(self.vae).train()
        averaged = copy.deepcopy(model).eval().requires_grad_(False)
        if settings.vae_compile:
            torch._dynamo.config.recompile_limit = 64
            norm = torch.compile(WanRMS_norm.forward, dynamic=False)
            for module in model.modules():
                if isinstance(module, WanRMS_norm):
                    module.forward = functools.partial(norm, module)
        heldout, _ = self.clips(max(2, settings.vae_batch), settings.size, "heldout", heldout=True)

        def loss_of(wrapped: nn.Module, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            clips, _ = self.clips(settings.vae_batch, settings.size, "vae", step)
            if settings.channels_last:
                clips = clips.contiguous(memory_format=torch.channels_last_3d)
            loss, squared = wrapped(clips)
            return loss, -10 * (squared / 4).log10()

        self.fit_vae(model, averaged, heldout / 2 + 0.5, loss_of, reconstruct)

    @torch.no_grad()
    def build_pools(self) -> dict[Size, Pool]:
        """Encode clips of every size with the finished autoencoder, and set its latents' mean and deviation."""
        settings, pools = self.settings, {}
        shares = {settings.size: 1.0, **{size: 0.12 for size in settings.other_sizes}}
        for size, share in shares.items():
            batch = max(1, min(64, settings.pool_clips))
            begin, latents, captions = time.monotonic(), [], []
            while len(captions) < max(2, settings.pool_clips * share):
                if len(captions) and time.monotonic() - begin > settings.pool_minutes * 60 * share:
                    break
                clips, texts = self.clips(batch, size, "pool", len(captions), *size)
                with self.accelerator.autocast():
                    latents.append(encode_whole(self.vae, clips)[:, : settings.z_dim].to(torch.bfloat16))
                captions += texts
            data = torch.cat(latents)
            if size == settings.size:
                flat = data.float().transpose(0, 1).flatten(1)
                moments = torch.stack([flat.mean(1), flat.square().mean(1)])
                moments = self.accelerator.reduce(moments, "mean")
                mean, deviation = moments[0], (moments[1] - moments[0].square()).sqrt()
                self.vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
            shape = (1, -1, 1, 1, 1)
            for part in data.split(1024):
                part.copy_((part.float() - mean.view(shape)) / deviation.view(shape))
            ids, mask = self.tokens(captions)
            pools[size] = Pool(data, ids, mask)
            self.log(stage="pool", size=list(size), clips=len(captions), seconds=time.monotonic() - begin)
        return pools

    def tokens(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask ``[captions, 32]``. Longer padding would only be cut off again."""
        found = self.tokenizer(captions, padding="max_length", max_length=32, return_tensors="pt")
        return found.input_ids.to(self.device), found.attention_mask.to(self.device)

    def train_denoiser(self) -> None:
        """Stage two."""
        settings = self.settings
        self.vae.eval().requires_grad_(False)
        self.kept["vae"] = self.vae.state_dict()
        torch.backends.cudnn.benchmark = False  # it would take longer than encoding the few clips of the other sizes
        pools = self.build_pools()
        self.denoiser.train()
        averaged = copy.deepcopy(self.denoiser).eval().requires_grad_(False)
        if settings.compile:
            torch._dynamo.config.recompile_limit = 32
            self.denoiser.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        empty_ids, empty_mask = self.tokens([""])

        def loss_of(wrapped: nn.Module, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            # All processes take the same size at the same step: none waits for another's longer clips.
            shared = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
            size = settings.size
            if torch.rand((), generator=shared) < settings.other_share:
                pick = torch.randint(len(settings.other_sizes), (), generator=shared)
                size = settings.other_sizes[int(pick)]
            pool = pools[size]
            own = torch.Generator().manual_seed(self.seed_of("denoiser", step))
            tokens = math.prod(pool.latents.shape[2:]) / math.prod(pools[settings.size].latents.shape[2:])
            batch = max(1, min(settings.batch, int(settings.batch / tokens)))
            index = torch.randint(len(pool.latents), (batch,), generator=own).to(self.device)
            clean = pool.latents[index].float()
            drop = (torch.rand(batch, 1, generator=own) < settings.no_caption).to(self.device)
            ids = torch.where(drop, empty_ids, pool.ids[index])
            mask = torch.where(drop, empty_mask, pool.mask[index])
            level = noise_levels(batch, settings.level_shift, own).to(self.device)
            noise = torch.randn_like(clean)
            mix = level.view(-1, 1, 1, 1, 1)
            predicted = wrapped(torch.lerp(clean, noise, mix), level, ids, mask).float()
            error = (predicted - (noise - clean)).square().flatten(1).mean(1)
            noisy = error[level > 0.9]
            return error.mean(), noisy.mean() if len(noisy) else error.mean()

        def check(step: int) -> bool:
            self.export(self.out / "model", averaged)
            count = 2 if settings.steps < 100 else 32
            captions = [s.caption for s in sample_scenes(count, self.seed_of("look"), heldout=True)]
            frames, height, width = settings.size
            with self.accelerator.autocast():
                pipe = self.pipeline(averaged)
                pipe.set_progress_bar_config(disable=True)
                clips = generate(pipe, captions, steps=20, frames=frames, height=height, width=width)
            colours, shapes = (self.agreed(share(clips, captions)) for share in (score, shape_score))
            self.log(stage="denoiser", step=step, heldout_colours=colours, heldout_shapes=shapes)
            return False

        step = self.fit(
            "denoiser",
            self.denoiser,
            averaged,
            loss_of,
            check,
            lr=settings.lr,
            steps=settings.steps,
            minutes=settings.minutes,
            weight_decay=0.01,
        )
        check(step)

    def pipeline(self, denoiser: Denoiser) -> WanPipeline:
        """A pipeline of the parts as they are."""
        return WanPipeline(
            tokenizer=self.tokenizer,
            text_encoder=denoiser.text_encoder,
            vae=self.vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=self.settings.shift),
            transformer=denoiser.transformer,
        )

    def export(self, folder: Path, denoiser: Denoiser) -> None:
        """Save a pipeline folder in bf16."""
        if not self.accelerator.is_main_process:
            return
        # Fresh modules hold plainly laid out weights whatever the training did to the others.
        vae = AutoencoderKLWan.from_config(self.vae.config)
        vae.load_state_dict(self.vae.state_dict())
        transformer = WanTransformer3DModel.from_config(denoiser.transformer.config)
        transformer.load_state_dict(denoiser.transformer.state_dict())
        text_encoder = UMT5EncoderModel(denoiser.text_encoder.config)
        text_encoder.load_state_dict(denoiser.text_encoder.state_dict())
        WanPipeline(
            tokenizer=self.tokenizer,
            text_encoder=text_encoder.to(torch.bfloat16),
            vae=vae.to(torch.bfloat16),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=self.settings.shift),
            transformer=transformer.to(torch.bfloat16),
        ).save_pretrained(folder)
        # transformers 5 saves a name of its own for this class that older versions do not know; it reads both.
        for path in (folder / "model_index.json", folder / "tokenizer" / "tokenizer_config.json"):
            path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))

    def run(self, start_from: Path | None = None) -> None:
        """Both stages, from the checkpoint or from a finished folder's weights if there are any."""
        if start_from is not None and self.state["step"] == 0:
            begun = WanPipeline.from_pretrained(start_from, dtype=torch.float32)
            self.vae.load_state_dict(begun.vae.state_dict())
            self.denoiser.transformer.load_state_dict(begun.transformer.state_dict())
            self.denoiser.text_encoder.load_state_dict(begun.text_encoder.float().state_dict())
        elif self.state["stage"] == "denoiser":
            self.vae.load_state_dict(self.state["vae"])
        else:
            self.train_vae()
        self.train_denoiser()
        self.export(self.out / "model", self.denoiser)
        if self.accelerator.is_main_process:
            (self.out / "settings.json").write_text(json.dumps(asdict(self.settings), indent=1) + "\n")
            looks = {
                "vae": ("Autoencoder", "heldout_psnr_db", "held-out PSNR, dB"),
                "denoiser": ("Transformer and text encoder", "heldout_colours", "held-out captions shown"),
            }
            plot_log(self.out / "log.jsonl", self.out / "loss.png", looks)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def main() -> None:
    """Read the settings from the command line and train."""
    settings, args = settings_from(__doc__, Settings(), Settings.smoke())
    WanTrainer(settings, args.out, args.resume).run(args.start_from)


if __name__ == "__main__":
    main()
