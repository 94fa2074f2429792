"""Registers: the voices a caption is written in. Prompts for models, checks of their answers, and templates for captions
without a model.

Pure functions on text: `ask` writes a prompt, `tidy` and `fault` judge an answer, `template` makes a caption from
metadata alone. Knows nothing of files, pictures or models, and runs without torch.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokun.tokenizers.wordings import REGISTERS
from tokun.utils.errors import BadSample, UserError

MAX_CHARACTERS = 1200  # of a caption; more means that the model did not stop
MAX_FACT = 300  # characters of one fact in a prompt


def parse_registers(text: str) -> tuple[str, ...]:
    """'plain,poetic' -> the registers, each once. Raises UserError that suggests the nearest register."""
    names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    if not names:
        raise UserError(f"--registers is empty: give some of {', '.join(REGISTERS)}")
    for name in names:
        if name not in REGISTERS:
            near = difflib.get_close_matches(name, REGISTERS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"--registers names {name!r}, which is not a register: {hint}The registers are {', '.join(REGISTERS)}")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# known facts about a picture


@dataclass(frozen=True)
class Facts:
    """The facts in a picture's record, "" if unknown. `caption` is the printed one."""

    caption: str = ""
    title: str = ""
    author: str = ""
    illustrator: str = ""
    technique: str = ""
    subject: str = ""

    def only(self, names: Sequence[str]) -> Facts:
        """A copy with only the named facts."""
        return Facts(**{name: getattr(self, name) for name in names})

    def __bool__(self) -> bool:
        return any(vars(self).values())


FACTS = tuple(Facts.__dataclass_fields__)
FIELDS = {  # fact -> the fields of a record that may hold it, in order of precedence
    "caption": ("caption",), "title": ("title",), "author": ("author",), "illustrator": ("illustrator", "artist"),
    "technique": ("technique", "style"), "subject": ("subject", "category"),
}  # fmt: skip


def facts_of(record: dict[str, Any]) -> Facts:
    """The facts in a record; fields that are not text are ignored."""
    texts = {name: one_line(value) for name, value in record.items() if isinstance(value, str)}
    facts = {fact: next((texts[name] for name in names if texts.get(name)), "") for fact, names in FIELDS.items()}
    for tag in ("technique", "subject"):  # "wood-engraving", "line illustration (unspecified)"
        facts[tag] = re.sub(r"\s*\([^)]*\)", "", facts[tag].replace("-", " "))
    return Facts(**facts)


def one_line(text: str) -> str:
    """The text as one line in Unicode NFC: no control characters, no surplus spaces, lone surrogates replaced."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text if c not in "\ufeff\u00ad\u200b")
    return " ".join(unicodedata.normalize("NFC", text).split())


# ---------------------------------------------------------------------------------------------------------------------
# prompts

SOCIAL = "a short post about the picture for a social network, one or two lively sentences, "
INSTRUCTIONS = {
    "plain": "one plain sentence that says what the picture shows and nothing else",
    "poetic": "one or two poetic sentences on the picture, true to what it shows",
    "era": "the caption that a book of the picture's own time would have printed beneath it, in the words of that time",
    "alt": "alternative text for a reader who cannot see the picture: what it shows, factually, in one or two sentences, "
    "without the words 'image of'",
}
SEEN = "Known about the picture (use only what it bears out):"
UNSEEN = "Known about the picture (invent nothing beyond it):"
ALONE = "Answer with the text alone."
AS_JSON = "Answer with one JSON object that has these keys and, for each, a string:"


def instruction(register: str, *, hashtags: bool) -> str:
    """The instruction for a register, to follow 'Write'."""
    if register == "social":
        return SOCIAL + ("with two to four hashtags at the end" if hashtags else "without hashtags")
    return INSTRUCTIONS[register]


def ask(register: str, facts: Facts, *, hashtags: bool, description: str | None = None) -> str:
    """The prompt for one register, for a model that sees the picture or one that gets its `description` instead."""
    return f"Write {instruction(register, hashtags=hashtags)}.\n{_known(facts, description)}{ALONE}"


def ask_json(registers: Sequence[str], facts: Facts, *, hashtags: bool, description: str | None = None) -> str:
    """The prompt for several registers at once, to be answered with a JSON object that follows `schema`."""
    keys = "".join(f"- {register}: {instruction(register, hashtags=hashtags)}\n" for register in registers)
    return f"Write captions of one picture. {AS_JSON}\n{keys}{_known(facts, description)}"


def schema(registers: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of the answer to `ask_json`."""
    properties = {register: {"type": "string"} for register in registers}
    return {"type": "object", "properties": properties, "required": list(registers), "additionalProperties": False}


