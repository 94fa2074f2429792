"""Describes a model in a few lines: one in a folder (`describe`, from its JSON files alone, without torch), or one in memory."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from tokun.config import SamplingConfig
from tokun.data.question_wordings import recorded_by, wordings_on
from tokun.inference import folders
from tokun.tokenizers.wordings import tasks_on
from tokun.utils.errors import UserError, reading

if TYPE_CHECKING:
    from tokun.inference.model import Tokun

SHOWN = 8  # names of a list before it is cut short
OF_BASE = "## The base:"  # heading of a card; everything below it is about the model that it is built on
# not shown
USUAL = {name: value for name, value in asdict(SamplingConfig()).items() if "temperature" not in name}


@dataclass(frozen=True)
class Description:
    """A checkpoint, or an adapter with what it takes from its base. Unknown numbers are 0, unknown texts empty."""

    name: str
    kind: str  # checkpoint or adapter
    where: str
    architecture: str
    layers: int
    width: int
    parameters: int  # of the generator, or of the adapter
    dtype: str
    channels: int  # of pictures: 1 grayscale, 3 RGB
    pixels: int  # a code's side
    codebook: int
    grids: tuple[str, ...]  # rows x columns of codes, the default first
    styles: tuple[str, ...]  # these and the next two: the most frequent in training first
    subjects: tuple[str, ...]
    things: tuple[str, ...]
    registers: tuple[str, ...]
    tasks: tuple[str, ...]
    questions: tuple[str, ...]  # their wordings, where they are recorded (`data.question_wordings`)
    pieces: int  # of text
    longest: int  # pieces of a caption, at most
    defaults: dict[str, Any]  # of sampling
    matching: bool = False  # whether a matching head chooses among candidates
    figures: dict[str, str] = field(default_factory=dict)  # of its card: name -> value
    license: str = ""
    base: str = ""  # of an adapter
    rank: int = 0  # of an adapter
    new_tags: tuple[str, ...] = ()  # of an adapter

    def lines(self) -> list[str]:
        """About ten lines for people."""
        card = [f"{name} {value}" for name, value in self.figures.items()]
        parts = [
            ("generator" if self.kind == "checkpoint" else "adapter", self.network()),
            ("pictures", self.pictures()),
            *self._tags(),
            ("sampling", self.sampling()),
            (
                "figures",
                "; ".join([*card[:5], *([f"… ({len(card)} in --json)"] if len(card) > 5 else [])])
                or "none of its own in its card (tokun evaluate measures them)",
            ),
            *([("license", self.license)] if self.license else []),
        ]
        return [f"{self.name} ({self.where})", *(f"{label:<10} {text}" for label, text in parts)]

    def known(self) -> list[str]:
        """What options of sampling may name, one kind a line."""
        return [
            f"{label:<10} {text}" for label, text in (*self._tags(most=40), ("grids", ", ".join(self.grids)), ("defaults", self.sampling()))
        ]

    def _tags(self, most: int = SHOWN) -> list[tuple[str, str]]:
        kinds = {"styles": self.styles, "subjects": self.subjects, "things": self.things}
        counted = [(label, f"{len(names)}: {some(names, most)}" if names else "none") for label, names in kinds.items()]
        more = f"; and {len(self.questions) - most} more (--json)" if len(self.questions) > most else ""
        asked = [("questions", "; ".join(self.questions[:most]) + more)] if self.questions else []
        return [*counted, ("registers", ", ".join(self.registers) or "none"), ("tasks", ", ".join(self.tasks) or "not recorded"), *asked]

    def network(self) -> str:
        size = f"{self.parameters / 1e6:.1f}M parameters" if self.parameters >= 1e5 else f"{self.parameters:,} parameters"
        if self.kind == "adapter":
            new = f"; new tags: {', '.join(self.new_tags)}" if self.new_tags else ""
            return f"LoRA of rank {self.rank}, {size}, on the base {self.base}{new}"
        words = f"{self.pieces:,} text pieces, captions of {self.longest} at most"
        return f"{self.architecture}, {self.layers} layers of width {self.width}, {size}, {self.dtype}; {words}"

    def pictures(self) -> str:
        shapes = f"{len(self.grids)} grids of" if len(self.grids) > 1 else "a grid of"
        looks = {0: "", 1: "grayscale, ", 3: "RGB, "}.get(self.channels, f"{self.channels} channels, ")
        size = f", a code for {self.pixels}x{self.pixels} px" if self.pixels else ""
        return f"{looks}{shapes} {some(self.grids, 9)} codes (rows x columns){size}, of a codebook of {self.codebook}"

    def sampling(self) -> str:
        """The checkpoint's defaults where they differ from the usual ones; temperatures always."""
        shown = {name: value for name, value in self.defaults.items() if value != USUAL.get(name)}
        told = [name if value is True else f"{name} {value:g}" for name, value in shown.items()]
        return ", ".join([*told, *(["a matching head chooses among candidates"] if self.matching else [])]) or "the usual defaults"

    def brief(self) -> str:
        """Five lines: what `print(model)` shows."""
        kinds = (("style", self.styles), ("subject", self.subjects), ("thing", self.things))
        tags = "; ".join(f"{len(names)} {label}{'' if len(names) == 1 else 's'} ({some(names, 3)})" for label, names in kinds if names)
        lines = [
            f"Tokun: {self.name}",
            f"  generator  {self.network()}",
            f"  pictures   {self.pictures()}",
            f"  tags       {tags or 'none'}; registers: {', '.join(self.registers) or 'none'}",
            f"  tasks      {', '.join(self.tasks) or 'not recorded'}; sampled at {self.sampling()}",
        ]
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """All fields, as plain JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def some(names: Sequence[str], most: int = SHOWN) -> str:
    """The names, cut short after `most`."""
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[:most])} …"


def describe(checkpoint: str | Path | None = None) -> Description:
    """The description of a checkpoint, an adapter or a run, by its folder or Hub id (which is downloaded); None: the bundled model.

    Raises FileNotFoundError or UserError naming what is missing or damaged.
    """
    if checkpoint is not None and (adapter := folders.adapter_at(checkpoint)) is not None:
        return _of_adapter(adapter)
    folder = folders.resolve(checkpoint)
    if (folder / folders.ADAPTER_CONFIG).is_file():  # an adapter on the Hub
        return _of_adapter(folder)
    with _whole(folder, "checkpoint"):
        vocabulary, settings = _json(folder / folders.VOCABULARY), _json(folder / folders.SAMPLING)
        network = _json(folder / folders.GENERATOR / "config.json")
        card = folders.card_in(folder)
        return _made(
            vocabulary,
            settings,
            network,
            _json(folder / folders.IMAGE_TOKENIZER / "config.json"),
            card,
            name=title(card) or _name(folder),
            kind="checkpoint",
            where="bundled" if folder == folders.BUNDLED else str(checkpoint),
            parameters=_parameters(folder / folders.GENERATOR),
            dtype=str(network.get("dtype") or network.get("torch_dtype") or "float32"),
            matching=(folder / folders.MATCHING).is_dir(),
        )


def _of_adapter(folder: Path) -> Description:
    with _whole(folder, "adapter"):
        vocabulary, about = _json(folder / folders.VOCABULARY), _json(folder / folders.ABOUT)
        config, card, base = _json(folder / folders.ADAPTER_CONFIG), folders.card_in(folder), str(about["base"])
        network, tokenizer, matching = {}, {}, False
        if folders.is_local(base):  # any other base is not downloaded just for this
            at = folders.resolve(base)
            network, tokenizer = _json(at / folders.GENERATOR / "config.json"), _json(at / folders.IMAGE_TOKENIZER / "config.json")
            settings = _json(at / folders.SAMPLING)
            matching = (at / folders.MATCHING).is_dir()
            # as when the adapter is in use
            known, taught = tuple(settings.get("question_wordings") or ()), settings.get("tasks", ())
            about["question_wordings"] = wordings_on(known, recorded_by(about), taught)
            about["tasks"] = tasks_on(taught, about.get("tasks", ()))
        return _made(
            vocabulary,
            about,
            network,
            tokenizer,
            card,
            name=title(card) or _name(folder),
            kind="adapter",
            where=str(folder),
            parameters=_parameters(folder),
            dtype="",
            base=base,
            rank=int(config["r"]),
            new_tags=tuple(vocabulary.get("appended", ())),
            matching=matching,
        )


def _made(
    vocabulary: dict[str, Any], settings: dict[str, Any], network: dict[str, Any], tokenizer: dict[str, Any], card: str, **more: Any
) -> Description:
    text, counts = network.get("text_config", network), settings.get("tag_counts", [])
    return Description(
        architecture=str(network.get("model_type", "")),
        layers=int(text.get("num_hidden_layers", 0)),
        width=int(text.get("hidden_size", 0)),
        channels=int(tokenizer.get("image_channels", 0)),
        pixels=int(tokenizer.get("downsample", 0)),
        codebook=int(vocabulary["codebook_size"]),
        grids=tuple(f"{rows}x{columns}" for rows, columns in vocabulary["grids"]),
        styles=by_frequency(vocabulary.get("styles", ()), ((row[0], row[-1]) for row in counts)),
        subjects=by_frequency(vocabulary.get("subjects", ()), ((row[1], row[-1]) for row in counts)),
        things=by_frequency(vocabulary.get("things", ()), ((row[2], row[-1]) for row in counts if len(row) > 3)),
        registers=tuple(vocabulary["registers"]),
        tasks=tuple(settings.get("tasks", ())),
        questions=tuple(settings.get("question_wordings") or ()),
        pieces=int(vocabulary["text_size"]),
        longest=int(vocabulary["max_text"]),
        defaults=dict(settings.get("defaults", {})),
        figures=figures(card),
        license=front_matter(card, "license"),
        **more,
    )


def of_model(model: Tokun) -> Description:
    """The description of a model in memory, with the adapter in use."""
    v, config = model.vocabulary, model.generator.config
    tokenizer = model.image_tokenizer.config
    weights = list(model.generator.parameters())
    base, own = (model.base.card, model.adapters[model.adapter].card) if model.base else (model.card, model.card)
    name = title(base) or "a model without a card"
    return _made(
        v.to_dict(),
        {
            "tasks": model.tasks,
            "question_wordings": model.question_wordings,
            "tag_counts": model.tag_counts,
            "defaults": asdict(model.defaults),
        },
        config.to_dict(),
        {"image_channels": tokenizer.image_channels, "downsample": tokenizer.downsample},
        own,
        name=f"{name}, with the adapter {model.adapter}" if model.adapter else name,
        kind="checkpoint",
        where="in memory",
        parameters=sum(weight.numel() for weight in weights),
        dtype=f"{str(weights[0].dtype).removeprefix('torch.')} on {weights[0].device}",
        matching=model.matching is not None,
    )


def by_frequency(names: Iterable[str], counts: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """The names, those most frequent in training first."""
    sums: Counter[str] = Counter()
    for name, count in counts:
        sums[name] += count
    return tuple(sorted(names, key=lambda name: -sums[name]))


# --- the card ---------------------------------------------------------------------------------------------------------


def title(card: str) -> str:
    """The first heading of a model card; "" without one."""
    found = re.search(r"^# +(.+?)\s*$", card, re.MULTILINE)
    return found[1] if found else ""


def front_matter(card: str, key: str) -> str:
    """A value of the card's front matter; "" without one."""
    found = re.match(rf"---\n(?:.*\n)*?{key}: *(.+?) *\n(?:.*\n)*?---\n", card)
    return found[1] if found else ""


