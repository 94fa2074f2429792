"""The README.md of a checkpoint: training data, recipe and measured figures, from the run's record, or its changes to its base model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tokun.config import Config
from tokun.inference.description import OF_BASE, front_matter, title, without_base
from tokun.inference.folders import is_bundled

OWN_ID = "PATH-OR-ID"  # placeholder for the model's own name in a card; pushing to the Hub fills it in


def model_card(
    config: Config, record: dict[str, Any], *, about: str = "", data: str = "", limits: str = "", recipe: str = "", table: str = ""
) -> str:
    """Markdown with the Hub's front matter. `record` is training.json; `table`: the figures of tokun.evaluate;
    the other texts are written by people."""
    m, g, t = config.image_tokenizer, config.generator, config.train
    side = m.image_size // m.downsample
    grids = config.data.grids
    shapes = (
        f"{len(grids)} shapes ({', '.join(grids)} codes, rows x columns, a code for {m.downsample}x{m.downsample} px)"
        if grids
        else f"{m.image_size} px, {side}x{side} codes"
    )
    figures = record["image_tokenizer"]
    held_out = "held-out " if config.data.val else "training "
    # without its run's record a checkpoint's figures are in `table`
    rows = (
        [
            (f"image tokenizer, {held_out}PSNR", f"{figures['psnr']:.2f} dB"),
            ("image tokenizer, codebook used", f"{figures['usage']:.1%} of {m.codebook_size}"),
            ("image tokenizer, code perplexity", f"{figures['perplexity']:.0f}"),
        ]
        if figures
        else []
    )
    if record["val"]:
        rows += [
            ("generator, held-out nats per image token", f"{record['val']['image_loss']:.3f}"),
            ("generator, held-out nats per text token", f"{record['val']['text_loss']:.3f}"),
        ]
    lines = "\n".join(["| figure | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]) if rows else ""
    measured = "".join(f"\n{part}\n" for part in ("## Figures", lines, table.strip()) if part) if lines or table else ""
    minutes = record["seconds"] / 60
    spent = "less than a minute" if minutes < 1 else f"{minutes:.0f} minutes" if minutes < 300 else f"{minutes / 60:.0f} hours"
    held = f", held for {t.lr_hold:.0%} of the time" if t.lr_hold else ""
    licence = f"\n{yaml_line({'license': config.card.license})}" if config.card.license else ""
    counts = record["settings"]["counts"]
    trained_on = f"{counts.get('train', 0):,} pictures with captions to train" + (
        f", {counts['val']:,} held out" if counts.get("val") else ", none held out"
    )
    start = "the bundled engraving model" if is_bundled(config.start) else public(config.start)
    known = (
        f"on the data above, and before on that of {start}"
        if start
        else f"on the data above, and before on that of {public(g.pretrained)}"
        if g.pretrained
        else "on the data above and nothing else"
    )
    kept = f"; that of {start}, as it was" if start else ""
    image_tokenizer = f"convolutional VQ-VAE, {'grayscale' if m.image_channels == 1 else 'RGB'}, {shapes}"
    codebook = f"a codebook of {m.codebook_size} ({m.quantizer}){kept}"
    network = f"started from {public(g.pretrained)}" if g.pretrained else f"Qwen3, {g.num_layers} layers of width {g.hidden_size}"
    generator = f"{f'went on from {start}, ' if start else ''}{network}, {record['parameters'] / 1e6:.1f}M parameters, dropout {g.dropout}"
    optimizer = "Muon and AdamW" if t.optimizer == "muon" else "AdamW"
    schedule = f"{optimizer}, peak learning rate {t.lr:g}{held}, weight decay {t.weight_decay}, EMA {t.ema_decay}"
    tasks = ", ".join(f"{k} {v:g}" for k, v in t.task_mix.items())
    dropped = f"tag dropout {t.tag_dropout}{f', word dropout {t.word_dropout}' if t.word_dropout else ''}"
    aligned = f"- Aligned with SqueezeNet's features of the pictures, weight {t.align_weight:g}.\n" if t.align_weight else ""
    more = f"{aligned}{f'- {recipe}{chr(10)}' if recipe else ''}"
    tags = ["tokun", "vq-vae", "autoregressive", "image-captioning", *filter(None, [config.data.style])]
    return f"""---
library_name: tokun{licence}
pipeline_tag: text-to-image
tags: {yaml_line(tags)}
---

# {config.tracking.name or Path(config.out).name}

{about or "A tokun model: from one seed it makes a picture and the caption that describes it, in one sequence."}

