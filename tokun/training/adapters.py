"""Low-rank fine-tuning (`config.adapter`): LoRA and DoRA with `peft`, in the generator of the checkpoint that `start` names.

The base is frozen, in float32 or in 8 or 4 bits (bitsandbytes). Tags that it does not know get new ids after its own, and
rows that are trained with the adapter. The result is an adapter (`tokun.inference.adapters`), not a checkpoint.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokun.config import Config, Fit, SamplingConfig
from tokun.data.cropping import grid_text
from tokun.inference import adapters
from tokun.inference.adapters import Adapter
from tokun.inference.folders import GENERATOR, is_bundled, resolve
from tokun.inference.model import Tokun
from tokun.inference.tags import TagCount
from tokun.models.partitioned_parameters import collected, own_share
from tokun.tokenizers.vocabulary import STRUCTURE, TAG_KINDS, Vocabulary
from tokun.training.initial_checkpoint import starting_model
from tokun.utils.errors import UserError, first_line
from tokun.utils.optional_packages import need

SHAPE = {
    "hidden_size": "hidden_size", "head_dim": "head_dim", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "tie_embeddings": "tie_word_embeddings", "intermediate_size": "intermediate_size",
}  # fmt: skip
"""Fields of config.generator -> their names in transformers."""


def is_on_pictures(config: Config) -> bool:
    """Whether this run trains on pictures; otherwise its one stage trains the model that `start` names."""
    return not (config.grpo.rewards or config.dpo.pairs or config.words.train)


def starts_from_base(config: Config) -> bool:
    """Whether this run takes the shapes of the model that `start` names."""
    return bool(config.adapter.rank) or not is_on_pictures(config)


def check(config: Config, *, zero_stage: int = 0) -> None:
    """Raise UserError for invalid settings of `config.adapter` and of other trainings that start from a whole model."""
    a = config.adapter
    if not starts_from_base(config):
        return
    if not config.start:
        named = {"adapter.rank": a.rank, "dpo.pairs": config.dpo.pairs, "words.train": config.words.train}
        what = next((f"{name} is {value}" for name, value in named.items() if value), "grpo.rewards is set")
        raise UserError(f"{what}, which needs a trained model: name it with start=bundled, a folder or a Hub id")
    if config.generator.pretrained:
        raise UserError(
            f"start {config.start} and generator.pretrained {config.generator.pretrained} exclude each other: set only one of them"
        )
    if not a.rank:
        return
    if a.alpha <= 0 or not 0 <= a.dropout < 1:
        raise UserError(f"adapter.alpha is {a.alpha} and adapter.dropout {a.dropout}; alpha must be above 0, dropout in [0, 1)")
    if not a.targets:
        raise UserError("adapter.targets is empty: name layers such as [q_proj, v_proj], or leave it out for all of them")
    if a.bits not in (0, 4, 8):
        raise UserError(f"adapter.bits is {a.bits}; it must be 8 or 4, or 0 for an unquantized base")
    if a.bits and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"adapter.bits is {a.bits}, which needs bitsandbytes: pip install 'tokun[bits]', or adapter.bits=0")
    if a.bits and zero_stage == 3:
        raise UserError(
            f"adapter.bits is {a.bits}, and ZeRO stage 3 cannot partition such weights: use configs/deepspeed/zero1.json, or adapter.bits=0"
        )


def take_shape(config: Config) -> Tokun | None:
    """Take the base's settings: the shapes of both networks, the grids, the longest caption.

    The config need not repeat them. Returns the base.
    """
    if not starts_from_base(config):
        return None
    check(config)
    base = starting_model(config)
    config.image_tokenizer = dataclasses.replace(base.image_tokenizer.config)
    found = base.generator.config.get_text_config().to_dict()
    known = {name: found[its] for name, its in SHAPE.items() if found.get(its) is not None}
    config.generator = dataclasses.replace(config.generator, **known, codebook_start=False)
    grids = [grid_text(grid) for grid in base.grids]
    several = grids if len(grids) > 1 else []
    if config.data.grids and config.data.grids != several:
        raise UserError(
            f"data.grids is {config.data.grids}, the base's is {several or grids[0]}: leave it out, an adapter keeps the base's shapes"
        )
    config.data.grids = several
    config.data.fit = cast(Fit, base.fit) if several else config.data.fit
    config.data.max_caption_tokens = base.vocabulary.max_text
    usual = SamplingConfig()
    named = {"n", "seed"} | config.sampling_given  # the others, left at their defaults, come from the base
    config.sampling = dataclasses.replace(
        base.defaults, **{name: value for name, value in vars(config.sampling).items() if name in named or value != getattr(usual, name)}
    )
    return base


def vocabulary_of(base: Tokun, trained: Vocabulary, *, new_tags: bool) -> Vocabulary:
    """The base's ids, followed by those of new tags in `trained`. Raises UserError for a grid that the base does not have."""
    if unknown := [grid for grid in trained.grids if grid not in base.grids]:
        raise UserError(
            f"the codes hold pictures of {', '.join(map(grid_text, unknown))} codes, "
            f"but the base has only {', '.join(map(grid_text, base.grids))}"
        )
    if not new_tags:
        return base.vocabulary
    known = base.vocabulary.registers
    registers = [name for name in trained.registers if known and name not in known]
    return base.vocabulary.extended(styles=trained.styles, subjects=trained.subjects, things=trained.things, registers=registers)


