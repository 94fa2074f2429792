"""Questions: question-answer pairs for each picture, from its caption, metadata and tones, without a model.

    tokun questions shards/ --out asked/

Each KEY.json gets `questions`, a list of {"question", "answer"}, which training reads (`train.task_mix.question`); existing ones
are kept. Only known facts are asked: what is shown (the caption), the main thing (`thing`), the technique, the subject, a number
that the caption names, whether the picture and its ground are light or dark (clear cases), and whether the picture shows a caption
(its own: yes; the previous one in the shard: no), worded as when the evaluation asks a model about its own pairs. Described
pictures (`data_tools.caption --from`) are also asked whether they show a moth, or a bird (text/yes_or_no.py).

No answer can be guessed from the question alone: yes/no questions have as many yes as no, and the most frequent answer to any other
question is at most half of all, in each split (train-*, val-*). The seed decides which surplus questions are left out. The wording
is drawn from the seed and the key. Shards are written to a temporary file and renamed, and existing shards are kept, so a killed run
resumes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_tools.captioning.captioned_shards import read_record, write_pairs
from data_tools.captioning.merge_plan import split_of
from data_tools.captioning.registers import facts_of
from data_tools.captioning.run import checked_shards
from data_tools.readers.stored_pairs import Damage, StoredPair, open_image, read_pairs
from data_tools.text.main_noun import BEFORE, NUMBERS, Lexicon, tokens_of
from data_tools.text.yes_or_no import PEOPLE, Shown, is_this, named, with_article
from tokun.data.sample_record import plain_of
from tokun.tokenizers.wordings import SHOWS, SUBJECT
from tokun.utils import console
from tokun.utils.console import home_path
from tokun.utils.errors import UserError, reading
from tokun.utils.files import write_text
from tokun.utils.lock import alone_in

WORDINGS = {
    "what": ("What is shown?", "What does the picture show?", "What can be seen here?"),
    "technique": ("Which technique is it?", "How was this print made?", "What kind of print is this?"),
    "subject": (SUBJECT, "What is it about?"),
    "number": ("How many {} are there?", "How many {} can be seen?"),
    "tone": ("Is it light or dark?", "Is the picture light or dark?"),
    "ground": ("Is the ground light or dark?", "Is the background light or dark?"),
    "thing": ("What is the main thing?", "Which thing is it?"),
}
PLURALS = r"[a-z]{2,}s|(?:[a-z]+)?(?:men|women)|children|people|oxen|geese|mice|sheep|deer"
# a number and the plural after it: "two ships", "three large ships"; not "two of" or "two hundred men"
COUNTED = re.compile(rf"\b({'|'.join(NUMBERS[1:12])})\s+((?:(?:small|large|great|little|old|young|black|white)\s+)?(?:{PLURALS}))\b", re.I)
NO_THINGS = frozenset(
    {"as", "is", "was", "has", "his", "its", "this", "thus", "plus", "miles", "years", "days", "hours", "times", "pounds", "shillings"}
)
LIGHT, DARK = 0.68, 0.42  # mean tone, 0 black to 1 white
LIGHT_GROUND, DARK_GROUND = 0.8, 0.42  # tone along the edges
SURE_GROUND = 0.7  # share of the edges that must agree
MORE = frozenset(["two", "three", "four", "several", "many", "group", "pair", "row", "another", "other", "others", "crowd", "both", "each"])
SINGULAR = lru_cache(1 << 16)(Lexicon(Counter(), Counter(), Counter()).singular)
VERSION = 2  # of the questions
BALANCED = ("technique", "subject", "tone", "ground")
LEAST = 0.1  # fewest pictures, as a share, that are asked a question with only one answer


@dataclass(frozen=True)
class Plan:
    """What to ask about one picture, given all the others."""

    skip: frozenset[str] = frozenset()
    """Kinds of questions to skip because the answer would be too frequent."""
    more: tuple[tuple[str, str], ...] = ()
    """Further questions with their answers."""
    seen: tuple[tuple[str, tuple[str, str]], ...] = ()
    """Facts measured on the picture, so that it is not decoded again."""


def questions_of(
    record: dict[str, Any], image: Image.Image | None, key: str, seed: int, other: str = "", plan: Plan = Plan()
) -> list[dict[str, str]]:  # fmt: skip
    """All questions about a pair whose answers are known, each once, in a fixed order. `other`: another picture's caption."""
    caption = caption_of(record)
    known = [(kind, *found) for kind, found in (known_of(record, image) | dict(plan.seen)).items() if found[0] and kind not in plan.skip]
    found = [{"question": wording(kind, key, seed).format(things), "answer": answer} for kind, answer, things in known]
    if caption and other and other != caption:  # both or neither: yes alone would teach the model to say yes
        found += [{"question": SHOWS.format(shown), "answer": answer} for shown, answer in ((caption, "yes"), (other, "no"))]
    return found + [{"question": question, "answer": answer} for question, answer in plan.more]


