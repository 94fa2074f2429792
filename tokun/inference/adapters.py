"""Adapters: low-rank fine-tuning (LoRA, DoRA) of a generator, in a separate folder.

model = tokun.load("base", adapter="mine-lora")
model.add_adapter("other-lora")
model.use_adapter("other-lora")           # None: back to the base; nothing is reloaded

    adapter_config.json, adapter_model.safetensors    as `peft` writes and reads them
    adapter.json                                      the base and its fingerprint; the sampling settings
    vocabulary.json                                   the base's ids, followed by those of new tags
    README.md                                         the model card

An adapter in use is merged into a copy of the weights it changes (the others are shared), so every decoder works as with any
checkpoint. `peft` is not used for that: importing it takes seconds, and the merge is three lines. Only safetensors are read.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tokun.config import SamplingConfig
from tokun.data.question_wordings import recorded_by, wordings_on
from tokun.inference import decoder, folders
from tokun.inference.candidates import require_candidates
from tokun.inference.folders import ABOUT, CARD, VOCABULARY
from tokun.inference.folders import ADAPTER_CONFIG as CONFIG
from tokun.inference.folders import ADAPTER_WEIGHTS as WEIGHTS
from tokun.inference.model_card import merged_card
from tokun.inference.tags import TagCounts, read_counts, settings_json
from tokun.inference.token_choice import is_number, is_whole
from tokun.tokenizers.vocabulary import Vocabulary
from tokun.tokenizers.wordings import tasks_on
from tokun.utils.checkpoint import require_safetensors
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from tokun.inference.model import Tokun

FRONT = "base_model.model."  # prefix of peft's names
DOWN, UP, SIZES, TOKENS = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".token_adapter.trainable_tokens_delta"
SAMPLED = 4096  # weights of each matrix in a fingerprint


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory."""

    name: str
    base: str
    """The base's name in training: "bundled", a folder or a Hub id."""
    base_fingerprint: str
    config: dict[str, Any] = field(repr=False)
    """peft's adapter_config.json."""
    tensors: dict[str, Tensor] = field(repr=False)
    """Tensors by peft's names, on the CPU."""
    vocabulary: Vocabulary = field(repr=False)
    defaults: SamplingConfig = field(default_factory=SamplingConfig)
    tag_counts: TagCounts = field(default_factory=list, repr=False)
    tasks: tuple[str, ...] = ()
    question_wordings: tuple[str, ...] | None = None
    """Of its own questions; None: it has none; (): not recorded."""
    card: str = field(default="", repr=False)

    @property
    def new_tags(self) -> tuple[str, ...]:
        """Tags that the adapter adds, such as "<style:lithograph>"; all others are the base's."""
        return self.vocabulary.appended


# --- files ------------------------------------------------------------------------------------------------------------


