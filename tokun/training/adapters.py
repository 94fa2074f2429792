"""Fine-tuning with low rank (`config.adapter`): LoRA and DoRA by `peft`, put into the generator of the checkpoint that `start` names.

The base stands still, in float32 or, on NVIDIA GPUs, in 8 or 4 bits (bitsandbytes). Tags that it does not know get ids behind its own, and
rows that are trained beside the adapter. The result is no checkpoint but an adapter (`tokun.inference.adapters`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokun.config import Config, SamplingConfig
from tokun.data.framing import grid_text
from tokun.inference import adapters
from tokun.inference.adapters import Adapter
from tokun.inference.model import GENERATOR, Tokun, resolve
from tokun.inference.tags import TagCounts
from tokun.models.shares import collected, own_share
from tokun.tokenizers.vocabulary import STRUCTURE, TAG_KINDS, Vocabulary
from tokun.training.start import starting_model
from tokun.utils.errors import UserError
from tokun.utils.extras import need

SHAPE = {
    "hidden_size": "hidden_size", "head_dim": "head_dim", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "tie_embeddings": "tie_word_embeddings", "intermediate_size": "intermediate_size",
}  # fmt: skip
"""Of config.generator, as transformers call them."""


def goes_on(config: Config) -> bool:
    """Whether this run takes the shapes of the model that `start` names."""
    return bool(config.adapter.rank or config.dpo.pairs or config.words.train or config.grpo.rewards)


def check(config: Config, *, zero_stage: int = 0) -> None:
    """Raises UserError for what `config.adapter`, and what else goes on from a whole model, cannot be."""
    a = config.adapter
    if not goes_on(config):
        return
    if not config.start:
        what = (
            f"adapter.rank is {a.rank}"
            if a.rank
            else f"dpo.pairs is {config.dpo.pairs}"
            if config.dpo.pairs
            else f"words.train is {config.words.train}"
            if config.words.train
            else "grpo.rewards is set"
        )
        raise UserError(f"{what}, which needs a model that is there: name it with start=bundled, a folder or a Hub id")
    if config.generator.pretrained:
        raise UserError(f"start {config.start} and generator.pretrained {config.generator.pretrained} exclude each other: set one of them")
    if not a.rank:
        return
    if a.alpha <= 0 or not 0 <= a.dropout < 1:
        raise UserError(f"adapter.alpha is {a.alpha} and adapter.dropout {a.dropout}; alpha must be above 0, dropout in [0, 1)")
    if not a.targets:
        raise UserError("adapter.targets is empty: name layers such as [q_proj, v_proj], or leave it out for all of them")
    if a.bits not in (0, 4, 8):
        raise UserError(f"adapter.bits is {a.bits}; it is 8 or 4, or 0 for the base as it is")
    if a.bits and not torch.cuda.is_available():
        raise UserError(
            f"adapter.bits is {a.bits}, which bitsandbytes computes on NVIDIA GPUs, and there is none here: leave it out (adapter.bits=0)"
        )
    if a.bits and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"adapter.bits is {a.bits}, which needs bitsandbytes: pip install bitsandbytes, or adapter.bits=0")
    if a.bits and zero_stage == 3:
        raise UserError(
            f"adapter.bits is {a.bits}, and ZeRO stage 3 cannot cut such weights: take configs/deepspeed/zero1.json, or adapter.bits=0"
        )


def take_shape(config: Config) -> None:
    """Set what the base decides: the shapes of both networks, the grids, the longest caption. A config that goes on from it need not repeat them."""
    if not goes_on(config):
        return
    check(config)
    base = starting_model(config)
    config.image_tokenizer = dataclasses.replace(base.image_tokenizer.config)
    found = base.generator.config.get_text_config().to_dict()
    known = {name: found[its] for name, its in SHAPE.items() if found.get(its) is not None}
    config.generator = dataclasses.replace(config.generator, **known, codebook_start=False)
    several = [grid_text(grid) for grid in base.grids] if len(base.grids) > 1 else []
    if config.data.grids and config.data.grids != several:
        raise UserError(
            f"data.grids is {config.data.grids}, the base draws {several or grid_text(base.grids[0])}: leave it out, an adapter keeps the base's shapes"
        )
    config.data.grids = several
    config.data.fit = base.fit if several else config.data.fit
    config.data.max_caption_tokens = base.vocabulary.max_text
    usual = SamplingConfig()
    config.sampling = dataclasses.replace(  # what the config leaves as it is, the base decides
        base.defaults,
        **{name: value for name, value in vars(config.sampling).items() if name in ("n", "seed") or value != getattr(usual, name)},
    )


def vocabulary_of(base: Tokun, trained: Vocabulary, *, new_tags: bool) -> Vocabulary:
    """The base's ids, and behind them those of the tags in `trained` that it does not know. Raises UserError for a shape it does not know."""
    if strange := [grid for grid in trained.grids if grid not in base.grids]:
        raise UserError(
            f"the codes hold pictures of {', '.join(map(grid_text, strange))} codes, the base draws {', '.join(map(grid_text, base.grids))}"
        )
    if not new_tags:
        return base.vocabulary
    known = base.vocabulary.registers
    registers = [name for name in trained.registers if known and name not in known]
    return base.vocabulary.extended(styles=trained.styles, subjects=trained.subjects, things=trained.things, registers=registers)