def without_base(card: str) -> str:
    """The part of a card about the model itself; only the title if nothing separates it from its base, as in cards of older versions."""
    if re.search(r"^## Merged adapter$", card, re.MULTILINE):
        return f"# {title(card)}\n"
    return re.split(rf"^{OF_BASE}", card, maxsplit=1, flags=re.MULTILINE)[0]


def figures(card: str) -> dict[str, str]:
    """Name -> value of every row of the card's tables of figures, in their order; without those of the model that it is built on."""
    found: dict[str, str] = {}
    inside = False
    for line in without_base(card).splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            inside = False
        elif cells[0] == "figure":
            inside = True
        elif inside and len(cells) > 1 and cells[0].strip("-: "):
            found.setdefault(cells[0], cells[1])
    return found


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def _whole(folder: Path, what: str) -> Iterator[None]:
    """Raise UserError if a file of the folder is damaged or incomplete."""
    try:
        yield
    except (UserError, OSError):
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read: {error!r}. Copy the whole {what} again") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the folder is not whole. Copy or download {path.parent} again")
    with reading(path, "Copy it again"):
        return json.loads(path.read_text(encoding="utf-8"))


def _name(folder: Path) -> str:
    own = folder.absolute()
    return (own.parent if own.name in ("checkpoint", "adapter") else own).name


def _parameters(folder: Path) -> int:
    """The number of weights in a folder's safetensors, from their headers."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total
