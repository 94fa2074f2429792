"""The model's samples, drawn once and stored: a killed evaluation resumes.

    DIR/samples/samples.json      the model and settings; others are refused
    DIR/samples/samples.jsonl     one line per sample, as sample.py writes it        DIR/samples/000042.png …    the pictures

Sample k of a seed does not depend on the other samples, so asking for more adds to the existing ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tokun.data.image_files import open_own_png
from tokun.inference import bulk
from tokun.inference.candidates import chosen_by, own_score
from tokun.inference.model import Pair, Tokun
from tokun.tokenizers.vocabulary import Tags
from tokun.utils import checkpoint
from tokun.utils.files import whole_file

RECORD, LINES = "samples.json", "samples.jsonl"


def draw(model: Tokun, folder: Path, n: int, seed: int, *, batch_size: int = 16, best_of: int = 1, reward: str = "pmi_both") -> list[Pair]:
    """Samples 0 … n-1 of the seed, with the checkpoint's settings; with `best_of`, choices 0 … n-1 of that many candidates each
    (`Tokun.best_of`), by a `reward` of `candidates.OWN_SCORES`.

    Raises UserError if the folder holds others.
    """
    checkpoint.require_writable(folder)
    asked = json.loads(json.dumps({"seed": seed, **bulk.identity(model), **chosen(model, best_of, reward)}))
    there = checkpoint.read_record(folder / RECORD)
    if there is not None:
        checkpoint.require_same(folder, there, asked)
    records = _read(folder, best_of) if there is not None else {}
    checkpoint.write_text(folder / LINES, "".join(map(_line, records.values())))  # drops a line truncated by a kill
    checkpoint.write_record(folder / RECORD, asked)
    missing = [k for k in range(n) if k not in records]
    with tqdm(total=n, initial=n - len(missing), desc="sampling", unit="pair", dynamic_ncols=True, leave=False) as bar:
        for first in range(0, len(missing), batch_size):
            some = missing[first : first + batch_size]
            if best_of > 1:
                pairs = (model.best_of(seed, 1, best_of, own_score(model, reward), first=k)[0] for k in some)
            else:
                pairs = iter(model.sample(seed, indices=some, batch_size=batch_size))
            for k, pair in zip(some, pairs, strict=True):
                records[k] = pair.record()
                _keep(pair, folder, k)
                bar.update(1)
    return [_pair(records[k], folder, k) for k in range(n)]


def chosen(model: Tokun, best_of: int, reward: str) -> dict[str, Any]:
    """What a record says of a choice: nothing where nothing is chosen. Raises UserError for a reward that the checkpoint cannot give."""
    if best_of == 1:
        return {}
    return {"best_of": best_of, **({"reward": reward} if reward != "pmi" else {}), **chosen_by(model, reward)}


def _keep(pair: Pair, folder: Path, k: int) -> None:
    with whole_file(_picture(folder, k)) as aside:
        pair.image.save(aside, "PNG")
    with (folder / LINES).open("a", encoding="utf-8") as file:  # after its picture: a line means that both exist
        file.write(_line(pair.record()))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _read(folder: Path, best_of: int) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    if not (folder / LINES).is_file():
        return found
    for line in (folder / LINES).read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # truncated by a kill
            continue
        k = record["index"] // best_of  # the candidates of choice k are samples k * best_of …
        if _picture(folder, k).is_file():
            found[k] = record
    return found


def _picture(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def _pair(record: dict[str, Any], folder: Path, k: int) -> Pair:
    image = open_own_png(_picture(folder, k))
    tags = {**record["tags"], "grid": tuple(record["tags"]["grid"])} if "grid" in record["tags"] else record["tags"]
    return Pair(**{**record, "image": image, "tags": Tags(**tags)})