def write(adapter: Adapter, folder: Path) -> None:
    """Write the adapter into an empty folder, which the caller renames."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in adapter.tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(adapter.config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    about = {
        "base": adapter.base, "base_fingerprint": adapter.base_fingerprint,
        "defaults": asdict(adapter.defaults), "tag_counts": [list(row) for row in adapter.tag_counts], "tasks": list(adapter.tasks),
        "question_wordings": adapter.question_wordings,
    }  # fmt: skip
    (folder / ABOUT).write_text(settings_json(about), encoding="utf-8")
    adapter.vocabulary.save(folder / VOCABULARY)
    if adapter.card:
        (folder / CARD).write_text(adapter.card, encoding="utf-8")


def read(path: str | Path, name: str = "") -> Adapter:
    """Read an adapter from its folder, a run's folder or a Hub id. `name`: its name; default: the folder's, or the Hub id's last part.

    Raises FileNotFoundError or UserError naming what is missing or damaged, or what makes it no tokun adapter.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = folders.resolve_adapter(path)
    require_safetensors(folder)
    for part in (WEIGHTS, ABOUT, VOCABULARY):
        if not (folder / part).is_file():
            why = ": it was not written by tokun, so its base is unknown" if part == ABOUT else ": the adapter is incomplete"
            raise FileNotFoundError(f"{folder / part} is missing{why}. Copy the whole adapter again, or train one with configs/lora.yaml")
    try:
        config, about = (json.loads((folder / part).read_text(encoding="utf-8")) for part in (CONFIG, ABOUT))
        counts = read_counts(about["tag_counts"])
        defaults, tasks = SamplingConfig(**about["defaults"]), tuple(map(str, about["tasks"]))
        asked = recorded_by(about)
        require_candidates(defaults.best_of, f"{folder / ABOUT}: defaults.")
        base, made_on = str(about["base"]), str(about["base_fingerprint"])
        require_mergeable(config)
        tensors = load_file(folder / WEIGHTS)
        parted(config, tensors)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OSError, SafetensorError) as error:
        raise UserError(f"adapter {folder} cannot be read: {error!r}. Copy the whole adapter again") from error
    card = folders.card_in(folder)
    local = Path(path).expanduser().exists()  # a snapshot of the Hub's is named by its commit
    called = name or ((folder.parent if folder.name == "adapter" else folder).name if local else str(path).rpartition("/")[2])
    return Adapter(called, base, made_on, config, tensors, Vocabulary.load(folder / VOCABULARY), defaults, counts, tasks, asked, card)


def require_mergeable(config: dict[str, Any]) -> None:
    """Raise UserError for features of peft adapters that this module does not merge."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"the adapter is of the kind {config.get('peft_type')!r}; only LoRA and DoRA are supported")
    for key in (
        "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "lora_bias", "use_rslora", "fan_in_fan_out",
    ):  # fmt: skip
        if config.get(key):
            raise UserError(f"the adapter sets {key}, which is not supported: merge it with peft, and load the merged checkpoint")
    if config.get("bias", "none") != "none":
        raise UserError("the adapter trains biases, which are not supported: merge it with peft, and load the merged checkpoint")
    rank, alpha, rows = config["r"], config["lora_alpha"], config.get("trainable_token_indices") or {}
    if not is_whole(rank) or rank < 1 or not is_number(alpha):
        raise UserError(f"the adapter's r is {rank!r} and its lora_alpha {alpha!r}: they must be a whole number of at least 1 and a number")
    lists = rows.values() if isinstance(rows, dict) else [None]
    if not all(isinstance(ids, list) and all(is_whole(i) and i >= 0 for i in ids) for ids in lists):
        raise UserError(f"the adapter's trainable_token_indices must name the ids of each module; they are {str(rows)[:100]}")


@dataclass(frozen=True)
class AdapterParts:
    """The changes of an adapter, by the name of the module with the weight (out, in)."""

    products: dict[str, tuple[Tensor, Tensor, Tensor | None]]
    """A (r, in), B (out, r) and DoRA's magnitudes (out,): the update is scale x B @ A."""
    rows: dict[str, tuple[list[int], Tensor]]
    """Ids (n,) and their new rows (n, in)."""


