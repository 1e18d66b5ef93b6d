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
from tiny_wan_data import render, sample_scenes
from torch import nn
from training import LoopSettings, Trainer, build_tokenizer, noise_levels, plot_log, settings_from
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

Size = tuple[int, int]  # height, width in pixels
CLIP_LENGTH, T5_LENGTH = 77, 512  # what FluxPipeline pads captions to; it masks none of the padding


@dataclass(frozen=True)
class Settings(LoopSettings):
    """What is trained, and how. Batches are per process."""

    size: Size = (256, 256)
    other_sizes: tuple[Size, ...] = ((192, 320), (320, 192))
    other_share: float = 0.15  # of the transformer's steps
    # Autoencoder: 2x2 pixels to one latent, 4x4 pixels to one token.
    vae_dim: int = 24
    z_dim: int = 4
    vae_steps: int = 100_000
    vae_minutes: float = 1.5
    vae_batch: int = 16
    vae_lr: float = 1.2e-3
    vae_good_db: float = 36.0  # stop early above this, measured on held-out pictures
    # Transformer and text encoders.
    layers: int = 2  # with separate weights for text and image
    single_layers: int = 4
    heads: int = 3
    head_dim: int = 64
    text_dim: int = 96
    pool_pictures: int = 16384
    pool_minutes: float = 0.5
    steps: int = 100_000
    minutes: float = 8.0
    batch: int = 32
    lr: float = 1e-3
    level_shift: float = 2.0  # how far the noise levels of training lean towards 1
    no_caption: float = 0.1  # how often the caption is dropped, for guidance
    compile: bool = True

    @classmethod
    def smoke(cls) -> Settings:
        """So small that both stages pass in seconds on a CPU."""
        return cls(
            size=(32, 32),
            other_sizes=((32, 48),),
            vae_dim=8,
            vae_steps=3,
            vae_batch=2,
            layers=1,
            single_layers=1,
            heads=2,
            head_dim=16,
            text_dim=16,
            pool_pictures=4,
            steps=4,
            batch=2,
            compile=False,
            warmup=2,
            log_every=1,
            check_minutes=0.0,
        )


# ---------------------------------------------------------------------------------------------------------- models


def build_vae(settings: Settings) -> AutoencoderKL:
    """2x smaller along height and width. Without attention, which would see 16,384 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(settings.vae_dim, 2 * settings.vae_dim),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=settings.z_dim,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
        sample_size=settings.size[0],
    )


def build_clip(settings: Settings, vocabulary: int) -> CLIPTextModel:
    """The pooled caption."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=settings.text_dim,
            intermediate_size=2 * settings.text_dim,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=CLIP_LENGTH,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def build_t5(settings: Settings, vocabulary: int) -> T5EncoderModel:
    """The caption's words. Two layers: enough to tell which colour goes with which shape."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=settings.text_dim,
            d_kv=settings.text_dim // 4,
            d_ff=2 * settings.text_dim,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def build_transformer(settings: Settings) -> FluxTransformer2DModel:
    """A Flux transformer, initialised so that its first output is zero."""
    half = settings.head_dim // 2
    across = 2 * (half // 4) + 2 * (half // 16)  # even, as rotary embeddings need
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * settings.z_dim,
        num_layers=settings.layers,
        num_single_layers=settings.single_layers,
        attention_head_dim=settings.head_dim,
        num_attention_heads=settings.heads,
        joint_attention_dim=settings.text_dim,
        pooled_projection_dim=settings.text_dim,
        guidance_embeds=False,
        axes_dims_rope=(settings.head_dim - 2 * across, across, across),
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        # Modulation that starts as the identity of its norm, and blocks that start as none.
        if name.startswith("proj_out.") or (".norm" in name and ".linear." in name):
            nn.init.zeros_(parameter)
    return model


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents ``[B, z, H, W]`` as tokens ``[B, (H / 2) (W / 2), 4 z]``, as ``FluxPipeline`` packs them."""
    blocks = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, z, H / 2, 2, W / 2, 2]
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def positions(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Position ids ``[height * width, 3]`` of an image of so many tokens."""
    ids = torch.zeros(height, width, 3, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)
    return ids.view(-1, 3)


@torch.no_grad()
def scale_latents(vae: AutoencoderKL, factors: torch.Tensor) -> None:
    """Multiply each channel of the latents by its own positive factor ``[z]``; what the decoder returns stays."""
    out, first, z = vae.encoder.conv_out, vae.decoder.conv_in, len(factors)
    out.weight[:z] *= factors.view(-1, 1, 1, 1)
    out.bias[:z] *= factors
    out.bias[z:] += 2 * factors.log()  # the logarithms of the variances
    first.weight /= factors.view(1, -1, 1, 1)


class Denoiser(nn.Module):
    """Text encoders and transformer as one module, fed as ``FluxPipeline`` feeds them."""

    def __init__(self, clip: CLIPTextModel, t5: T5EncoderModel, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        self.clip = clip
        self.t5 = t5
        self.transformer = transformer

    def forward(self, noisy: torch.Tensor, level: torch.Tensor, ids: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """The velocity ``noise - data``, shaped like ``noisy`` ``[batch, tokens, 4 z]``.

        ``level`` ``[batch]`` is the noise level in [0, 1]; ``ids`` are ``[batch, 512]``, ``place`` ``[tokens, 3]``.
        """
        # Every caption is far shorter than either limit, so the first 77 ids hold the same words.
        pooled = self.clip(ids[:, :CLIP_LENGTH]).pooler_output
        text = self.t5(ids).last_hidden_state
        return self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=level,
            img_ids=place,
            txt_ids=torch.zeros(ids.shape[1], 3, device=noisy.device),
            return_dict=False,
        )[0]


@dataclass
class Pool:
    """Latents and captions of one picture size, on the device."""

    latents: torch.Tensor  # [pictures, z, height, width], bf16, normalised
    ids: torch.Tensor  # [pictures, 512]


# --------------------------------------------------------------------------------------------------------- training


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
