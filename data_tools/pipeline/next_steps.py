"""Next steps: what prepare prints if captions are missing or useless, and the next commands to paste."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import posixpath
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokun
from data_tools.pipeline.chunks import Settings
from data_tools.pipeline.storage_backends import Store, is_url
from data_tools.pipeline.unread_tables import free_name, is_spreadsheet, unread_tables
from data_tools.readers.listing import NOTHING, Guess, Listing, shown
from data_tools.readers.table_files import CAPTION_COLUMNS, PATH_COLUMNS, TableError, column_name, read_table, separator_in
from tokun.cli.commands import COMMANDS
from tokun.config import load_config
from tokun.data.captions import Texts, alike, titles
from tokun.data.sample_record import plain_of
from tokun.data.shards import IMAGE_SUFFIXES, ShardIndex
from tokun.inference.folders import BUNDLED, VOCABULARY
from tokun.tokenizers.wordings import fitting_tag
from tokun.utils.console import typed_path
from tokun.utils.errors import UserError

CAPTIONS = "captions.csv"
"""The table in the output folder, to be filled in by hand."""
HEAD = ("file_name", "caption")
NO_CAPTION = "no caption"
FEW_PICTURES, MANY_PICTURES = 500, 20_000
"""Up to FEW_PICTURES an adapter learns enough, beyond MANY_PICTURES a model can be trained from nothing."""
MUCH = 4  # standard deviations above the number that was asked for, held out
FEW = 0.5  # below this share of captioned pictures, captioning is advised before training


def captions_warning(listing: Listing, *, from_names: bool) -> str:
    """A warning before the work if most pictures have no caption; else ""."""
    total = without = 0
    for one in listing.found:
        if not one.problem:
            total += 1
            has_words = listing.words.get(one.path, NOTHING).caption or (one.beside and one.sidecars)
            without += not has_words and not (from_names and one.beside)
    if not total or total - without >= FEW * total:
        return ""
    warning = f"{without:,} of {total:,} pictures have no caption: no caption file beside them, and no row in a table."
    if tables := unread_tables(listing.unread):
        return f"{warning} The table {shown(tables[0])} is not read; the last lines say why."
    return warning


class Captions:
    """Counts the kept captions, the pictures that only lack one, and those without one that are left out for another reason."""

    def __init__(self) -> None:
        self.missing = self.kept = self.empty = self.other = 0
        self.texts = Texts()

    def add(self, row: Mapping[str, Any]) -> None:
        self.missing += lacks_caption(row)
        self.other += bool(
            not row["shard"] and row["width"] and row["reason"] != NO_CAPTION and not row["caption"] and not row["words_from"]
        )
        if row["shard"]:
            self.kept += 1
            self.empty += not row["caption"]
            if row["caption"]:
                self.texts.add(row["caption"])

    def as_json(self) -> dict[str, int]:
        return {"missing": self.missing, "kept": self.kept, "empty": self.empty, "other": self.other, **self.texts.counts()}


def lacks_caption(row: Mapping[str, Any]) -> bool:
    """Whether a picture in the manifest only lacks a caption."""
    return row["reason"] == NO_CAPTION or bool(row["shard"] and not row["caption"])


def write_captions_to_fill(out: Store, rows: Iterable[Mapping[str, Any]], *, given: Path | None = None) -> str:
    """Write OUT/captions.csv with a line for each picture that lacks a caption. Returns a message if that is impossible, else "".

    A table that somebody has worked on keeps all of its text; names that it lacks are appended. A table that nobody has worked on is
    removed once no picture lacks a caption, unless it was `given`. It begins with a byte order mark, without which Excel takes it for
    another encoding.
    """
    names = [row["path"] for row in rows if lacks_caption(row)]
    if not names:
        is_given = given is not None and given.resolve() == out.path(CAPTIONS).resolve()
        if out.exists(CAPTIONS) and not is_given and is_untouched(out.read(CAPTIONS)):
            out.remove(CAPTIONS)
        return ""
    text, columns, name_column = "", HEAD, HEAD[0]
    if out.exists(CAPTIONS):
        data = out.read(CAPTIONS)
        try:
            table = read_table(CAPTIONS, open_file=lambda: io.BytesIO(data))
            name_column = next(name for name in PATH_COLUMNS if name in table.columns)
        except TableError as error:
            return f"{out}/{CAPTIONS} cannot be read, so it is not changed: {error}"
        except StopIteration:
            return f"{out}/{CAPTIONS} names no pictures, so it is not changed: its columns are {', '.join(table.columns)}"
        if not is_untouched(data):
            there = {row.values[name_column] for row in table}
            text, columns, names = data.decode("utf-8-sig"), table.columns, [name for name in names if name not in there]
    if names:
        out.write(CAPTIONS, appended(text, columns, name_column, names).encode("utf-8-sig", "replace"))
    return ""


def is_untouched(data: bytes) -> bool:
    """Whether a table to fill in is as it was written: of two columns, and without any caption."""
    try:
        table = read_table(CAPTIONS, open_file=lambda: io.BytesIO(data))
    except TableError:
        return False
    return table.columns == HEAD and not any(row.values["caption"] for row in table)


def appended(text: str, columns: Sequence[str], name_column: str, names: Iterable[str]) -> str:
    """The text of a CSV with a row for each name, its other cells empty. A text "" gets the columns as its header first."""
    end = next((one for one in ("\r\n", "\n", "\r") if one in text), "\n")
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=separator_in(text.partition(end)[0] or ","), lineterminator=end)
    if text:
        buffer.write(text if text.endswith(end) else text + end)
    else:
        writer.writerow(columns)
    writer.writerows([name if column == name_column else "" for column in columns] for name in names)
    return buffer.getvalue()


def steps(
    out: str, command: Sequence[str], captions: Mapping[str, int], *, report: str, val: int, doubtful: int = 0,
    guesses: Sequence[Guess] = (), source: str = "", tables: Sequence[str] = (), techniques: int = 0, side: int = 0,
) -> str:  # fmt: skip
    """What to look at, and the commands to paste after prepare: captions first if they are few, then training.

    `command`: the arguments given to prepare. `val`: pictures held out. `doubtful`: pictures that were left out as ambiguous.
    `guesses`: caption columns that nobody named. `source`: as given to prepare. `tables`: those in it that are not read.
    `techniques`: pictures with a technique. `side`: their short side in pixels.
    """
    out = typed_path(out)
    missing, kept, empty = (captions.get(name, 0) for name in ("missing", "kept", "empty"))
    captioned = kept - empty
    parts = [] if is_url(out) else [f"Look at {out}/{report} in a browser: it shows what was kept, what was left out, and why."]
    if doubtful:
        one = doubtful == 1
        parts.append(
            f"{doubtful:,} doubtful picture{' is' if one else 's are'} left out (ambiguous); "
            f"--keep-ambiguous keeps {'it' if one else 'them'}."
        )
    if note := much_held_out(command, val=val, kept=kept):
        parts.append(note)
    if 2 * captions.get("short", 0) > captioned and (better := [one for one in guesses if one.better]):
        parts.append(sentences(command, better[0]))
    elif doubt := alike(captions) or titles(captions):
        parts.append(doubt)
    if missing:
        other = captions.get("other", 0)
        parts.append(
            captions_first(
                out, command, missing, captioned, empty, report, other=other, ways=from_tables(command, source, tables), source=source
            )
        )
    if captioned and captioned >= FEW * (captioned + missing):
        if techniques and captioned > FEW_PICTURES:
            have = "picture has" if techniques == 1 else "pictures have"
            parts.append(
                f"{techniques:,} {have} a technique, which {config(recipe_for(captioned))} takes as the style tag. "
                "With data.style_key=style, as below, the tag is the style that prepare gave."
            )
        others = registers_written(out)
        lines = training(out, captioned, val=val, techniques=bool(techniques), command=command, side=side, registers=bool(others))
        parts += ["Next:\n" + lines, *filter(None, [of_registers(others, captioned)])]
    elif captioned:
        parts.append(too_few(out, captioned, captioned + missing))
    return "\n".join(parts)


def too_few(out: str, captioned: int, pictures: int) -> str:
    advice = f"Train when more of the pictures have captions: {captioned:,} of {pictures:,} do. To look at the shards as they are:"
    return f"{advice}\n{inspecting(out)}"


def after_captions(out: str) -> str:
    """What to do with captioned shards: look at them and train, with a note on their registers.

    Reads an even subsample of their records.
    """
    shards = shards_in(out)
    records = records_in(shards)
    captioned = [record for record in records if plain_of(record)]
    pictures = sum(map(len, shards.values()))
    if "train" not in shards or not captioned:
        return f"Next:\n{inspecting(out)}"
    count = round(pictures * len(captioned) / len(records))
    if count < FEW * pictures:
        return too_few(out, count, pictures)
    others = registers_of(captioned)
    lines = training(
        typed_path(out), count, val=len(shards.get("val", ())), techniques=any(record.get("technique") for record in captioned),
        registers=bool(others),
    )  # fmt: skip
    return "\n".join(filter(None, [f"Next:\n{lines}", of_registers(others, count)]))


def registers_written(out: str) -> list[str]:
    """`registers_of` the first shard in a folder; [] where it cannot be read from here."""
    try:
        first = sorted(Path(out).glob("train-*.tar"))[:1]
        return registers_of(records_in({"train": ShardIndex(first, one_of=IMAGE_SUFFIXES)})) if first and not is_url(out) else []
    except (UserError, OSError):
        return []


def shards_in(out: str) -> dict[str, ShardIndex]:
    """{split: its shards} of a folder."""
    paths = {split: sorted(Path(out).glob(f"{split}-*.tar")) for split in ("train", "val")}
    return {split: ShardIndex(found, one_of=IMAGE_SUFFIXES) for split, found in paths.items() if found}


def records_in(shards: Mapping[str, ShardIndex]) -> list[dict[str, Any]]:
    """The records of an even subsample that can be read."""
    return [record for index in shards.values() for record in index.some_records() if record is not None]


def registers_of(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The registers in which these records have captions besides the plain one, the most frequent first."""
    counts = Counter(
        name
        for record in records
        if isinstance(there := record.get("captions"), dict)
        for name, text in there.items()
        if text and name != "plain"
    )
    return [name for name, _ in counts.most_common()]