@dataclass
class Tuned:
    """A generator whose adapter is being trained."""

    config: Config
    generator: Any
    """The transformers model, with peft's layers inside."""
    peft: Any
    vocabulary: Vocabulary
    base_fingerprint: str

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.generator.named_parameters() if p.requires_grad}

    @property
    def size(self) -> int:
        """How many parameters are trained. Valid before ZeRO-3 partitions them."""
        return sum(p.numel() for p in self.trained.values())

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors, by peft's names, on the CPU. A collective call; with partitioned weights only rank 0 gets them."""
        trained = self.trained
        whole = collected({name: own_share(p).detach() for name, p in trained.items()}, trained)
        if len(whole) < len(trained):
            return {}
        state = {adapters.FRONT + name: tensor.detach().float().cpu().clone() for name, tensor in whole.items()}
        return need("peft", extra="train").get_peft_model_state_dict(self.peft, state_dict=state, save_embedding_layers=False)

    def adapter(
        self,
        tensors: dict[str, Tensor],
        *,
        tag_counts: Sequence[TagCount] = (),
        tasks: Sequence[str] = (),
        question_wordings: tuple[str, ...] | None = None,
    ) -> Adapter:
        """The adapter with these `tensors`, as it is loaded. Without tag counts or wordings of questions, the base's apply."""
        base = None if is_bundled(self.config.start) else f"{self.config.start}/{GENERATOR}"  # for plain peft
        settings = self.peft.peft_config["default"].to_dict() | {"inference_mode": True, "base_model_name_or_path": base}
        plain = json.loads(
            json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else getattr(value, "value", str(value)))
        )
        return Adapter(
            Path(self.config.out).name, self.config.start, self.base_fingerprint, plain, tensors, self.vocabulary,
            self.config.sampling, list(tag_counts), tuple(tasks), question_wordings,
        )  # fmt: skip

    def write(self, whole: Tokun, folder: Path, card: str) -> None:
        """Write the active adapter of `whole` to a folder."""
        adapters.write(dataclasses.replace(whole.adapters[whole.adapter], card=card), folder)

    def say(self, say: Callable[[str], object]) -> None:
        new = self.vocabulary.appended
        say(
            f"adapter: rank {self.config.adapter.rank} on {self.config.start}, {self.size:,} parameters, {4 * self.size / 1e6:.2f} MB"
            + (f"; new tags {', '.join(new)}" if new else "")
        )

    def model(self, adapter: Adapter, base: Tokun | None = None) -> Tokun:
        """The whole model as users load it: the base with this adapter. `base`: unchanged since it was loaded; None: it is loaded."""
        made = starting_model(self.config) if base is None else copy.copy(base)
        made.adapters = {}
        if not adapter.tag_counts:
            adapter = dataclasses.replace(adapter, tag_counts=made.tag_counts)
        adapters.add(made, adapter)
        return made.use_adapter(adapter.name)