@dataclass
class Tuned:
    """A generator with an adapter in it that is being trained."""

    config: Config
    generator: Any
    """As transformers have it, with peft's layers inside."""
    peft: Any
    vocabulary: Vocabulary
    base_fingerprint: str

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.generator.named_parameters() if p.requires_grad}

    @property
    def size(self) -> int:
        """How many parameters are trained. Before ZeRO-3 cuts them."""
        return sum(p.numel() for p in self.trained.values())

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """What is trained, by peft's names, on the CPU. Every process calls it; with cut weights only rank 0 gets them."""
        trained = self.trained
        whole = collected({name: own_share(p).detach() for name, p in trained.items()}, trained)
        if len(whole) < len(trained):
            return {}
        state = {adapters.FRONT + name: tensor.detach().float().cpu().clone() for name, tensor in whole.items()}
        return need("peft", extra="train").get_peft_model_state_dict(self.peft, state_dict=state, save_embedding_layers=False)

    def adapter(
        self, tensors: dict[str, Tensor], *, tag_counts: TagCounts = (), tasks: Sequence[str] = (), card: str = "", name: str = ""
    ) -> Adapter:
        """What is written and loaded, with these `tensors`. Without tag counts the base's hold."""
        settings = self.peft.peft_config["default"].to_dict() | {"inference_mode": True, "base_model_name_or_path": base_path(self.config)}
        plain = json.loads(
            json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else getattr(value, "value", str(value)))
        )
        return Adapter(
            name or Path(self.config.out).name, self.config.start, self.base_fingerprint, plain, tensors, self.vocabulary, self.config.sampling,
            list(tag_counts), tuple(tasks), card,
        )  # fmt: skip

    def write(self, whole: Tokun, folder: Path, card: str) -> None:
        """Fill a folder with the adapter that is in use in `whole`."""
        adapters.write(dataclasses.replace(whole.adapters[whole.adapter], card=card), folder)

    def say(self, say: Callable[[str], object]) -> None:
        new = self.vocabulary.appended
        say(
            f"adapter: rank {self.config.adapter.rank} on {self.config.start}, {self.size:,} parameters, {4 * self.size / 1e6:.2f} MB"
            + (f"; new tags {', '.join(new)}" if new else "")
        )

    def model(self, adapter: Adapter) -> Tokun:
        """The whole model as users will load it: the base from its files, and this adapter."""
        made = starting_model(self.config)
        if not adapter.tag_counts:
            adapter = dataclasses.replace(adapter, tag_counts=made.tag_counts)
        adapters.add(made, adapter)
        return made.use_adapter(adapter.name)


def base_path(config: Config) -> str | None:
    """Where plain peft finds the base, where that can be told."""
    return None if config.start == "bundled" else f"{config.start}/{GENERATOR}"


