"""Sharpen a trained model: fine-tune its image decoder alone, against a discriminator.

    tokun sharpen --checkpoint runs/mine --train 'shards/train-*.tar' --out runs/mine-sharp --minutes 30

Encoder and codebook are frozen, so every picture keeps its codes, and the generator is unchanged: a seed gives the same codes
and the same words, and the picture has finer lines. The losses are the image tokenizer's (Esser et al. 2021: L1, perceptual, PatchGAN
with adaptive weight; lines as in `losses.line_loss`), without the squared error, which averages over all possible hatchings.
With --code-noise the decoder also learns from codes with errors that are typical of the generator.
Resumable: the same command continues from the last state. One process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tokun import data
from tokun.data import cropping
from tokun.inference.checkpoint_folder import read_settings
from tokun.inference.folders import IMAGE_TOKENIZER, SAMPLING, VOCABULARY, resolve
from tokun.inference.load import load
from tokun.inference.model import Tokun
from tokun.inference.tags import settings_json
from tokun.models import losses
from tokun.tokenizers import sequences
from tokun.tokenizers.image import ImageTokenizer
from tokun.tokenizers.vocabulary import Vocabulary
from tokun.training import optim
from tokun.training.loop import step_seed
from tokun.utils import checkpoint, console
from tokun.utils.console import home_path
from tokun.utils.errors import UserError
from tokun.utils.lock import alone_in

DISCRIMINATOR_AHEAD = 100  # steps that train the discriminator alone first


@dataclass(frozen=True)
class Recipe:
    steps: int = 3000
    minutes: float = 0.0  # stop earlier; 0: never
    batch_size: int = 32
    lr: float = 4e-4
    gan_lr: float = 4e-4
    l1_weight: float = 1.0
    perceptual: str = "squeezenet"  # or lpips, none
    perceptual_weights: str = ""
    perceptual_weight: float = 1.0
    line_weight: float = 0.3
    gan_weight: float = 0.5
    ema_decay: float = 0.995
    crop_scale: tuple[float, float] = (1.0, 1.4)
    seed: int = 0
    save_every: int = 200  # steps
    code_noise: float = 0.0  # up to this share of the codes, in half of the pictures, is sampled anew by the generator


def make_parser() -> argparse.ArgumentParser:
    parser = console.make_parser("python -m tokun.sharpen", __doc__)
    parser.add_argument("--checkpoint", default=None, help="a folder or a Hub id; default: the bundled model")
    parser.add_argument("--train", required=True, help="image shards, as in data.train")
    parser.add_argument("--out", type=home_path, required=True, help="folder of the new checkpoint")
    parser.add_argument("--device", default=None, help="cpu, cuda …; default: a GPU if there is one")
    for field in dataclasses.fields(Recipe):
        if field.name != "crop_scale":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default, help="%(default)s")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe) if hasattr(args, field.name)})
    sharpen(args.checkpoint, args.train, args.out, recipe, device=args.device)


def sharpen(source: str | Path | None, shards: str, out: Path, recipe: Recipe, *, device: str | None = None) -> Path:
    """Train the decoder of the checkpoint `source` on image shards -> the checkpoint `out`, otherwise unchanged.

    Raises UserError if `out` exists or was started with other settings, and whatever `tokun.load` raises.
    """
    folder = out.with_name(out.name + "-state")
    with alone_in(folder, option="--out"):
        if out.exists():
            raise UserError(f"{out} already exists; name a new folder, or remove it")
        return _sharpen(source, shards, out, recipe, checkpoint.TrainerStates(folder), device=device)


def _sharpen(
    source: str | Path | None, shards: str, out: Path, recipe: Recipe, states: checkpoint.TrainerStates, *, device: str | None
) -> Path:
    """`sharpen`, with the lock on the folder of its states held."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = resolve(source)
    tokenizer = ImageTokenizer.load(folder / IMAGE_TOKENIZER).to(device)
    made_with = {
        "recipe": {k: v for k, v in dataclasses.asdict(recipe).items() if k not in ("minutes", "save_every") and (v or k != "code_noise")},
        "from": tokenizer.fingerprint(),
    }
    grids = Vocabulary.load(folder / VOCABULARY).grids
    fit = read_settings(folder / SAMPLING).fit or cropping.usual_fit(grids)
    resample = ResampledCodes(load(folder, device=device), recipe.code_noise) if recipe.code_noise else None
    several = grids if grids != (tokenizer.grid,) else None  # with one square grid, pictures are cropped as for a model of squares
    trainer = Trainer(tokenizer, shards, recipe, several, fit, resample)
    trainer.resume(states, made_with)
    trainer.run(states, made_with)
    with checkpoint.whole_directory(out) as new:
        shutil.copytree(folder, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns(IMAGE_TOKENIZER))
        tokenizer.cpu().save(new / IMAGE_TOKENIZER)
        settings = json.loads((new / SAMPLING).read_text(encoding="utf-8"))
        (new / SAMPLING).write_text(settings_json(settings | {"image_tokenizer": tokenizer.fingerprint()}), encoding="utf-8")
        earlier = checkpoint.read_record(folder / "sharpened.json") or {"steps": 0, "seconds": 0}
        done = {"steps": earlier["steps"] + trainer.step, "seconds": earlier["seconds"] + round(trainer.spent)}
        checkpoint.write_record(new / "sharpened.json", {**made_with, **done})
    states.clear()
    return out