```python
import tokun
image, caption = tokun.load("{OWN_ID}")(seed=42)
```

## Data

{data or f"{trained_on} (shards: `{public(config.data.train) or 'toy pictures drawn by code'}`)."}

## Recipe

- Image tokenizer: {image_tokenizer}, {codebook}.
- Generator: {generator}.
- {record["steps"]:,} steps of {t.batch_size} sequences, {schedule}, {spent}.
- Tasks: {tasks}; {dropped}.
{more}{measured}
## Limits

{limits or f"Trained for one purpose, {known}: it knows no other styles or words, and it repeats its data's bias."}
"""


def built_on(base: str, base_card: str, *, name: str, about: str, own: str = "", front: Sequence[str] = ()) -> str:
    """The card of a model made from `base` (a folder, a Hub id, "bundled") by a change, such as a merged adapter.

    `name`: its title; `about`: what it is; `own`: sections of Markdown about the change, with its figures; `front`: lines of the front
    matter. The base's card follows under a heading that names the base: its figures were measured before the change.
    """
    base = public(base)
    known = title(base_card) or base
    tags = front_matter(base_card, "tags") or "[tokun]"
    licence = front_matter(base_card, "license")
    parts = [
        "\n".join(["---", "library_name: tokun", *front, "pipeline_tag: text-to-image", f"tags: {tags}", "---"]),
        f"# {name}",
        about.strip(),
        f'```python\nimport tokun\nimage, caption = tokun.load("{OWN_ID}")(seed=42)\n```',
        own.strip(),
        f"{OF_BASE} {known}",
        "What follows is the base's card. **Its data, recipe and figures are those of the base alone, before the change; "
        f"none was measured on this model.**{f' The licence of the base: {licence}.' if licence else ''}",
        _demoted(body(base_card)).replace(OWN_ID, base).strip() or f"The base `{base}` has no card.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def changed_card(config: Config, base_card: str, *, about: str, own: str = "") -> str:
    """The card of a run that trained all weights of its `start` on something other than pictures: preferences, rewards, words."""
    known = title(base_card) or public(config.start)
    licence = [yaml_line({"license": config.card.license})] if config.card.license else []
    return built_on(
        config.start, base_card, name=config.tracking.name or Path(config.out).name, about=f"This is **{known}**, trained further. {about}",
        own=own, front=licence,
    )  # fmt: skip


def merged_card(base: str, base_card: str, adapter: str, adapter_card: str, described: str) -> str:
    """The card of `base` with the adapter of that name merged into its weights. `described`: the adapter in one line
    (`adapters.described`)."""
    own = without_base(adapter_card)
    intro = next((text for part in body(own).split("\n\n") if (text := part.strip()) and not text.startswith(("#", "```"))), "")
    trained = intro.partition(" It changes the base ")[0].rstrip() or "The adapter has no card: what it was trained on is not recorded."
    known = title(base_card) or public(base)
    sections = re.search(r"^## .*", own, re.MULTILINE | re.DOTALL)
    kept = [f"{key}: {value}" for key in ("license", "base_model") if (value := front_matter(own, key))]
    about = f"This is **{known}** with the adapter **{adapter}** merged into its weights. Of the adapter: {trained}"
    return built_on(
        base, base_card, name=f"{known}, with the adapter {adapter} merged in", about=about, front=kept,
        own="\n\n".join([f"## The adapter\n\n{described.replace(base, public(base))}", *([_demoted(sections[0])] if sections else [])]),
    )  # fmt: skip


def body(card: str) -> str:
    """A card without its front matter and its title."""
    return re.sub(r"^# .*\n", "", re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL), count=1, flags=re.MULTILINE)


def _demoted(text: str) -> str:
    """The Markdown with its headings one level lower; lines of code are unchanged."""
    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else re.sub(r"^(#{1,5} )", r"#\1", part, flags=re.MULTILINE) for part in parts)


def yaml_line(value: Any) -> str:
    """A value as YAML, in one line, and quoted if YAML would read it as something else."""
    return yaml.safe_dump(value, default_flow_style=isinstance(value, list), allow_unicode=True, width=2**20).strip()


def public(path: str) -> str:
    """A path or pattern for others to read: at most the last two parts of an absolute path,
    without the home folder that it may begin with."""
    parts = ((part, Path(part).parts[3 if part.startswith("/") else 1 :]) for part in path.split(","))
    return ",".join("/".join(below[-2:]) or Path(part).name if part.startswith(("/", "~")) else part for part, below in parts)
