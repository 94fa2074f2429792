"""Publishing checkpoints: an atomically written folder, and the Hugging Face Hub. Knows folders and names, not tensors.

model.save_pretrained("my-model")               tokun.load("my-model")
model.push_to_hub("name/my-model")              tokun.load("name/my-model")
tokun.push_adapter("runs/mine-lora", "name/mine-lora")   tokun.load(BASE, adapter="name/mine-lora")
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokun.inference import adapters
from tokun.inference.folders import CARD, GENERATOR, IMAGE_TOKENIZER, MATCHING, SAMPLING, TEXT_TOKENIZER, VOCABULARY
from tokun.inference.model_card import OWN_ID
from tokun.utils import checkpoint
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from tokun.inference.model import Tokun

FILES = (VOCABULARY, SAMPLING, CARD, TEXT_TOKENIZER)  # of a checkpoint
# the files in its subfolders
PARTS = re.compile(
    r"generator/((config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|model\.safetensors\.index)\.json"
    r"|model(-\d+-of-\d+)?\.safetensors)|(image_tokenizer|matching)/(config\.json|model\.safetensors)|text_tokenizer\.model/[\w.]+\.(json|txt|model)"
)
MARK = VOCABULARY  # a folder without it is not a checkpoint


def save_pretrained(model: Tokun, directory: str | Path, *, dtype: torch.dtype | str | None = None) -> Path:
    """Write the checkpoint (safetensors) and its model card, if any (`adapters.card_of`), to a temporary folder and rename it. Returns the
    folder.

    `dtype` is the generator's floating-point type in the file; default: its own. An existing checkpoint is replaced. Raises UserError
    for a folder that holds anything else, such as a training record or a user's file: only checkpoints are ever replaced.
    """
    target = Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; name a folder for the checkpoint")
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or next(model.generator.parameters()).dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UserError(f"dtype is {dtype!r}; weights are floating-point numbers: torch.float32, torch.bfloat16 or torch.float16")
    unexpected = unexpected_files(target) if target.is_dir() else []
    if unexpected:
        why = "which is not part of a checkpoint" if (target / MARK).is_file() else f"and is not a checkpoint ({MARK} is missing)"
        raise UserError(f"{target} holds {', '.join(unexpected[:3])}, {why}: name a new folder, such as {target / 'checkpoint'}")
    with checkpoint.whole_directory(target) as folder:
        model.save(folder, dtype=kind, card=adapters.card_of(model))
    return target


def unreachable() -> tuple[type[Exception], ...]:
    """What the Hub's client raises without a network. It uses httpx; before version 1 it used requests, whose errors are OSErrors."""
    try:
        import httpx
    except ImportError:
        return ()
    return (httpx.TransportError,)


def unexpected_files(folder: Path) -> list[str]:
    """The files in a folder that `save_pretrained` did not write; all of them if it is not a checkpoint. If there are any at its top level,
    subfolders are not searched."""
    top = sorted(path.name for path in folder.iterdir())
    unknown = [name for name in top if name not in (*FILES, GENERATOR, IMAGE_TOKENIZER, MATCHING)]
    if unknown or MARK not in top:
        return unknown or top
    there = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in there if name not in FILES and not PARTS.fullmatch(name))


def push_to_hub(
    model: Tokun, name: str, *, private: bool = False, token: str | None = None, revision: str | None = None,
    create_pr: bool = False, message: str = "Upload a tokun checkpoint",
) -> str:  # fmt: skip
    """Upload the checkpoint as `name` ('model', or 'name/model'), which is created if missing. Returns its address.

    Without `token`, that of `hf auth login` or HF_TOKEN is used. `private` only applies to a new repository. Raises UserError
    for an invalid name, and OSError if the Hub refuses, both with the reason.
    """

    def write(folder: Path, repo_id: str) -> None:
        head = None if model.adapter else model.matching  # an adapter's base reads the pictures, and is not uploaded
        save_pretrained(replace(model, card=adapters.card_of(model).replace(OWN_ID, repo_id), matching=head), folder)

    return _upload(write, name, private=private, token=token, revision=revision, create_pr=create_pr, commit_message=message)


def push_adapter(
    adapter: str | Path, name: str, *, private: bool = False, token: str | None = None, revision: str | None = None,
    create_pr: bool = False, message: str = "Upload a tokun adapter",
) -> str:  # fmt: skip
    """Upload an adapter, from its folder or a training run's, as `name`: `tokun.load(BASE, adapter=name)`. Otherwise as `push_to_hub`.

    Raises FileNotFoundError or UserError for a folder without a complete adapter.
    """
    read = adapters.read(adapter)

    def write(folder: Path, repo_id: str) -> None:
        folder.mkdir()
        adapters.write(replace(read, card=read.card.replace(OWN_ID, repo_id)), folder)

    return _upload(write, name, private=private, token=token, revision=revision, create_pr=create_pr, commit_message=message)


def _upload(write: Callable[[Path, str], None], name: str, *, private: bool, token: str | None, **commit: Any) -> str:
    """Create the repository and commit the folder that `write(folder, repo_id)` makes."""
    import huggingface_hub

    if not isinstance(name, str):
        raise UserError(f"{name!r} is not a valid name on the Hub: give a str such as 'name/model'")
    api = huggingface_hub.HfApi(token=token)
    try:
        made = api.create_repo(name, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "files"
            write(folder, made.repo_id)
            api.upload_folder(repo_id=made.repo_id, folder_path=folder, **commit)
    except huggingface_hub.errors.HfHubHTTPError as error:
        raise OSError(f"the Hub refuses {name!r}: {error}. Log in with `hf auth login`, or give a token with write access") from error
    except unreachable() as error:
        raise OSError(
            f"the Hub cannot be reached to upload {name!r}: {error}. Is there a network? The same files can be written locally and copied"
        ) from error
    return str(made)