def of_registers(others: Sequence[str], pictures: int) -> str:
    """A note on captions of other registers than plain: how many of the samples draw from them, and the setting; "" if there are none."""
    if not others:
        return ""
    name = config(recipe_for(pictures))
    share = load_config(name).train.plain_share
    drawn = "trains on the plain captions alone" if share == 1 else f"draws {1 - share:.0%} of its samples from all registers"
    way_out = (
        "with train.plain_share=0.7, as above, three samples in ten draw from all registers"
        if share == 1
        else "train.plain_share=… changes that"
    )
    return f"Beside plain there are captions of the registers {', '.join(others)}: {name} {drawn}; {way_out}."


def several_captions(out: str, pictures: int) -> str:
    """A note on pictures with several captions, and the way to train on all of them."""
    out, one = typed_path(out.rstrip("/")), pictures == 1
    return (
        f"{pictures:,} picture{' has' if one else 's have'} several captions: the first is the caption, "
        "the others are kept in captions_all and not trained on. To train on them, write a table with file_name and a column for each "
        "register (plain: what is seen; era: a printed title; poetic, social, alt), and merge it:\n"
        f"  {shell('caption', out, '--from', 'registers.csv', '--out', f'{out}-captioned')}"
    )


def much_held_out(command: Sequence[str], *, val: int, kept: int) -> str:
    """A note that whole folders hold out many more pictures than asked; "" if they do not, or if --val-by is given."""
    share = float(option_of(command, "--val") or Settings.val)
    expected = share * kept
    if val <= expected + MUCH * math.sqrt(expected) + 1 or option_of(command, "--val-by"):  # more than single pictures draw by chance
        return ""
    again = [*command, "--val-by", "picture", *overwriting(command)]
    return (
        f"{val:,} of {kept:,} pictures are held out (--val {share:g} asks for {max(1, round(expected)):,}), "
        "since pictures of one folder or one group are not divided. If pictures of one folder are not copies of one another, divide them:\n"
        f"  {shell('prepare', *again)}"
    )