class ResampledCodes:
    """Codes with errors typical of the generator (Qiu et al. 2025, "Image Tokenizer Needs Post-Training").

    In half of the pictures, the generator samples up to the share `most` of the codes anew, each given the picture's own codes before it. A
    decoder that learns from them tolerates these errors in sampled pictures. Raises UserError for a share outside 0 … 1.
    """

    def __init__(self, model: Tokun, most: float):
        if not 0 < most <= 1:
            raise UserError(f"--code-noise is {most:g}; it must be a share between 0 and 1")
        self.generator, self.vocabulary, self.most = model.generator.eval(), model.vocabulary, most

    @torch.no_grad()
    def __call__(self, codes: Tensor, grid: cropping.Grid, rng: torch.Generator) -> Tensor:
        """codes int64 (B, N) of one grid -> the same with some sampled anew."""
        v, (rows, n) = self.vocabulary, codes.shape
        ids = sequences.unconditional_images(v, grid, codes)
        with torch.autocast(codes.device.type, torch.bfloat16):
            logits = self.generator(input_ids=ids, use_cache=False).logits[:, -n:, v.code_range].float()

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=rng, device=codes.device)

        sampled = (logits - uniform(*logits.shape).clamp_min(1e-20).log().neg().log()).argmax(-1)
        share = self.most * uniform(rows, 1) * (uniform(rows, 1) < 0.5)
        return torch.where(uniform(rows, n) < share, sampled, codes)