def attach(config: Config, base: Tokun, vocabulary: Vocabulary) -> Tuned:
    """Put an adapter into the base's generator (which is changed). First weights come from torch's global generator: seed it before the call.

    Raises UserError for targets that the generator does not have.
    """
    peft, a = need("peft", extra="train"), config.adapter
    made_on = adapters.fingerprint(base.generator, base.vocabulary)
    generator = base.generator if not a.bits else in_bits(config, peft)
    linear = {name.rpartition(".")[2] for name, module in generator.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    if strange := [name for name in a.targets if name not in linear]:
        raise UserError(f"adapter.targets names {', '.join(strange)}; the base's layers are {', '.join(sorted(linear))}")
    if config.train.gradient_checkpointing:
        generator.enable_input_require_grads()  # the embeddings stand still, and what is computed again needs an input with a gradient
    rows = new_rows(generator, base.vocabulary, vocabulary)
    settings = peft.LoraConfig(
        r=a.rank, lora_alpha=a.alpha, lora_dropout=a.dropout, target_modules=list(a.targets), use_dora=a.dora, bias="none",
        task_type="CAUSAL_LM", trainable_token_indices=rows,
    )  # fmt: skip
    return Tuned(config, generator, peft.get_peft_model(generator, settings), vocabulary, made_on)


@torch.no_grad()
def new_rows(generator: Any, known: Vocabulary, vocabulary: Vocabulary) -> dict[str, list[int]] | None:
    """Make rows for the tags that are new, each beginning as the mean of its kind's. Returns what peft's `trainable_token_indices` takes."""
    ids = [vocabulary.id(name) for name in vocabulary.appended if name not in known.appended]
    if not ids:
        return None
    adapters.make_rows(generator, vocabulary.size)
    table, head = generator.get_input_embeddings(), generator.get_output_embeddings()
    tied = head is None or head.weight is table.weight
    for layer in (table,) if tied else (table, head):
        for token in ids:
            kind = vocabulary.name(token)[1:-1].partition(":")[0]
            kin = [known.id(name) for name in known.controls if name.startswith(f"<{kind}:")] or [
                known.id(name) for name in known.controls if name not in STRUCTURE and name[1:].partition(":")[0] in TAG_KINDS
            ]
            layer.weight[token] = layer.weight[kin or list(range(known.code_offset))].mean(0)
    names = {module: name for name, module in generator.named_modules()}
    return {names[layer]: ids for layer in ((table,) if tied else (table, head))}


def in_bits(config: Config, peft: Any) -> Any:
    """The base's generator with its matrices in 8 or 4 bits, on this process's GPU."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = config.adapter.bits == 4
    settings = BitsAndBytesConfig(
        load_in_8bit=not four, load_in_4bit=four, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )  # fmt: skip
    folder = resolve(None if config.start == "bundled" else config.start) / GENERATOR
    generator = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": torch.cuda.current_device()}, use_safetensors=True, trust_remote_code=False
    )  # fmt: skip
    return peft.prepare_model_for_kbit_training(generator, use_gradient_checkpointing=config.train.gradient_checkpointing)


def card(config: Config, record: dict[str, Any], tuned: Tuned, *, about: str = "", figures: Sequence[tuple[str, str]] = ()) -> str:
    """The adapter's README.md, with the Hub's front matter. `record`: steps, seconds, parameters; `figures`: rows of its table."""
    a, t, name = config.adapter, config.train, Path(config.out).name
    front = ["library_name: peft", *([f"license: {config.card.license}"] if config.card.license else [])]
    front += [
        *([f"base_model: {config.start}"] if config.start.count("/") == 1 and not Path(config.start).exists() else []),
        "tags: [tokun, lora]",
    ]
    new = ", ".join(f"`{tag}`" for tag in tuned.vocabulary.appended)
    table = "\n".join(f"| {what} | {value} |" for what, value in figures)
    kind = f"{'DoRA' if a.dora else 'LoRA'} of rank {a.rank}, alpha {a.alpha:g}, dropout {a.dropout:g}, on {', '.join(a.targets)}"
    return f"""---
{chr(10).join(front)}
---

# {name}

{about or "An adapter for a tokun model."} It changes the base **{config.start}** (fingerprint `{tuned.base_fingerprint[:16]}…`) and no other.

```python
import tokun
model = tokun.load({"" if config.start == "bundled" else repr(config.start) + ", "}adapter="{name}")
```

With plain peft: `PeftModel.from_pretrained(generator, FOLDER)` on the base's `generator`{f", after `generator.resize_token_embeddings({tuned.vocabulary.size})` for its new tags" if new else ""}.

## Recipe

- {kind}{f", over a base in {a.bits} bits" if a.bits else ""}: {record["trained"]:,} parameters trained of {record["parameters"]:,}.
- New tags: {new or "none"}.
- {record["steps"]} steps of {t.batch_size}, peak learning rate {t.lr:g}, {record["seconds"] / 60:.1f} minutes.

## Figures

| figure | value |
| --- | --- |
{table}
"""