def sentences(command: Sequence[str], guess: Guess) -> str:
    """The command that takes a column of sentences, where a column of titles was taken for the captions."""
    again = [*command, "--caption-column", guess.better, *overwriting(command)]
    return (
        f"The captions are titles: they are read from the column {guess.column} of {guess.table}, "
        f"whose column {guess.better} has sentences. If these say what is seen, take them instead:\n  {shell('prepare', *again)}"
    )


def overwriting(command: Sequence[str]) -> list[str]:
    """What a command needs to replace shards made with other settings."""
    return ["--overwrite"] if "--overwrite" not in command else []


def from_tables(command: Sequence[str], source: str, tables: Sequence[str]) -> list[str]:
    """How captions are read from tables in SOURCE whose names are not those of caption tables."""
    lines = []
    for table in tables:
        if why := why_useless(source, table, command):
            lines.append(f"  not from {shown(table)}, as it stands: {why}")
            continue
        place, given = free_name(source, table), []
        if not (is_url(source) or is_spreadsheet(table) or "--captions" in command):
            given = [*command, "--captions", posixpath.join(source, table)]
        named = "save it as CSV UTF-8 under the name" if is_spreadsheet(table) else "name it"
        beside, counted = (", if its pictures are beside it,", ", if its paths are relative to the source") if "/" in table else ("", "")
        ways = [f"{named} {shlex.quote(typed_path(place))}{beside} and type the same command again"] if place else []
        ways += [f"give it{counted}:"] if given else []
        if ways:
            lines.append(
                f"  from {shown(table)}, if it holds captions (beside other tables it is not read under this name): {', or '.join(ways)}"
            )
        lines += [f"    {shell('prepare', *given)}"] if given else []
    return lines


