"""What both training scripts share: the loop with its limits in steps and minutes, checkpoints, the log, its picture.

Everything drawn at random depends on the seed, the stage, the step and the process alone, so a run that was killed goes
on where its last checkpoint was with the data it would have seen. The learning rate follows the larger of the shares of
steps and of minutes used up, so either limit ends a stage properly.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from check_clips import psnr
from diffusers.utils import logging
from tiny_wan_data import BACKGROUND_COLOURS, PANS, SHAPES, SPRITE_COLOURS, TEXTURES
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class LoopSettings:
    """What the loop itself needs to know."""

    seed: int = 0
    ema: float = 0.998
    warmup: int = 100  # steps
    log_every: int = 20
    check_minutes: float = 1.0  # between checkpoints, each with a look at held-out data


def build_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
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
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def noise_levels(batch: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """Stratified, so that every batch covers all noise levels, up to the noise alone that sampling begins with.

    ``shift`` above 1 leans them towards 1. Returns ``[batch]`` in [0, 1].
    """
    even = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return shift * even / (1 + (shift - 1) * even)


class Trainer:
    """One or more stages, their checkpoints and their log. ``kept``: what later stages need of earlier ones."""

    def __init__(self, settings: Any, out: Path, resume: bool) -> None:
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
        self.kept: dict[str, Any] = {}
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
    ) -> int:
        """Train ``model`` until its steps or minutes are used up, or ``check`` says that it is good enough.

        Returns the number of steps.

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
                        **self.kept,
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
        return step

    def fit_vae(
        self,
        model: nn.Module,
        averaged: nn.Module,
        heldout: torch.Tensor,
        loss_of: Callable[[nn.Module, int], tuple[torch.Tensor, torch.Tensor]],
        reconstruct: Callable[[Any, torch.Tensor], torch.Tensor],
    ) -> None:
        """The stage ``vae``: until held-out data in [0, 1] come back at ``vae_good_db``, or time is up.

        Args:
            model, averaged: An autoencoder ``vae`` with its loss, and the copy that follows it.
            reconstruct: Encodes and decodes such data with an autoencoder.
        """
        settings = self.settings

        def check(step: int) -> bool:
            with self.accelerator.autocast():
                decoded = reconstruct(averaged.vae, heldout)
            quality = self.agreed(psnr(decoded, heldout).mean().item())
            self.log(stage="vae", step=step, heldout_psnr_db=quality)
            return quality >= settings.vae_good_db

        step = self.fit(
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
        check(step)

    def save(self) -> None:
        """Write ``checkpoint.pt``, whole or not at all."""
        if self.accelerator.is_main_process:
            torch.save(self.state, self.out / "checkpoint.tmp")
            (self.out / "checkpoint.tmp").replace(self.out / "checkpoint.pt")

    def agreed(self, value: float) -> float:
        """The mean of a figure over all processes."""
        return self.accelerator.reduce(torch.tensor(value, device=self.device), "mean").item()


def plot_log(log: Path, picture: Path, looks: dict[str, tuple[str, str, str]]) -> None:
    """Draw every stage's loss and what was measured on held-out data.

    ``looks``: for each stage of the log, the title, the key of what was measured, and what that is called.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
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


def settings_from(doc: str | None, default: Any, smoke: Any) -> tuple[Any, argparse.Namespace]:
    """Settings from the command line: every number or switch of ``default`` is an option."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint, log and the finished model/ go here")
    parser.add_argument("--smoke", action="store_true", help="seconds on a CPU, to check the script")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    parser.add_argument("--start-from", type=Path, help="a finished folder whose weights to train further (stage two)")
    simple = {k: v for k, v in asdict(default).items() if isinstance(v, bool | int | float)}
    for name, value in simple.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(flag, type=type(value), default=None, help=f"default {value}")
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in simple if getattr(args, name) is not None}
    return replace(smoke if args.smoke else default, **given), args
