"""Train the small text-to-video model in ``examples/tiny_wan`` from nothing, on clips made on the fly.

Two stages. First the autoencoder (``AutoencoderKLWan``), then, on a pool of its latents, the diffusion transformer
(``WanTransformer3DModel``, flow matching) together with the text encoder. The result is a ``WanPipeline`` folder.

    accelerate launch --num_processes 2 --mixed_precision bf16 examples/train_tiny_wan.py --out out/tiny_wan
    python examples/train_tiny_wan.py --smoke --out out/smoke        # seconds, on a CPU: checks the script only

Everything drawn at random depends on the seed, the stage, the step and the process alone, so a run that was killed goes
on where its last checkpoint was (``--resume``) with the clips it would have seen. The learning rate follows the larger
of the shares of steps and of minutes used up, so either limit ends a stage properly.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from check_colours import generate, psnr, reconstruct, score
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from diffusers.utils import logging
from tiny_wan_data import BACKGROUND_COLOURS, PANS, SHAPES, SPRITE_COLOURS, TEXTURES, render, sample_scenes
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

Size = tuple[int, int, int]  # frames, height, width in pixels


@dataclass(frozen=True)
class Settings:
    """What is trained, and how. Batches are per process."""

    seed: int = 0
    size: Size = (17, 128, 128)
    other_sizes: tuple[Size, ...] = ((9, 96, 160), (25, 160, 128))
    other_share: float = 0.15  # of the transformer's steps
    # Autoencoder: 4x4x4 pixels to one latent token.
    vae_dim: int = 24  # of the decoder, whose work is the harder
    vae_encoder_dim: int = 16
    z_dim: int = 16
    vae_blocks: int = 1
    vae_steps: int = 100_000
    vae_minutes: float = 5.0
    vae_batch: int = 8
    vae_lr: float = 1.2e-3
    vae_good_db: float = 34.0  # stop early above this, measured on held-out clips
    channels_last: bool = True
    vae_compile: bool = True  # the norms only: 1.5 times the speed; the whole takes minutes to compile
    # Transformer and text encoder.
    layers: int = 8
    heads: int = 4
    head_dim: int = 64
    ffn_dim: int = 1024
    text_dim: int = 128
    pool_clips: int = 16384
    pool_minutes: float = 1.0
    steps: int = 100_000
    minutes: float = 10.0
    batch: int = 32
    lr: float = 1e-3
    level_shift: float = 2.0  # how far the noise levels of training lean towards 1
    shift: float = 2.0  # the same for the scheduler's
    no_caption: float = 0.1  # how often the caption is dropped, for guidance
    compile: bool = True
    # Bookkeeping.
    ema: float = 0.998
    warmup: int = 100  # steps
    log_every: int = 20
    check_minutes: float = 1.0  # between checkpoints, each with a look at held-out clips

    @classmethod
    def smoke(cls) -> Settings:
        """So small that both stages pass in seconds on a CPU."""
        return cls(
            size=(5, 32, 32),
            other_sizes=((9, 32, 48),),
            vae_dim=8,
            vae_encoder_dim=8,
            z_dim=4,
            vae_steps=3,
            vae_batch=2,
            layers=2,
            heads=2,
            head_dim=12,
            ffn_dim=32,
            text_dim=16,
            pool_clips=4,
            steps=4,
            batch=2,
            compile=False,
            vae_compile=False,
            warmup=2,
            log_every=1,
            check_minutes=0.0,
        )


# ---------------------------------------------------------------------------------------------------------- models


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word a caption can hold, ``</s>`` at the end, as T5 has it."""
    words = ["<pad>", "</s>", "<unk>", ",", "a", "an", "and", "over", "panning"]
    for group in (SPRITE_COLOURS, BACKGROUND_COLOURS, SHAPES, TEXTURES, PANS):
        words += [word for word in group if word not in words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_vae(settings: Settings) -> AutoencoderKLWan:
    """4x smaller along each axis of space and time."""
    return AutoencoderKLWan(
        base_dim=settings.vae_encoder_dim,
        decoder_base_dim=settings.vae_dim,
        z_dim=settings.z_dim,
        dim_mult=[1, 2, 4],
        num_res_blocks=settings.vae_blocks,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * settings.z_dim,
        latents_std=[1.0] * settings.z_dim,
        scale_factor_spatial=4,
        scale_factor_temporal=4,
    )


def build_text_encoder(settings: Settings, vocabulary: int) -> UMT5EncoderModel:
    """Two layers: enough to tell which colour goes with which shape."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=settings.text_dim,
        d_kv=settings.text_dim // 4,
        d_ff=2 * settings.text_dim,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config)


def build_transformer(settings: Settings) -> WanTransformer3DModel:
    """A Wan transformer that takes every latent as a token, initialised so that captions count from the first step."""
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=settings.heads,
        attention_head_dim=settings.head_dim,
        in_channels=settings.z_dim,
        out_channels=settings.z_dim,
        text_dim=settings.text_dim,
        freq_dim=256,
        ffn_dim=settings.ffn_dim,
        num_layers=settings.layers,
        cross_attn_norm=True,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.zeros_(model.proj_out.weight)
    # Captions are padded to 512 tokens with zeros. With zero biases the padding adds nothing, and with sharper keys the
    # few real tokens outweigh it; without both, the caption would be a thirtieth of what cross-attention returns.
    for block in model.blocks:
        nn.init.constant_(block.attn2.norm_k.weight, 3.0)
    return model


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


class Trainer:
    """Both stages, their checkpoints and their log."""

    def __init__(self, settings: Settings, out: Path, resume: bool) -> None:
        self.settings = settings
        self.out = out
        self.accelerator = Accelerator()
        logging.set_verbosity_error()  # casting whole modules to bf16 for saving is meant
        logging.disable_progress_bar()
        self.device = self.accelerator.device
        self.rank = self.accelerator.process_index
        out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(settings.seed)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        self.tokenizer = build_tokenizer()
        self.vae = build_vae(settings).to(self.device)
        text_encoder = build_text_encoder(settings, len(self.tokenizer))
        self.denoiser = Denoiser(text_encoder, build_transformer(settings), 512).to(self.device)
        self.state: dict[str, Any] = {"stage": "vae", "step": 0, "minutes": 0.0}
        if resume and (out / "checkpoint.pt").exists():
            self.state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
            self.say(f"resumed {self.state['stage']} at step {self.state['step']}")
        elif self.accelerator.is_main_process:
            (out / "log.jsonl").write_text("")

    def say(self, text: str) -> None:
        """Print once, at once."""
        if self.accelerator.is_main_process:
            print(text, flush=True)

    def log(self, **values: Any) -> None:
        """Append one line to ``log.jsonl`` and print it."""
        if self.accelerator.is_main_process:
            line = json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()})
            print(line, flush=True)
            with (self.out / "log.jsonl").open("a") as file:
                file.write(line + "\n")

    def seed_of(self, *parts: int | str) -> int:
        """A seed for this process that depends on the parts and on nothing else."""
        return zlib.crc32(repr((self.settings.seed, self.rank, *parts)).encode())

    def clips(self, batch: int, size: Size, *parts: int | str, heldout: bool = False) -> tuple[torch.Tensor, list[str]]:
        """Fresh clips ``[batch, 3, *size]`` in [-1, 1] and their captions."""
        seed = self.seed_of(*parts)
        scenes = sample_scenes(batch, seed, heldout=heldout)
        frames, height, width = size
        clips = render(scenes, seed, frames=frames, height=height, width=width, device=self.device)
        return clips * 2 - 1, [scene.caption for scene in scenes]

    def fit(
        self,
        stage: str,
        model: nn.Module,
        averaged: nn.Module,
        loss_of: Callable[[nn.Module, int], tuple[torch.Tensor, torch.Tensor]],
        check: Callable[[int], bool],
        *,
        lr: float,
        steps: int,
        minutes: float,
        weight_decay: float,
    ) -> None:
        """Train ``model`` until its steps or minutes are used up, or ``check`` says that it is good enough.

        Args:
            averaged: A copy of ``model`` that follows it as an exponential moving average.
            loss_of: Loss and a second figure for the log, from the wrapped model and the step.
            check: Called every ``check_minutes`` with the step.
        """
        settings, accelerator = self.settings, self.accelerator
        decayed = [p for p in model.parameters() if p.ndim > 1]
        plain = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=self.device.type == "cuda")
        step, before = 0, 0.0
        if self.state["stage"] == stage and "model" in self.state:
            model.load_state_dict(self.state["model"])
            averaged.load_state_dict(self.state["ema"])
            optimizer.load_state_dict(self.state["optimizer"])
            step, before = self.state["step"], self.state["minutes"]
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        begin = last_log = time.monotonic()
        last_step, progress, next_check = step, 0.0, 0.0
        while True:
            if step % 10 == 0 or steps < 100:
                # Every process must stop at the same step, so the first one's clock counts.
                progress = max(step / steps, (before + (time.monotonic() - begin) / 60) / minutes)
                progress = broadcast(torch.tensor([progress], device=self.device)).item()
                if progress >= 1:
                    break
                if next_check == 0.0:
                    next_check = progress + settings.check_minutes / minutes
                elif progress >= next_check:
                    next_check = progress + settings.check_minutes / minutes
                    self.state = {
                        "stage": stage,
                        "step": step,
                        "minutes": before + (time.monotonic() - begin) / 60,
                        "model": model.state_dict(),
                        "ema": averaged.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "vae": self.vae.state_dict() if stage != "vae" else {},
                    }
                    self.save()
                    if check(step):
                        break
            rate = lr * min(1, (step + 1) / settings.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(self.seed_of(stage, "noise", step))
            loss, extra = loss_of(wrapped, step)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            decay = min(settings.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
            if step % settings.log_every == 0:
                now = time.monotonic()
                self.log(
                    stage=stage,
                    step=step,
                    minutes=before + (now - begin) / 60,
                    loss=loss.item(),
                    extra=extra.item(),
                    lr=rate,
                    steps_per_s=(step - last_step) / (now - last_log),
                )
                last_log, last_step = now, step
        model.load_state_dict(averaged.state_dict())
        self.log(stage=stage, step=step, minutes=before + (time.monotonic() - begin) / 60, done=True)

    def save(self) -> None:
        """Write ``checkpoint.pt``, whole or not at all."""
        if self.accelerator.is_main_process:
            torch.save(self.state, self.out / "checkpoint.tmp")
            (self.out / "checkpoint.tmp").replace(self.out / "checkpoint.pt")

    def agreed(self, value: float) -> float:
        """The mean of a figure over all processes."""
        return self.accelerator.reduce(torch.tensor(value, device=self.device), "mean").item()

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

        def check(step: int) -> bool:
            with self.accelerator.autocast():
                decoded = reconstruct(averaged.vae, heldout / 2 + 0.5)
            quality = self.agreed(psnr(decoded, heldout / 2 + 0.5).mean().item())
            self.log(stage="vae", step=step, heldout_psnr_db=quality)
            return quality >= settings.vae_good_db

        self.fit(
            "vae",
            model,
            averaged,
            loss_of,
            check,
            lr=settings.vae_lr,
            steps=settings.vae_steps,
            minutes=settings.vae_minutes,
            weight_decay=0.0,
        )
        check(-1)

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
            # Stratified, so that every batch covers all noise levels, up to the noise alone that sampling begins with.
            even = (torch.arange(batch) + torch.rand(batch, generator=own)) / batch
            level = (settings.level_shift * even / (1 + (settings.level_shift - 1) * even)).to(self.device)
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
            self.log(stage="denoiser", step=step, heldout_colours=self.agreed(score(clips, captions)))
            return False

        self.fit(
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
        check(-1)

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
            plot_log(self.out / "log.jsonl", self.out / "loss.png")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def plot_log(log: Path, picture: Path) -> None:
    """Draw both stages' losses and what was measured on held-out clips."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    looks = {
        "vae": ("Autoencoder", "heldout_psnr_db", "held-out PSNR, dB"),
        "denoiser": ("Transformer and text encoder", "heldout_colours", "held-out captions shown"),
    }
    for axis, (stage, (title, key, label)) in zip(axes, looks.items(), strict=True):
        losses = [(line["step"], line["loss"]) for line in lines if line["stage"] == stage and "loss" in line]
        checks = [(line["step"], line[key]) for line in lines if line["stage"] == stage and line.get(key) is not None]
        last = max((step for step, _ in losses), default=0)
        axis.plot(*zip(*losses, strict=True), lw=0.8, color="tab:blue") if losses else None
        axis.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        if checks:
            right = axis.twinx()
            steps, values = zip(*[(last if step < 0 else step, value) for step, value in checks], strict=True)
            right.plot(steps, values, "o-", ms=3, color="tab:orange")
            right.set_ylabel(label)
    figure.savefig(picture, dpi=90)


def main() -> None:
    """Read the settings from the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint, log and the finished model/ go here")
    parser.add_argument("--smoke", action="store_true", help="seconds on a CPU, to check the script")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    parser.add_argument("--start-from", type=Path, help="a finished folder whose weights to train further (stage two)")
    simple = {k: v for k, v in asdict(Settings()).items() if isinstance(v, bool | int | float)}
    for name, value in simple.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(flag, type=type(value), default=None, help=f"default {value}")
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in simple if getattr(args, name) is not None}
    settings = replace(Settings.smoke() if args.smoke else Settings(), **given)
    Trainer(settings, args.out, args.resume).run(args.start_from)


if __name__ == "__main__":
    main()