def why_useless(source: str, table: str, command: Sequence[str]) -> str:
    """Why no captions can be read from a table, and what to rename; "" if they can, or if that is unknown."""
    if is_url(source) or is_spreadsheet(table):
        return ""
    try:
        encoding, quoting = option_of(command, "--encoding") or "utf-8", option_of(command, "--quoting") or "auto"
        columns = read_table(posixpath.join(source, table), encoding=encoding, quoting=quoting).columns
        asked = column_name(option_of(command, "--caption-column"))
    except (TableError, OSError) as error:
        return str(error)
    if not set(columns) & set(PATH_COLUMNS):
        return f"none of its columns ({', '.join(columns)}) is known to name the pictures; rename that one to file_name"
    if not set(columns) & {*CAPTION_COLUMNS, asked}:
        return f"none of its columns ({', '.join(columns)}) is known to hold captions; rename that one to caption"
    return ""


def captions_first(
    out: str, command: Sequence[str], missing: int, captioned: int, empty: int, report: str, *, other: int, ways: Sequence[str],
    source: str,
) -> str:  # fmt: skip
    again = [one for one in command if one != "--allow-missing-captions"]
    replaced = overwriting(command)
    with_captions = [*without_option(again, "--captions"), "--captions", f"{out}/{CAPTIONS}", *(replaced if again != command else [])]
    captioner = shell("caption", out, "--model", "Qwen/Qwen2.5-VL-3B-Instruct", "--registers", "plain", "--out", f"{out}-captioned")
    by_hand = [f"  by hand: fill in {out}/{CAPTIONS} ({report} shows its pictures), then", f"    {shell('prepare', *with_captions)}"]
    drafts = f"{out}-drafts"
    drafted = [*without_option(again, "--captions"), "--captions", f"{drafts}/{CAPTIONS}", *(replaced if again != command else [])]
    rough = [
        "  from rough drafts of the bundled model, without a download or a GPU "
        f"(seconds a picture, often wrong: correct {drafts}/{CAPTIONS} by hand):",
        f"    {shell('sample', '--image', source, '--out', drafts)}",
        f"    {shell('prepare', *drafted)}",
    ]
    by_model = ["  by a captioner, downloaded once (some GB; hours on a CPU for thousands; any other one or --endpoint will do):"]
    if not empty:
        by_model.append(f"    {shell('prepare', *command, '--allow-missing-captions', *(replaced if captioned else []))}")
    by_model.append(f"    {captioner}")
    one = missing == 1
    where = f"{'is' if one else 'are'} {'kept without one' if empty else 'not in the shards'}"
    first = (
        "Give captions first"
        if captioned < FEW * (captioned + missing)
        else f"Train without {'it' if one else 'them'} (Next), or give captions first"
    )
    more = (
        f"; {other:,} more {'has' if other == 1 else 'have'} none and {'is' if other == 1 else 'are'} left out for another reason (above)"
    )
    head = f"{missing:,} picture{' has' if one else 's have'} no caption and {where}{more if other else ''}. {first}:"
    return "\n".join(
        [
            head,
            *ways,
            *(by_hand if not is_url(out) else []),
            *(rough if Path(source).is_dir() and not is_url(out) and not captioned else []),
            *by_model,
        ]
    )