class Trainer:
    """The decoder, its discriminator, and their progress."""

    def __init__(
        self, tokenizer: ImageTokenizer, shards: str, recipe: Recipe, grids: tuple[cropping.Grid, ...] | None = None, fit: str = "auto",
        resample: ResampledCodes | None = None,
    ):  # fmt: skip
        c, self.recipe, self.tokenizer, self.resample = tokenizer.config, recipe, tokenizer.eval(), resample
        self.device = next(tokenizer.parameters()).device
        shapes = {} if grids is None else {"grids": grids, "downsample": c.downsample, "fit": fit}
        samples = data.ImageSamples.open(
            shards, image_size=c.image_size, channels=c.image_channels, cache_gb=4.0, max_scale=recipe.crop_scale[1], **shapes
        )
        self.batches = data.ImageBatches(samples, batch_size=recipe.batch_size, scale=recipe.crop_scale, seed=recipe.seed)
        torch.manual_seed(recipe.seed)
        self.discriminator = losses.PatchDiscriminator(c.image_channels).to(self.device)
        self.perceptual = losses.make_perceptual(recipe.perceptual, recipe.perceptual_weights).to(self.device)
        tokenizer.requires_grad_(False)
        self.decoder = tokenizer.decoder.requires_grad_(True)
        self.optimizer = optim.make_adamw(self.decoder, lr=recipe.lr, betas=(0.5, 0.95), weight_decay=0.0)
        self.gan_optimizer = torch.optim.AdamW(
            self.discriminator.parameters(), lr=recipe.gan_lr, betas=(0.5, 0.9), weight_decay=0.0, fused=True
        )
        self.ema = optim.Ema(self.decoder, recipe.ema_decay)
        self.step, self.spent = 0, 0.0

    def run(self, states: checkpoint.TrainerStates, made_with: dict[str, Any]) -> None:
        """Train until the steps or minutes are over; then the decoder holds the averaged weights.

        Not `training.loop.train`: it needs a run with config, tracker and a folder of its own, and keeps states there, so that a sharpening
        begun by an earlier version could not be resumed.
        """
        r, begun = self.recipe, time.monotonic() - self.spent
        stream = data.prefetch(self.batches, self.step)
        bar = tqdm(total=r.steps, initial=self.step, desc="decoder", unit="step", dynamic_ncols=True)
        while (progress := max(self.step / r.steps, self.spent / 60 / r.minutes if r.minutes else 0.0)) < 1:
            factor = optim.warmup_cosine(self.step, progress=progress, warmup=50)
            optim.set_lr(self.optimizer, r.lr * factor)
            optim.set_lr(self.gan_optimizer, r.gan_lr * factor)
            terms = self.learn(next(stream).to(self.device))
            self.step, self.spent = self.step + 1, time.monotonic() - begun
            bar.update(1)
            if self.step % 20 == 0:
                bar.set_postfix_str(" ".join(f"{name} {value.item():.3f}" for name, value in terms.items()))
            if self.step % r.save_every == 0:
                with checkpoint.whole_directory(states.path(self.step)) as folder:
                    torch.save({**self.state(), "made_with": json.dumps(made_with)}, folder / "state.pt")
                states.prune()
        bar.close()
        stream.close()
        self.ema.copy_to(self.decoder)

    def learn(self, real: Tensor) -> dict[str, Tensor]:
        """One step of decoder and discriminator on pictures (B, C, H, W) -> the loss terms."""
        r, t = self.recipe, self.tokenizer
        with torch.no_grad():
            codes = t.encode(real)
            grid = (real.shape[2] // t.config.downsample, real.shape[3] // t.config.downsample)
            if self.resample:
                codes = self.resample(codes, grid, torch.Generator(self.device).manual_seed(step_seed(r.seed, self.step, 0)))
            latents = t.vectors_of(t.order[codes]).transpose(1, 2).reshape(len(real), -1, *grid)
        with torch.autocast(self.device.type, torch.bfloat16):
            made = self.decoder(latents)
            distance = self.perceptual(made, real) if r.perceptual_weight else real.new_zeros(())
        made = made.float()
        terms = {"l1": (made - real).abs().mean(), "perceptual": distance.float(), "lines": losses.line_loss(made, real)}
        base = r.l1_weight * terms["l1"] + r.perceptual_weight * terms["perceptual"] + r.line_weight * terms["lines"]
        loss = base
        if self.step >= DISCRIMINATOR_AHEAD and r.gan_weight:
            self.discriminator.requires_grad_(False)
            terms["adversarial"] = losses.adversarial_loss(self.discriminator(made))
            loss = loss + r.gan_weight * losses.adaptive_weight(base, terms["adversarial"], self.decoder.last.weight) * terms["adversarial"]
            self.discriminator.requires_grad_(True)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {self.step}: {dict((k, v.item()) for k, v in terms.items())}. "
                "Lower --lr or --gan-weight"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update(self.decoder)
        with torch.autocast(self.device.type, torch.bfloat16):
            judged = self.discriminator(torch.cat([real, made.detach()])).float()
        terms["discriminator"] = losses.discriminator_loss(*judged.chunk(2))
        self.gan_optimizer.zero_grad(set_to_none=True)
        terms["discriminator"].backward()
        self.gan_optimizer.step()
        return terms

    def state(self) -> dict[str, Any]:
        return {
            "decoder": self.decoder.state_dict(), "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(), "gan_optimizer": self.gan_optimizer.state_dict(),
            "ema": self.ema.state_dict(), "step": self.step, "spent": self.spent,
        }  # fmt: skip

    def resume(self, states: checkpoint.TrainerStates, made_with: dict[str, Any]) -> None:
        """Resume from the last state, if there is one. Raises UserError if it was made with other settings."""
        latest = states.latest()
        if latest is None:
            return
        path = states.path(latest)
        state = torch.load(path / "state.pt", map_location=self.device, weights_only=True)
        checkpoint.require_same(path, json.loads(state["made_with"]), json.loads(json.dumps(made_with)))
        for name in ("decoder", "discriminator", "optimizer", "gan_optimizer", "ema"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.spent = state["step"], state["spent"]


if __name__ == "__main__":
    console.run("tokun.sharpen", main)