def known_of(record: dict[str, Any], image: Image.Image | None) -> dict[str, tuple[str, str]]:
    """kind of question -> (answer, or "" if unknown; the things counted)."""
    caption, thing = caption_of(record), words(record.get("thing"))
    number, things = number_of(caption, thing)
    technique = words(record.get("style")) or facts_of(record).technique
    return {
        "what": (caption, ""), "thing": (named(thing), ""), "technique": (with_article(technique), ""),
        "subject": (words(record.get("subject")), ""), "number": (number, things),
        "tone": (tone(image) if image is not None else "", ""), "ground": (ground(image) if image is not None else "", ""),
    }  # fmt: skip


def caption_of(record: dict[str, Any]) -> str:
    return plain_of(record).strip()


def words(tag: Any) -> str:
    return " ".join(tag.replace("-", " ").split()) if isinstance(tag, str) else ""


def number_of(caption: str, thing: str) -> tuple[str, str]:
    """(number, things): of the main thing if the caption begins with its number, else of the only things counted."""
    tokens = tokens_of(caption)
    if thing and tokens and tokens[0] in NUMBERS[1:]:
        for token in tokens[1:6]:
            if token in BEFORE or token in ("hundred", "thousand", "dozen"):
                break
            if words(SINGULAR(token)) == thing and token != thing:
                return tokens[0], token
    found = counted(caption)
    return (found[0][0].lower(), found[0][1].lower()) if found else ("", "")


def counted(caption: str) -> list[tuple[str, str]]:
    """The (number, things) in a caption if there is only one: "two dogs and three cats" is ambiguous."""
    found = [(number, things) for number, things in COUNTED.findall(caption) if things.split()[-1].lower() not in NO_THINGS]
    return found if len(found) == 1 else []


def tone(image: Image.Image) -> str:
    mean = float(np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX)).mean()) / 255
    return "light" if mean >= LIGHT else "dark" if mean <= DARK else ""


def ground(image: Image.Image) -> str:
    """Light or dark, if nearly all of the edges are; else ""."""
    small = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX)) / 255
    edge = np.concatenate([small[:2].ravel(), small[-2:].ravel(), small[2:-2, :2].ravel(), small[2:-2, -2:].ravel()])
    return "light" if (edge >= LIGHT_GROUND).mean() >= SURE_GROUND else "dark" if (edge <= DARK_GROUND).mean() >= SURE_GROUND else ""


def wording(kind: str, key: str, seed: int) -> str:
    number = int.from_bytes(hashlib.sha256(f"{seed}/{kind}/{key}".encode("utf-8", "backslashreplace")).digest()[:4], "big")
    return WORDINGS[kind][number % len(WORDINGS[kind])]


# ---------------------------------------------------------------------------------------------------------------------
# over all pictures


@dataclass
class Survey:
    """What can be asked about every picture, in the order of the shards."""

    places: list[tuple[str, str]] = field(default_factory=list)  # shard, key
    shown: list[Shown] = field(default_factory=list)
    known: list[dict[str, tuple[str, str]]] = field(default_factory=list)  # of the balanced kinds
    singles: list[bool] = field(default_factory=list)

    def add(self, shard: str, pair: StoredPair, record: dict[str, Any]) -> None:
        known = known_of(record, open_image(pair, []))
        thing, tokens = words(record.get("thing")), tokens_of(caption_of(record))
        one = tokens[:1] in (["a"], ["an"], ["the"])  # "a moth on a leaf", or "a moth among others"
        self.places.append((shard, pair.key))
        kind = record["subject"] if isinstance(record.get("subject"), str) else ""
        self.shown.append(Shown(thing if one else "", kind, frozenset(map(SINGULAR, tokens))))
        self.known.append({kind: known[kind] for kind in (*BALANCED, "number") if known[kind][0]})
        self.singles.append(
            one and not MORE.intersection(tokens) and bool(thing) and (kind not in PEOPLE or kind in ("portrait", "figure"))
        )

    def plans(self, seed: int) -> dict[tuple[str, str], Plan]:
        """By shard and key."""
        skip: list[set[str]] = [set() for _ in self.places]
        more = is_this(self.shown, seed)
        for kind in BALANCED:
            for i in self.too_many(kind, seed, {i: known[kind][0] for i, known in enumerate(self.known) if kind in known}):
                skip[i].add(kind)
        self.balance_numbers(seed, skip, more)
        seen = [tuple((kind, known[kind]) for kind in ("tone", "ground") if kind in known) for known in self.known]
        return {place: Plan(frozenset(one), tuple(extra), facts) for place, one, extra, facts in zip(self.places, skip, more, seen)}

    def balance_numbers(self, seed: int, skip: list[set[str]], more: list[list[tuple[str, str]]]) -> None:
        """For each thing counted somewhere, also ask about pictures with one, as often as for the most frequent number."""
        counted: dict[str, dict[int, str]] = {}
        for i, known in enumerate(self.known):
            if "number" in known:
                number, things = known["number"]
                counted.setdefault(things, {})[i] = number
        singles: dict[str, list[int]] = {}
        for i, (single, shown) in enumerate(zip(self.singles, self.shown)):
            if single and "number" not in self.known[i]:
                singles.setdefault(shown.thing, []).append(i)
        for things, answers in counted.items():
            most = max(Counter(answers.values()).values())
            ones = self.drawn(f"one {things}", seed, singles.get(words(SINGULAR(things)), ()))[:most]
            out = self.too_many(f"number {things}", seed, answers | dict.fromkeys(ones, "one"))
            for i in out & set(answers):
                skip[i].add("number")
            for i in set(ones) - out:
                more[i].append((wording("number", self.places[i][1], seed).format(things), "one"))

    def too_many(self, what: str, seed: int, answers: dict[int, str]) -> set[int]:
        """The pictures not to ask about, because the most frequent answer would exceed half of all."""
        counts = Counter(answers.values())
        answer, count = max(sorted(counts.items()), key=lambda item: item[1], default=("", 0))
        keep = (len(answers) - count) or math.ceil(LEAST * count)
        return set(self.drawn(what, seed, [i for i, own in answers.items() if own == answer])[keep:])

    def drawn(self, what: str, seed: int, pictures: Sequence[int]) -> list[int]:
        """The pictures in an order drawn from the seed and the keys."""
        return sorted(
            pictures, key=lambda i: hashlib.sha256(f"{seed}/{what}/{'/'.join(self.places[i])}".encode("utf-8", "backslashreplace")).digest()
        )