def parted(config: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterParts:
    """The tensors by their role. Raises UserError if one is missing, differs from the config in shape, or is of an unsupported kind."""
    left, rank = dict(tensors), config["r"]

    def take(key: str, *shape: int | None) -> Tensor:
        """A tensor of this shape; None: any length."""
        if key not in left:
            raise UserError(f"the adapter's {WEIGHTS} lacks {key}: it is incomplete. Copy the whole adapter again")
        found = left.pop(key)
        if len(found.shape) != len(shape) or any(asked not in (None, size) for asked, size in zip(shape, found.shape)):
            expected = " x ".join("any" if asked is None else str(asked) for asked in shape)
            raise UserError(
                f"the adapter's {key} has the shape {list(found.shape)}, not {expected}: parts of two adapters. "
                "Copy the whole adapter again"
            )
        return found

    parts = AdapterParts({}, {})
    for key in tensors:
        if key.endswith(DOWN):
            module = key.removesuffix(DOWN)
            down, up = take(key, rank, None), take(module + UP, None, rank)
            sizes = take(module + SIZES, len(up)) if config.get("use_dora") else None
            parts.products[module.removeprefix(FRONT)] = down, up, sizes
        elif key.endswith(TOKENS):
            module, named = key.removesuffix(TOKENS).removeprefix(FRONT), config.get("trainable_token_indices") or {}
            ids = next((ids for name, ids in named.items() if module.endswith(name)), None)
            if ids is None:
                raise UserError(
                    f"the adapter's {CONFIG} does not name the ids of {module} (trainable_token_indices): it is incomplete. "
                    "Copy the whole adapter again"
                )
            parts.rows[module] = ids, take(key, len(ids), None)
    if left:
        raise UserError(f"the adapter holds {min(left)}, which is not supported: merge it with peft, and load the merged checkpoint")
    return parts


# --- the base ---------------------------------------------------------------------------------------------------------


def fingerprint(generator: nn.Module, vocabulary: Vocabulary) -> str:
    """A fingerprint of a base: names, shapes and the signs of some thousand weights of each matrix, and its ids.

    Signs are the same in float32, bfloat16 and float16; between two states of one training some differ.
    """
    digest = hashlib.sha256(json.dumps([vocabulary.text_size, vocabulary.added_tokens]).encode())
    for name, parameter in sorted(generator.named_parameters()):
        flat = parameter.detach().flatten()
        signs = torch.signbit(flat[:: max(1, flat.numel() // SAMPLED)]).cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + np.packbits(signs).tobytes())
    return digest.hexdigest()


def require_base(adapter: Adapter, generator: nn.Module, vocabulary: Vocabulary) -> None:
    """Raise UserError unless the adapter was trained on this generator."""
    found = fingerprint(generator, vocabulary)
    if found != adapter.base_fingerprint:
        raise UserError(
            f"adapter {adapter.name} was trained on another base, {adapter.base} ({adapter.base_fingerprint[:12]}…); "
            f"this model is {found[:12]}…. Load that base (--checkpoint {shlex.quote(adapter.base)}), or retrain the adapter on this one"
        )


# --- merging ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merged(generator: Any, adapter: Adapter) -> Any:
    """A generator with the adapter's changes and rows for its new tags. It shares all unchanged weights with `generator`."""
    made = copy.deepcopy(generator, {id(p): p for p in generator.parameters()})
    make_rows(made, adapter.vocabulary.size)
    config, parts = adapter.config, parted(adapter.config, adapter.tensors)
    scale = config["lora_alpha"] / config["r"]
    for name, (down, up, sizes) in parts.products.items():
        layer = _layer(made, name, (len(up), down.shape[1]), adapter)
        weight = layer.weight
        changed = weight.float() + scale * (up.to(weight.device).float() @ down.to(weight.device).float())
        if sizes is not None:
            changed = (sizes.to(weight.device).float() / torch.linalg.norm(changed, dim=1))[:, None] * changed
        layer.weight = nn.Parameter(changed.to(weight.dtype), requires_grad=weight.requires_grad)
    for name, (ids, rows) in parts.rows.items():
        layer = _layer(made, name, (None, rows.shape[1]), adapter)
        if max(ids, default=0) >= len(layer.weight):
            raise UserError(f"adapter {adapter.name} trains id {max(ids)} of {name}, which has {len(layer.weight)}: parts of two adapters")
        weight = layer.weight.clone()
        weight[torch.tensor(ids, device=weight.device)] = rows.to(weight)
        _set_rows(made, layer, weight)
    return made


def _layer(model: nn.Module, name: str, shape: tuple[int | None, int], adapter: Adapter) -> Any:
    """The module of that name, whose weight has this shape (None: any length). Raises UserError if there is none."""
    try:
        layer: Any = model.get_submodule(name)
        found = tuple(layer.weight.shape)
    except AttributeError as error:
        raise UserError(f"adapter {adapter.name} changes {name}, which this generator does not have: it belongs to another base") from error
    if found[1:] != shape[1:] or shape[0] not in (None, found[0]):
        raise UserError(
            f"adapter {adapter.name} changes {name} as {list(shape)}, this generator's is {list(found)}: it belongs to another base"
        )
    return layer


def make_rows(model: Any, size: int) -> None:
    """Extend the embeddings to `size` ids; new ones are zero until written."""
    table = model.get_input_embeddings()
    missing = size - table.num_embeddings
    if missing <= 0:
        return
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    for layer in (table,) if tied or head is None else (table, head):
        _set_rows(model, layer, torch.cat([layer.weight, layer.weight.new_zeros(missing, layer.weight.shape[1])]))
    model.config.get_text_config().vocab_size = size


def _set_rows(model: Any, layer: Any, weight: Tensor) -> None:
    """Set the weight of an embedding or a head, or of both if they are tied."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    parameter = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    for one in [one for one in (table, head) if one is not None] if tied else (layer,):
        one.weight = parameter
        setattr(one, "num_embeddings" if isinstance(one, nn.Embedding) else "out_features", len(weight))


# --- in a Tokun -------------------------------------------------------------------------------------------------------


@dataclass
class Base:
    """A Tokun's own state without any adapter, kept while one is in use."""

    generator: Any
    vocabulary: Vocabulary
    defaults: SamplingConfig
    tag_counts: TagCounts
    tasks: tuple[str, ...]
    question_wordings: tuple[str, ...]
    card: str


def add(model: Tokun, adapter: Adapter) -> str:
    """Register the adapter for `use`. Returns its name. Raises UserError if it was trained on another base."""
    base = base_of(model)
    require_base(adapter, base.generator, base.vocabulary)
    model.adapters[adapter.name] = adapter
    return adapter.name


def use(model: Tokun, name: str | None) -> None:
    """Switch the model to this adapter, or to its base alone (None). Raises UserError for a name that was not added."""
    if name and name not in model.adapters:
        known = ", ".join(model.adapters) or "none"
        raise UserError(f"there is no adapter {name!r} ({known}): add it with model.add_adapter(FOLDER)")
    base, left = base_of(model), model.generator
    decoder.forget(left)  # frees the copies used for sampling
    if not name:
        model.base, model.adapter = None, ""
        _become(model, base)
        return
    adapter = model.adapters[name]
    generator = merged(base.generator, adapter).eval()
    decoder.sample_as(generator, base.generator)
    model.base, model.adapter = base, name
    card = adapter.card or base.card
    tasks = tasks_on(base.tasks, adapter.tasks)
    asked = wordings_on(base.question_wordings, adapter.question_wordings, base.tasks)
    _become(model, Base(generator, adapter.vocabulary, adapter.defaults, adapter.tag_counts, tasks, asked, card))


def base_of(model: Tokun) -> Base:
    m = model
    return m.base or Base(m.generator, m.vocabulary, m.defaults, m.tag_counts, m.tasks, m.question_wordings, m.card)


def card_of(model: Tokun) -> str:
    """The model card: with an adapter in use, that of the base with the adapter merged."""
    if not model.adapter:
        return model.card
    adapter = model.adapters[model.adapter]
    return merged_card(adapter.base, base_of(model).card, adapter.name, adapter.card, described(adapter))


def described(adapter: Adapter) -> str:
    """A one-line description of an adapter."""
    c = adapter.config
    size = sum(tensor.numel() for tensor in adapter.tensors.values())
    new = ", ".join(adapter.new_tags) or "none"
    kind = "DoRA" if c.get("use_dora") else "LoRA"
    return (
        f"{adapter.name}: {kind} of rank {c['r']}, alpha {c['lora_alpha']:g}, on {', '.join(sorted(c['target_modules']))}; "
        f"{size:,} numbers; base {adapter.base} ({adapter.base_fingerprint[:16]}…); new tags: {new}"
    )


def _become(model: Tokun, other: Base) -> None:
    for name, value in vars(other).items():
        setattr(model, name, value)