def option_of(command: Sequence[str], option: str) -> str:
    """The value of an option in a command; "" without it."""
    after = [
        one.partition("=")[2] or (command[i + 1 : i + 2] or [""])[0]
        for i, one in enumerate(command)
        if one == option or one.startswith(f"{option}=")
    ]
    return after[-1] if after else ""


def without_option(command: Sequence[str], option: str) -> list[str]:
    kept, skip = [], False
    for one in command:
        if not skip and one != option and not one.startswith(f"{option}="):
            kept.append(one)
        skip = one == option
    return kept


def shell(command: str, *arguments: str) -> str:
    """A command to paste, with all arguments quoted for the shell."""
    return shlex.join([*typed(command), *arguments])


def typed(command: str) -> list[str]:
    """How a subcommand of `tokun` is typed. After `python -m data_tools.NAME` the command tokun may not be
    on the path; in a clone's folder the next ones are then `python -m data_tools.inspect`, `python train.py`, as in the README."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not spec.name.startswith("data_tools."):
        return ["tokun", command]
    module, script = COMMANDS[command].module, Path(f"{command}.py")
    if module.startswith("data_tools."):
        return ["python", "-m", module]
    clone = Path(tokun.__file__).parents[1]
    return ["python", str(script)] if script.is_file() and script.samefile(clone / script) else ["python", "-m", "tokun", command]


MOST_MISSPELT = 5  # styles that are asked about


def misspelt(given: str, own: Mapping[str, int], command: Sequence[str]) -> str:
    """The last lines: a question for each style that may be a misspelling of one of the bundled model; "" if there is none.

    `given`: that of --style in `command`, the arguments; if it is "", the pictures have their `own`, each with its number.
    """
    vocabulary = BUNDLED / VOCABULARY
    known = json.loads(vocabulary.read_text(encoding="utf-8"))["styles"] if vocabulary.is_file() else []
    meant = {style: near for style in ([given] if given else own) if (near := near_style(style, known))}
    if not meant:
        return ""
    others = "Any other word becomes a style of its own."
    if not given:
        most = sorted(meant, key=lambda style: -own[style])[:MOST_MISSPELT]
        return "\n".join(
            f"prepare: WARNING: {style}, the style of {own[style]:,} picture{'' if own[style] == 1 else 's'}, "
            f"is one which the bundled model does not know; did you mean {near}? "
            f"Then correct it where it is written, and run the same command again. {others}"
            for style, near in ((style, meant[style]) for style in most)
        )
    again = [*without_option(command, "--style"), "--style", meant[given], *overwriting(command)]
    asked = (
        f"prepare: WARNING: --style is {given}, which the bundled model does not know; did you mean {meant[given]}? {others} To correct it:"
    )
    return f"{asked}\n  {shell('prepare', *again)}"


def near_style(style: str, known: Sequence[str]) -> str:
    """The style of `known` that a word may be a misspelling of; "" for words that training takes for one of them, or unlike them."""
    return "" if fitting_tag(style, known) else next(iter(difflib.get_close_matches(style, known, 1, 0.8)), "")


def inspecting(out: str) -> str:
    return "  " + shell("inspect", typed_path(out), "--verify", "--sheet", "sheet.png")


def recipe_for(pictures: int) -> str:
    """The config that suits so many pictures on a CPU."""
    return "lora" if pictures <= FEW_PICTURES else "finetune" if pictures <= MANY_PICTURES else "engraving-cpu"


def config(name: str) -> str:
    """How a config is named: in a clone by its file, as in the README."""
    return f"configs/{name}.yaml" if typed("train") == ["python", "train.py"] else name


def training(
    out: str, pictures: int, *, val: int, techniques: bool = False, command: Sequence[str] = (), side: int = 0, registers: bool = False
) -> str:  # fmt: skip
    """The commands that suit so many pictures: an adapter on the bundled model, the bundled model trained on, or a model from nothing.

    `techniques`: whether pictures have a technique. `command`: the arguments given to prepare. `side`: short side of the pictures in
    pixels, 0 if unknown. `registers`: whether there are captions in more than one register.
    """
    train_data, val_data = (shlex.quote(f"data.{split}={out}/{split}-*.tar") for split in ("train", "val"))
    own = "data.style_key=style " if techniques else ""  # the configs of whole trainings have technique
    data = f"{own}{train_data} {val_data if val else 'data.val='}"  # most configs name held-out shards
    sample = f"{shell('sample')} --checkpoint runs/mine --seed 0"
    if pictures <= FEW_PICTURES:
        given = (f"{train_data} {val_data}" if val else train_data) + (" train.plain_share=0.7" if registers else "")
        lines = [f"{shell('train')} --config {config('lora')} start=bundled {given} out=runs/mine-lora"]
        sample = f"{shell('sample')} --adapter runs/mine-lora --seed 0"
    elif pictures <= MANY_PICTURES:
        lines = [f"{shell('train')} --config {config('finetune')} start=bundled {data} out=runs/mine"]
    else:
        wanted = wanted_side("engraving")
        again = [*without_option(command, "--side"), "--side", str(wanted), *overwriting(command)]
        lines = [
            "on two CPU cores (128 px, grey, some 35 hours):",
            f"  {shell('train')} --config {config('engraving-cpu')} {data} out=runs/mine",
            "on a GPU with 80 GB (256 px, grey, meant for an hour and not run yet):",
            *([f"  {shell('prepare', *again)}"] if 0 < side < wanted else []),
            f"  {shell('train')} --config {config('engraving')} {data} out=runs/mine",
            "For colour add image_tokenizer.image_channels=3 to either. Then:",
        ]
    return "\n".join(f"  {line}" for line in [inspecting(out).strip(), *lines, sample])


def wanted_side(name: str) -> int:
    """The least `--side`, in eights, of which no crop of a config's image tokenizer is enlarged."""
    recipe = load_config(name)
    return 8 * math.ceil(recipe.image_tokenizer.image_size * recipe.image_tokenizer_train.crop_scale[1] / 8)
