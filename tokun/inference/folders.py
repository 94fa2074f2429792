"""Where checkpoints and adapters are: the names of their files, and the folder of a name or Hub id. Opens no weights, imports no torch."""

from __future__ import annotations

from pathlib import Path

from tokun.utils import network_access

BUNDLED = Path(__file__).parents[1] / "bundled" / "engraving"
# of a checkpoint
GENERATOR, IMAGE_TOKENIZER, TEXT_TOKENIZER, CARD = "generator", "image_tokenizer", "text_tokenizer.model", "README.md"
VOCABULARY, SAMPLING, MATCHING = "vocabulary.json", "sampling.json", "matching"  # the last is optional
# of an adapter, which also has a card and a vocabulary
ADAPTER_CONFIG, ADAPTER_WEIGHTS, ABOUT = "adapter_config.json", "adapter_model.safetensors", "adapter.json"


def is_bundled(checkpoint: str | Path | None) -> bool:
    """Whether it names the bundled checkpoint: None, or "bundled" if no folder has that name."""
    return checkpoint is None or (str(checkpoint) == "bundled" and not Path("bundled").exists())


def resolve(checkpoint: str | Path | None) -> Path:
    """The folder of a checkpoint, which is downloaded if it is a Hub id."""
    if checkpoint is None or is_bundled(checkpoint):
        if not BUNDLED.is_dir():
            raise FileNotFoundError(f"no checkpoint is bundled here ({BUNDLED}); name one with --checkpoint")
        return BUNDLED
    if found := checkpoint_at(checkpoint):
        return found
    path = Path(checkpoint).expanduser()
    if adapter_at(path):
        raise FileNotFoundError(
            f"{path} holds an adapter, which is loaded with its base: "
            f"tokun.load(BASE, adapter={str(path)!r}), tokun sample --checkpoint BASE --adapter {path}"
        )
    if path.exists():
        raise FileNotFoundError(f"{path} holds no checkpoint: {VOCABULARY} and {GENERATOR}/ are not there{unfinished(path)}")
    return network_access.downloaded(str(checkpoint), "checkpoint", ["bundled", *runs_with("checkpoint")])


def resolve_adapter(adapter: str | Path) -> Path:
    """The folder of an adapter, which is downloaded if it is a Hub id."""
    if found := adapter_at(adapter):
        return found
    path = Path(adapter).expanduser()
    if checkpoint_at(path):
        raise FileNotFoundError(f"{path} is a checkpoint, not an adapter: give it as the checkpoint (--checkpoint)")
    if path.exists():
        raise FileNotFoundError(f"{path} holds no adapter: {ADAPTER_CONFIG} is missing{unfinished(path)}")
    return network_access.downloaded(str(adapter), "adapter", runs_with("adapter"))


def unfinished(run: Path) -> str:
    """The end of a message about a folder without the result of a training: how to get the result."""
    asked = ". Has its training finished?"
    if any(not folder.suffix for folder in (run / "best").glob("step-*")):  # .partial: killed while it was written
        return f"{asked} Run the same command again to resume; {run / 'best'} holds the best so far"
    if any(folder.name != "image_tokenizer" for folder in (run / "state").glob("*")):
        return f"{asked} Run the same command again to resume; with train.max_minutes=1 added it stops and saves its result"
    return asked


def runs_with(part: str) -> list[str]:
    """The runs below runs/ that hold a checkpoint, or an adapter."""
    return [str(folder.parent) for folder in sorted(Path("runs").glob(f"*/{part}"))]


def checkpoint_at(path: str | Path) -> Path | None:
    """The checkpoint's folder, if `path` is one or a run that made one; None for anything else."""
    given = Path(path).expanduser()
    folders = [folder for folder in (given, given / "checkpoint") if not (folder / ADAPTER_CONFIG).is_file()]
    return next((folder for folder in folders if (folder / VOCABULARY).is_file() or (folder / GENERATOR).is_dir()), None)


def adapter_at(path: str | Path) -> Path | None:
    """The adapter's folder, if `path` is one or a run that made one; None for anything else."""
    given = Path(path).expanduser()
    return next((folder for folder in (given, given / "adapter") if (folder / ADAPTER_CONFIG).is_file()), None)


def card_in(folder: Path) -> str:
    """The model card in the folder of a checkpoint or an adapter; "" without one."""
    path = folder / CARD
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def is_local(path: str | Path) -> bool:
    """Whether it exists on this machine under this name, so that reading it downloads nothing."""
    return is_bundled(path) or Path(path).expanduser().exists()
