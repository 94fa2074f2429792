"""Questions: pairs of question and answer for each picture, from its caption, its metadata and its tones. No model.

    python -m data_tools.questions shards/ --out asked/

Each KEY.json gets `questions`, a list of {"question", "answer"}, which training reads (`train.task_mix.question`); what stands
there already stays. Only what is known is asked: what is shown (the caption), the technique (the style), the subject, how many
(a number that the caption names), light or dark (clear cases), and whether it shows this (its own caption: yes; the one before it in
the shard: no), in the words in which the evaluation asks a model about its own pairs. How a question is worded is drawn from the seed and the key. A
shard is written aside and renamed, and one that is there is not made again, so a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_tools.caption import checked_shards
from data_tools.inspect import Pair, open_image, read_pairs
from data_tools.journal import read_record, write_shard, write_whole
from tokun.wordings import SHOWS

WORDINGS = {
    "what": ("What is shown?", "What does the picture show?", "What can be seen here?"),
    "technique": ("Which technique is it?", "How was this print made?", "What kind of print is this?"),
    "subject": ("What is its subject?", "What is it about?"),
    "number": ("How many {} are there?", "How many {} can be seen?"),
    "tone": ("Is it light or dark?", "Is the picture light or dark?"),
}
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
# a number and the plural behind it: "two ships", "three large ships"; neither "two of" nor "two hundred men"
COUNTED = re.compile(rf"\b({'|'.join(NUMBERS)})\s+((?:(?:small|large|great|little|old|young|black|white)\s+)?[a-z]{{2,}}s)\b", re.I)
NO_THINGS = frozenset({"as", "is", "was", "has", "his", "its", "this", "thus", "plus", "miles", "years", "days", "hours", "times", "pounds", "shillings"})
LIGHT, DARK = 0.68, 0.42  # mean tone, 0 black to 1 white


def questions_of(record: dict[str, Any], image: Image.Image | None, key: str, seed: int, other: str = "") -> list[dict[str, str]]:
    """What can be asked of a pair and is known; each question once, in a fixed order. `other`: another picture's caption."""
    caption = caption_of(record)
    known = [("what", caption, ""), ("technique", with_article(words(record.get("style"))), ""), ("subject", words(record.get("subject")), "")]
    known += [("number", number.lower(), things.lower()) for number, things in counted(caption)]
    known += [("tone", tone(image), "")] if image is not None else []
    found = [{"question": wording(kind, key, seed).format(things), "answer": answer} for kind, answer, things in known if answer]
    if caption and other and other != caption:  # both or neither: yes alone would teach to say yes
        found += [{"question": SHOWS.format(shown), "answer": answer} for shown, answer in ((caption, "yes"), (other, "no"))]
    return found


def caption_of(record: dict[str, Any]) -> str:
    captions = record.get("captions") if isinstance(record.get("captions"), dict) else {}
    caption = captions.get("plain") or record.get("caption") or ""
    return caption.strip() if isinstance(caption, str) else ""


def words(tag: Any) -> str:
    return " ".join(tag.replace("-", " ").split()) if isinstance(tag, str) else ""


def with_article(text: str) -> str:
    return f"{'an' if text[:1] in 'aeiou' else 'a'} {text}" if text else ""


def counted(caption: str) -> list[tuple[str, str]]:
    """(number, things) that a caption names, when it is one only: "two dogs and three cats" leaves open which are meant."""
    found = [(number, things) for number, things in COUNTED.findall(caption) if things.split()[-1].lower() not in NO_THINGS]
    return found if len(found) == 1 else []


def tone(image: Image.Image) -> str:
    mean = float(np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX)).mean()) / 255
    return "light" if mean >= LIGHT else "dark" if mean <= DARK else ""


def wording(kind: str, key: str, seed: int) -> str:
    number = int.from_bytes(hashlib.sha256(f"{seed}/{kind}/{key}".encode("utf-8", "backslashreplace")).digest()[:4], "big")
    return WORDINGS[kind][number % len(WORDINGS[kind])]


def asked(shard: Path, seed: int, counts: Counter[str]) -> Iterator[Pair]:
    """The pairs of a shard with their questions. A pair whose JSON is damaged stays as it is."""
    before = ""
    for pair in read_pairs(shard, []):
        record = read_record(pair)
        if record is None:
            counts["damaged records"] += 1
        else:
            there = record["questions"] if isinstance(record.get("questions"), list) else []
            made = questions_of(record, open_image(pair, [], load=True), pair.key, seed, before)
            before = caption_of(record) or before
            known = {q["question"] for q in there if isinstance(q, dict) and "question" in q}
            record["questions"] = there + [q for q in made if q["question"] not in known]
            counts["pictures"] += 1
            counts["questions"] += len(record["questions"])
            pair.members["json"] = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
        yield pair


def ask(paths: list[Path], out: Path, seed: int = 0) -> Counter[str]:
    """Write the shards of `paths` with questions into `out`. Raises ValueError when `out` is their own folder, or holds those of another seed."""
    shards = checked_shards(paths, out)
    out.mkdir(parents=True, exist_ok=True)
    record, settings = out / "questions.json", {"seed": seed, "shards": {shard.name: shard.stat().st_size for shard in shards}}
    if record.exists() and json.loads(record.read_text()) != settings:
        raise ValueError(f"--out {out} holds questions of other shards or another seed ({record.name}): name another folder")
    write_whole(record, json.dumps(settings, indent=1) + "\n")
    counts: Counter[str] = Counter()
    for shard in tqdm(shards, desc="questions", unit="shard"):
        if (out / shard.name).exists():
            counts["shards that were there"] += 1
        else:
            write_shard(out / shard.name, asked(shard, seed, counts))
    return counts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, nargs="+", metavar="SHARDS", help="image shards, or folders of them")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="of the wordings (%(default)s)")
    args = parser.parse_args(argv)
    try:
        counts = ask(args.shards, args.out, args.seed)
    except (ValueError, OSError) as error:
        print(f"data_tools.questions: {error}", file=sys.stderr)
        return 1
    print(f"data_tools.questions: {', '.join(f'{count:,} {what}' for what, count in counts.items())} in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