def survey(shards: Iterable[Path]) -> Survey:
    found = Survey()
    for shard in tqdm(shards, desc="looking", unit="shard"):
        for pair in read_pairs(shard, []):
            if (record := read_record(pair)) is not None:
                found.add(shard.name, pair, record)
    return found


def asked(shard: Path, seed: int, counts: Counter[str], plans: dict[tuple[str, str], Plan]) -> Iterator[StoredPair]:
    """The pairs of a shard with their questions.

    A pair with damaged JSON stays unchanged. What cannot be read, and ambiguous samples, are reported on stderr.
    """
    before, damaged = "", list[Damage]()
    for pair in read_pairs(shard, damaged):
        record = read_record(pair)
        if record is None:
            counts["damaged records"] += 1
        else:
            there = record["questions"] if isinstance(record.get("questions"), list) else []
            made = questions_of(record, None, pair.key, seed, before, plans[shard.name, pair.key])
            before = caption_of(record) or before
            known = {q["question"] for q in there if isinstance(q, dict) and "question" in q}
            record["questions"] = there + [q for q in made if q["question"] not in known]
            counts["pictures"] += 1
            counts["questions"] += len(record["questions"])
            pair.members["json"] = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
        yield pair
    for one in damaged:
        counts["left out as damaged or ambiguous"] += 1
        tqdm.write(f"data_tools.questions: left out: {one}", file=sys.stderr)


def ask(paths: list[Path], out: Path, seed: int = 0) -> Counter[str]:
    """Write the shards of `paths` with questions into `out`.

    Raises UserError if `out` is their own folder, was written with another seed, or holds other shards.
    """
    shards = checked_shards(paths, out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    with alone_in(out, option="--out"):
        return ask_all(shards, out, seed)


def ask_all(shards: list[Path], out: Path, seed: int) -> Counter[str]:
    """`ask`, with the lock on `out` held."""
    record = out / "questions.json"
    settings = {"version": VERSION, "seed": seed, "shards": {shard.name: shard.stat().st_size for shard in shards}}
    if record.exists():
        with reading(record, "Delete it, or name another --out"):
            same = json.loads(record.read_text()) == settings
        if not same:
            raise UserError(
                f"--out {out} holds questions of other shards, another seed or an older version ({record.name}): name another folder"
            )
    elif any(out.glob("*.tar")):
        raise UserError(f"--out {out} holds shards that this tool did not write (there is no {record.name}): name another folder")
    write_text(record, json.dumps(settings, indent=1) + "\n")
    counts: Counter[str] = Counter()
    todo = [shard for shard in shards if not (out / shard.name).exists()]
    counts.update({"shards already there": len(shards) - len(todo)} if len(todo) < len(shards) else {})
    plans: dict[tuple[str, str], Plan] = {}
    for split in dict.fromkeys(map(split_of, shards if todo else ())):  # each split is balanced on its own
        plans |= survey([shard for shard in shards if split_of(shard) == split]).plans(seed)
    for shard in tqdm(todo, desc="questions", unit="shard"):
        write_pairs(out / shard.name, asked(shard, seed, counts, plans))
    return counts


def make_parser() -> argparse.ArgumentParser:
    parser = console.make_parser("python -m data_tools.questions", __doc__)
    parser.add_argument("shards", type=home_path, nargs="+", metavar="SHARDS", help="image shards, or folders of them")
    parser.add_argument("--out", type=home_path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--seed", type=int, default=0, help="of the wordings (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)

    def write() -> None:
        counts = ask(args.shards, args.out, args.seed)
        print(f"data_tools.questions: {', '.join(f'{count:,} {what}' for what, count in counts.items())} in {args.out}")

    return console.status("data_tools.questions", write)


if __name__ == "__main__":
    sys.exit(main())