def frame(registers: Sequence[str], *, hashtags: bool) -> str:
    """All fixed wording in prompts for these registers: an answer that repeats it is an echo."""
    asked = " ".join(f"Write {instruction(register, hashtags=hashtags)}." for register in registers)
    return f"{asked} Write captions of one picture. {SEEN} {UNSEEN} {ALONE} {AS_JSON}"


def _known(facts: Facts, description: str | None) -> str:
    lines = [f"- what it shows: {description[:MAX_FACT]}"] if description else []
    names = {"caption": "printed caption", "title": "from the book"}
    lines += [f"- {names.get(name, name)}: {value[:MAX_FACT]}" for name, value in vars(facts).items() if value]
    head = SEEN if description is None else UNSEEN
    return "\n".join([head, *lines]) + "\n" if lines else ""


# ---------------------------------------------------------------------------------------------------------------------
# judging an answer

LABEL = re.compile(
    r"^(?:(?:the )?(?:plain|poetic|era|social|alt(?:ernative)?(?: text)?)?[ -]?(?:caption|answer|assistant|output|post|alt text)"
    r"|(?:sure|certainly|of course)?[,!. ]*here(?:'s| is)[^:.]{0,60}|(?:plain|poetic|era|social|alt))\s*:\s*",
    re.I,
)
THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.S)
QUOTES = (('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("«", "»"), ("**", "**"))
HASHTAG = re.compile(r"(?:^|\s)#\w+")
REFUSAL = re.compile(
    r"^(?:i['’]?m sorry|i am sorry|sorry,|i apologi[sz]e|i (?:can(?:not|['’]t)|am unable to|['’]m unable to) "
    r"|as an ai\b|unfortunately, i )",
    re.I,
)
LETTER_LOOP = re.compile(r"(\S{1,8}?)\1{7,}")
ECHO_WORDS = 6
MAX_PERIOD = 24  # words of the longest loop detected


def tidy(text: str, register: str, *, hashtags: bool) -> str:
    """An answer without the thoughts, labels and quotation marks that models add; unwanted hashtags are removed from social ones."""
    text = one_line(THOUGHT.sub(" ", text[: 40 * MAX_CHARACTERS]))
    text = LABEL.sub("", text, count=1).strip()
    for opening, closing in QUOTES:
        if len(text) > 2 and text.startswith(opening) and text.endswith(closing) and opening not in text[len(opening) : -len(closing)]:
            text = text[len(opening) : -len(closing)].strip()
    if register == "social" and not hashtags:
        text = HASHTAG.sub("", text).strip()
    return text


def fault(text: str, asked: str) -> str:
    """Why a tidied answer is rejected, or "": empty, too long, a refusal, a loop, an echo of `asked` (the prompt's fixed wording)."""
    if not any(c.isalnum() for c in text):
        return "empty answer"
    if len(text) > MAX_CHARACTERS:
        return "answer too long"
    if REFUSAL.match(text):
        return "refusal"
    if loops(text):
        return "loop"
    return "echo of the prompt" if echoes(text, asked) else ""


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def loops(text: str) -> bool:
    """Whether words or letters loop: a word 4 times in a row, 2 to 4 words 3 times, 5 or more twice, or few distinct words."""
    if LETTER_LOOP.search(text):
        return True
    words = words_of(text)
    for period in range(1, min(MAX_PERIOD, len(words) // 2) + 1):
        wanted = period * (3 if period == 1 else 2 if period < 5 else 1)
        run = 0
        for before, word in zip(words, words[period:]):
            run = run + 1 if before == word else 0
            if run >= wanted:
                return True
    return len(words) >= 16 and len(set(words)) < 0.35 * len(words)


def echoes(text: str, asked: str) -> bool:
    """Whether the answer repeats `asked`: all of it, or six words in a row."""
    answer, prompt = words_of(text), words_of(asked)
    if not prompt or not answer:
        return False
    run = ECHO_WORDS if len(answer) >= ECHO_WORDS else len(answer)
    if run < 3 and answer != prompt:  # two words in common with the prompt mean nothing
        return False
    grams = {tuple(prompt[i : i + run]) for i in range(len(prompt) - run + 1)}
    return any(tuple(answer[i : i + run]) in grams for i in range(len(answer) - run + 1))


def read_answer(text: str, registers: Sequence[str]) -> dict[str, Any]:
    """The JSON object in an answer, even inside a code fence or a sentence; a single register may come as bare text.

    Raises BadSample if there is none.
    """
    text = THOUGHT.sub(" ", text).strip()
    start, end = text.find("{"), text.rfind("}")
    if 0 <= start < end:
        try:
            answer = json.loads(text[start : end + 1])
            if isinstance(answer, dict):
                return answer
        except (ValueError, RecursionError):
            pass
    elif len(registers) == 1 and text and "{" not in text:
        return {registers[0]: text}
    raise BadSample("answer is not a JSON object")


# ---------------------------------------------------------------------------------------------------------------------
# without a model

# A part in [] is left out if a fact in it is unknown; the technique also if the caption names it.
TEMPLATES = {
    "plain": "[{caption}][. {A_technique}][ by {illustrator}][ ({subject})].",
    "poetic": "[{caption}, ]held still[ in {a_technique}][ by {illustrator}].",
    "era": "[{caption}][. {Technique}][ by {illustrator}][, from “{title}”][, by {author}].",
    "social": "[{caption}][. {A_technique}][ by {illustrator}][, from “{title}”].[ {hashtags}]",
    "alt": "[{A_technique}][: {caption}][. Subject: {subject}].",
}


def template(register: str, facts: Facts, *, hashtags: bool) -> str:
    """A caption from metadata alone, always the same; "" if nothing says what the picture shows or is."""
    caption = facts.caption[: MAX_CHARACTERS // 2].rstrip(". ") if any(map(str.isalnum, facts.caption)) else ""  # "..." says nothing
    if not (caption or facts.technique or facts.subject):
        return ""
    technique = facts.technique or ("" if caption else "picture")
    if technique.lower() in facts.caption.lower():
        technique = ""
    article = "an" if technique[:1].lower() in tuple("aeiou") else "a"
    tags = [re.sub("[^0-9a-z]", "", tag.lower()) for tag in (facts.technique, facts.subject) if len(tag.split()) <= 3]
    values = {
        **vars(facts), "caption": caption,
        "title": short_title(facts.title), "author": name_in_order(facts.author), "illustrator": name_in_order(facts.illustrator),
        "Technique": technique[:1].upper() + technique[1:], "a_technique": technique and f"{article} {technique}",
        "A_technique": technique and f"{article.capitalize()} {technique}",
        "hashtags": " ".join(f"#{tag}" for tag in dict.fromkeys(tags) if tag) if hashtags else "",
    }  # fmt: skip

    def part(match: re.Match[str]) -> str:
        known = all(values[name] for name in re.findall(r"{(\w+)}", match[1]))
        return match[1].format(**values) if known else ""

    text = re.sub(r"\[([^\]]*)\]", part, TEMPLATES[register]).lstrip(".:, ")
    text = re.sub(r"([.?!…][”’\"')]*)[.,:](?=\s|$)", r"\1", text)  # "Who goes there?." and the like
    return one_line(text[:1].upper() + text[1:])


def short_title(title: str, limit: int = 70) -> str:
    """A book's title without its subtitle, at most `limit` characters, cut between words."""
    title = re.split(r"(?<=\w{4})\. |[:;] | / ", title)[0].rstrip(".:; ")
    return title if len(title) <= limit else title[:limit].rsplit(" ", 1)[0].rstrip(",;: ") + "…"


def name_in_order(name: str) -> str:
    """'Wood, J. G. (John George), 1827-1889' -> 'J. G. Wood'; other forms stay unchanged; an anonymous name becomes ""."""
    if name.lower().strip("[]. ") in ("various", "anonymous", "unknown"):
        return ""
    bare = re.sub(r"\([^)]*\)|,?\s*\d{3,4}\??(?:\s*-\s*(?:\d{3,4}\??)?)?", "", name)
    parts = [part.strip() for part in bare.split(",") if part.strip()]
    if len(parts) == 3 and parts[2] in ("Sir", "Lady", "Lord", "Mrs."):
        parts = [parts[0], f"{parts[2]} {parts[1]}"]
    return f"{parts[1]} {parts[0]}" if len(parts) == 2 else name