def attach(config: Config, base: Tokun, vocabulary: Vocabulary) -> Tuned:
    """Add an adapter to the base's generator, in place. Initial weights come from torch's global generator: seed it before the call.

    Raises UserError for targets that the generator does not have.
    """
    peft, a = need("peft", extra="train"), config.adapter
    made_on = adapters.fingerprint(base.generator, base.vocabulary)
    generator = base.generator if not a.bits else quantized_generator(config, peft)
    linear = {name.rpartition(".")[2] for name, module in generator.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    if unknown := [name for name in a.targets if name not in linear]:
        raise UserError(f"adapter.targets names {', '.join(unknown)}; the base's layers are {', '.join(sorted(linear))}")
    if config.train.gradient_checkpointing:
        generator.enable_input_require_grads()  # the embeddings are frozen, and recomputation needs an input with a gradient
    rows = new_rows(generator, base.vocabulary, vocabulary)
    settings = peft.LoraConfig(
        r=a.rank, lora_alpha=a.alpha, lora_dropout=a.dropout, target_modules=list(a.targets), use_dora=a.dora, bias="none",
        task_type="CAUSAL_LM", trainable_token_indices=rows,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that it will give up
        tuned = peft.get_peft_model(generator, settings)
    return Tuned(config, generator, tuned, vocabulary, made_on)


@torch.no_grad()
def new_rows(generator: Any, known: Vocabulary, vocabulary: Vocabulary) -> dict[str, list[int]] | None:
    """Add rows for new tags, each initialised to the mean of its kind. Returns the value for peft's `trainable_token_indices`."""
    ids = [vocabulary.id(name) for name in vocabulary.appended if name not in known.appended]
    if not ids:
        return None
    adapters.make_rows(generator, vocabulary.size)
    table, head = generator.get_input_embeddings(), generator.get_output_embeddings()
    tied = head is None or head.weight is table.weight
    layers = [layer for layer in (table, None if tied else head) if layer is not None]
    for layer in layers:
        for token in ids:
            kind = vocabulary.name(token)[1:-1].partition(":")[0]
            kin = [known.id(name) for name in known.controls if name.startswith(f"<{kind}:")] or [
                known.id(name) for name in known.controls if name not in STRUCTURE and name[1:].partition(":")[0] in TAG_KINDS
            ]
            layer.weight[token] = layer.weight[kin or list(range(known.code_offset))].mean(0)
    names = {module: name for name, module in generator.named_modules()}
    return {names[layer]: ids for layer in layers}


def quantized_generator(config: Config, peft: Any) -> Any:
    """The base's generator with its matrices in 8 or 4 bits, on this process's GPU or on the CPU.
    Raises UserError where bitsandbytes does not run."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = config.adapter.bits == 4
    settings = BitsAndBytesConfig(
        load_in_8bit=not four, load_in_4bit=four,
        bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    folder, device = resolve(config.start) / GENERATOR, torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    try:
        generator = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings, device_map={"": device}, use_safetensors=True, trust_remote_code=False
        )
    except torch.OutOfMemoryError:
        raise
    except (ImportError, NotImplementedError, RuntimeError) as error:  # what transformers and bitsandbytes raise
        raise UserError(
            f"adapter.bits is {config.adapter.bits}, and bitsandbytes does not run here ({first_line(error)}): "
            "update it, or set adapter.bits=0"
        ) from error
    # held-out losses would pack the weights for a kernel without gradients, also for the steps after them
    for layer in generator.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return peft.prepare_model_for_kbit_training(generator, use_gradient_checkpointing=config.train.gradient_checkpointing)


def held_out_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of a card: the held-out losses of a record after training and, where they were measured, before it."""
    kinds, when = ("image", "text"), (("val", ""), ("val_before", ", before training"))
    return [
        (f"held-out nats per {kind} token{words}", f"{record[key][f'{kind}_loss']:.3f}")
        for key, words in when
        if record.get(key)
        for kind in kinds
    ]


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
    measured = f"\n## Figures\n\n| figure | value |\n| --- | --- |\n{table}\n" if figures else ""
    kind = f"{'DoRA' if a.dora else 'LoRA'} of rank {a.rank}, alpha {a.alpha:g}, dropout {a.dropout:g}, on {', '.join(a.targets)}"
    changes = f"It changes the base **{config.start}** (fingerprint `{tuned.base_fingerprint[:16]}…`) and no other."
    resized = f", after `generator.resize_token_embeddings({tuned.vocabulary.size})` for its new tags" if new else ""
    return f"""---
{chr(10).join(front)}
---

# {name}

{about or "An adapter for a tokun model."} {changes}

```python
import tokun
model = tokun.load({"" if is_bundled(config.start) else repr(config.start) + ", "}adapter="{name}")
```

With plain peft: `PeftModel.from_pretrained(generator, FOLDER)` on the base's `generator`{resized}.

## Recipe

- {kind}{f", over a base in {a.bits} bits" if a.bits else ""}: {record["trained"]:,} parameters trained of {record["parameters"]:,}.
- New tags: {new or "none"}.
- {record["steps"]} steps of {t.batch_size}, peak learning rate {t.lr:g}, {record["seconds"] / 60:.1f} minutes.
{measured}"""
