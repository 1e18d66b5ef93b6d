"""Train the small text-to-image model in ``examples/tiny_flux`` from nothing, on pictures made on the fly.

Two stages. First the autoencoder (``AutoencoderKL``), then, on a pool of its latents, the diffusion transformer
(``FluxTransformer2DModel``, flow matching) together with both text encoders. The result is a ``FluxPipeline`` folder.
The pictures are single frames of the clips that ``train_tiny_wan.py`` uses.

    accelerate launch --num_processes 2 --mixed_precision bf16 examples/train_tiny_flux.py --out out/tiny_flux
    python examples/train_tiny_flux.py --smoke --out out/smoke        # seconds, on a CPU: checks the script only

A run that was killed goes on with ``--resume`` where its last checkpoint was: see ``training.py``.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from check_clips import reconstruct
from check_colours import score
from check_pictures import generate, picture_caption
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tiny_flux_model import (
    CLIP_LENGTH,
    T5_LENGTH,
    Denoiser,
    Settings,
    Size,
    build_clip,
    build_t5,
    build_transformer,
    build_vae,
    pack,
    positions,
    scale_latents,
)
from tiny_wan_data import render, sample_scenes
from torch import nn
from training import Trainer, build_tokenizer, noise_levels, plot_log, settings_from

# --------------------------------------------------------------------------------------------------------- training


@dataclass
class Pool:
    """Latents and captions of one picture size, on the device."""

    latents: torch.Tensor  # [pictures, z, height, width], bf16, normalised
    ids: torch.Tensor  # [pictures, 512]


class FluxTrainer(Trainer):
    """Both stages."""

    def __init__(self, settings: Settings, out: Path, resume: bool) -> None:
        super().__init__(settings, out, resume)
        self.tokenizer = build_tokenizer(CLIP_LENGTH)
        self.tokenizer_2 = build_tokenizer(T5_LENGTH)
        self.vae = build_vae(settings).to(self.device)
        words = len(self.tokenizer)
        self.denoiser = Denoiser(
            build_clip(settings, words), build_t5(settings, words), build_transformer(settings)
        ).to(self.device)

    def pictures(
        self, batch: int, size: Size, *parts: int | str, heldout: bool = False
    ) -> tuple[torch.Tensor, list[str]]:
        """Fresh pictures ``[batch, 3, height, width]`` in [-1, 1] and their captions."""
        seed = self.seed_of(*parts)
        scenes = sample_scenes(batch, seed, heldout=heldout, still=True)
        clips = render(scenes, seed, frames=1, height=size[0], width=size[1], device=self.device)
        return clips[:, :, 0] * 2 - 1, [picture_caption(scene) for scene in scenes]

    def tokens(self, captions: list[str]) -> torch.Tensor:
        """Ids ``[captions, 512]``."""
        found = self.tokenizer_2(captions, padding="max_length", max_length=T5_LENGTH, return_tensors="pt")
        return found.input_ids.to(self.device)

    def train_vae(self) -> None:
        """Stage one."""
        settings = self.settings
        model = AutoencoderLoss(self.vae).train()
        averaged = copy.deepcopy(model).eval().requires_grad_(False)
        heldout, _ = self.pictures(max(2, settings.vae_batch), settings.size, "heldout", heldout=True)

        def loss_of(wrapped: nn.Module, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            loss, squared = wrapped(self.pictures(settings.vae_batch, settings.size, "vae", step)[0])
            return loss, -10 * (squared / 4).log10()

        self.fit_vae(model, averaged, heldout / 2 + 0.5, loss_of, reconstruct)

    @torch.no_grad()
    def build_pools(self) -> dict[Size, Pool]:
        """Encode pictures of every size with the finished autoencoder, and set its latents' mean and deviation.

        A Flux autoencoder has one shift and one scale for all channels, so the channels are made equally wide first:
        the same noise drowns them all at the same level.
        """
        settings, pools = self.settings, {}
        shares = {settings.size: 1.0, **{size: 0.12 for size in settings.other_sizes}}
        for size, share in shares.items():
            batch = max(1, min(64, settings.pool_pictures))
            begin, latents, captions = time.monotonic(), [], []
            while len(captions) < max(2, settings.pool_pictures * share):
                if len(captions) and time.monotonic() - begin > settings.pool_minutes * 60 * share:
                    break
                pictures, texts = self.pictures(batch, size, "pool", len(captions), *size)
                with self.accelerator.autocast():
                    latents.append(self.vae.encode(pictures).latent_dist.mode().to(torch.bfloat16))
                captions += texts
            data = torch.cat(latents)
            if size == settings.size:
                channels = data.float().transpose(0, 1).flatten(1)
                moments = torch.stack([channels.mean(1), channels.square().mean(1)])
                means, squares = self.accelerator.reduce(moments, "mean")
                deviations = (squares - means.square()).sqrt()
                scale_latents(self.vae, 1 / deviations)
                data /= deviations.to(data.dtype).view(1, -1, 1, 1)
                mean = (means / deviations).mean().item()
                deviation = ((squares / deviations.square()).mean().item() - mean**2) ** 0.5
                self.vae.register_to_config(shift_factor=mean, scaling_factor=1 / deviation)
            for part in data.split(1024):
                part.copy_((part.float() - mean) / deviation)
            pools[size] = Pool(data, self.tokens(captions))
            self.log(stage="pool", size=list(size), pictures=len(captions), seconds=time.monotonic() - begin)
        return pools

    def train_denoiser(self) -> None:
        """Stage two."""
        settings = self.settings
        self.vae.eval().requires_grad_(False)
        self.kept["vae"] = self.vae.state_dict()
        torch.backends.cudnn.benchmark = False  # it would take longer than encoding the few pictures of other sizes
        pools = self.build_pools()
        self.denoiser.train()
        averaged = copy.deepcopy(self.denoiser).eval().requires_grad_(False)
        if settings.compile:
            torch._dynamo.config.recompile_limit = 32
            self.denoiser.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        no_words = self.tokens([""])

        def loss_of(wrapped: nn.Module, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            # All processes take the same size at the same step: none waits for another's larger pictures.
            shared = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
            size = settings.size
            if torch.rand((), generator=shared) < settings.other_share:
                size = settings.other_sizes[int(torch.randint(len(settings.other_sizes), (), generator=shared))]
            pool = pools[size]
            own = torch.Generator().manual_seed(self.seed_of("denoiser", step))
            index = torch.randint(len(pool.latents), (settings.batch,), generator=own).to(self.device)
            clean = pack(pool.latents[index].float())
            drop = (torch.rand(settings.batch, 1, generator=own) < settings.no_caption).to(self.device)
            ids = torch.where(drop, no_words, pool.ids[index])
            level = noise_levels(settings.batch, settings.level_shift, own).to(self.device)
            noise = torch.randn_like(clean)
            height, width = (n // 2 for n in pool.latents.shape[2:])
            place = positions(height, width, self.device)
            predicted = wrapped(torch.lerp(clean, noise, level.view(-1, 1, 1)), level, ids, place).float()
            error = (predicted - (noise - clean)).square().flatten(1).mean(1)
            noisy = error[level > 0.9]
            return error.mean(), noisy.mean() if len(noisy) else error.mean()

        def check(step: int) -> bool:
            self.export(self.out / "model", averaged)
            scenes = sample_scenes(2 if settings.steps < 100 else 32, self.seed_of("look"), heldout=True, still=True)
            captions = [picture_caption(scene) for scene in scenes]
            with self.accelerator.autocast():
                pipe = self.pipeline(averaged)
                pipe.set_progress_bar_config(disable=True)
                pictures = generate(pipe, captions, steps=20, height=settings.size[0], width=settings.size[1])
            self.log(stage="denoiser", step=step, heldout_colours=self.agreed(score(pictures, captions)))
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

    def pipeline(self, denoiser: Denoiser) -> FluxPipeline:
        """A pipeline of the parts as they are."""
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=self.vae,
            text_encoder=denoiser.clip,
            tokenizer=self.tokenizer,
            text_encoder_2=denoiser.t5,
            tokenizer_2=self.tokenizer_2,
            transformer=denoiser.transformer,
        )

    def export(self, folder: Path, denoiser: Denoiser) -> None:
        """Save a pipeline folder in bf16."""
        if not self.accelerator.is_main_process:
            return
        transformer = FluxTransformer2DModel.from_config(denoiser.transformer.config)  # not the compiled one
        transformer.load_state_dict(denoiser.transformer.state_dict())
        pipe = self.pipeline(Denoiser(copy.deepcopy(denoiser.clip), copy.deepcopy(denoiser.t5), transformer))
        pipe.vae = copy.deepcopy(self.vae)
        pipe.to(torch.bfloat16)
        pipe.save_pretrained(folder)
        # transformers 5 saves a name of its own for this class that older versions do not know; it reads both.
        for name in ("model_index.json", "tokenizer/tokenizer_config.json", "tokenizer_2/tokenizer_config.json"):
            path = folder / name
            path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))

    def run(self, start_from: Path | None = None) -> None:
        """Both stages, from the checkpoint or from a finished folder's weights if there are any."""
        # On an H200 (torch 2.11.0, cuDNN 9.19) the compiled backward pass ended in an illegal memory access, at the
        # first kernel after attention. Which part is at fault is not known; cuDNN's attention is the likeliest.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if self.accelerator.is_main_process:
            (self.out / "settings.json").write_text(json.dumps(asdict(self.settings), indent=1) + "\n")
        if start_from is not None and self.state["step"] == 0:
            begun = FluxPipeline.from_pretrained(start_from, dtype=torch.float32)
            self.vae.load_state_dict(begun.vae.state_dict())
            self.denoiser.transformer.load_state_dict(begun.transformer.state_dict())
            self.denoiser.clip.load_state_dict(begun.text_encoder.float().state_dict())
            self.denoiser.t5.load_state_dict(begun.text_encoder_2.float().state_dict())
        elif self.state["stage"] == "denoiser":
            self.vae.load_state_dict(self.state["vae"])
        else:
            self.train_vae()
        self.train_denoiser()
        self.export(self.out / "model", self.denoiser)
        if self.accelerator.is_main_process:
            looks = {
                "vae": ("Autoencoder", "heldout_psnr_db", "held-out PSNR, dB"),
                "denoiser": ("Transformer and text encoders", "heldout_colours", "held-out captions shown"),
            }
            plot_log(self.out / "log.jsonl", self.out / "loss.png", looks)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


class AutoencoderLoss(nn.Module):
    """The autoencoder with its training loss, as one module, so that data parallelism sees every gradient."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and squared error for pictures ``[batch, 3, height, width]`` in [-1, 1]."""
        found = self.vae.encode(pictures).latent_dist
        decoded = self.vae.decode(found.sample(), return_dict=False)[0].float()
        squared = F.mse_loss(decoded, pictures)
        loss = F.l1_loss(decoded, pictures) + 4 * squared + 1e-4 * found.kl().mean() / found.mean[0].numel()
        for axis in (2, 3):  # edges
            loss = loss + 0.2 * F.l1_loss(decoded.diff(dim=axis), pictures.diff(dim=axis))
        return loss, squared.detach()


def main() -> None:
    """Read the settings from the command line and train."""
    settings, args = settings_from(__doc__, Settings(), Settings.smoke())
    FluxTrainer(settings, args.out, args.resume).run(args.start_from)


if __name__ == "__main__":
    main()
