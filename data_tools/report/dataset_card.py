"""Dataset card: the README.md beside prepared shards, by which `datasets.load_dataset(FOLDER)` reads them with their splits and features.

Its head is the YAML that the Hugging Face Hub and `datasets` know: the files of each split, the type of every field, the numbers of pairs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from data_tools.report.counting import Summary
from data_tools.report.records import SPLITS, Records
from tokun.utils.files import whole_file

NAME = "README.md"
MARK = "<!-- written by tokun's prepare: what you write here is lost when it runs again, unless you remove this line -->"
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"))
LICENCES = frozenset({
    "apache-2.0", "bsd-3-clause", "cc", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "mit", "odbl", "pddl",
})  # fmt: skip
"""The Hub's names of licences that pictures have; another licence is `other` with its own name."""
MOST_REASONS, MOST_LICENCES = 20, 10


def write_card(out: Path, summary: Summary) -> Path | None:
    """Write README.md into the shards' folder. A README.md without our mark was written by someone else and stays: then None.

    `summary`: as the report counts the manifest and the shards; nothing is read again.
    """
    path = out / NAME
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return None
    with whole_file(path) as aside:
        aside.write_text(card(summary, summary.records), encoding="utf-8", errors="replace", newline="\n")
    return path


# --- types ------------------------------------------------------------------------------------------------------------


def feature(name: str, kind: Any) -> dict[str, Any] | None:
    """The YAML of a field, or None for one that has no type of its own: values of several types, or objects without a field."""
    inner, listed = (kind[0], True) if isinstance(kind, list) else (kind, False)
    if isinstance(inner, dict):
        fields = [one for one in (feature(name, part) for name, part in inner.items()) if one]
        return {"name": name, "list" if listed else "struct": fields} if fields else None
    if isinstance(inner, list) or inner == "json":
        return None
    return {"name": name, "sequence" if listed else "dtype": "string" if inner == "null" else inner}


# --- the card ---------------------------------------------------------------------------------------------------------


def card(summary: Summary, records: Records) -> str:
    """The Markdown, with its YAML head. Equal input gives equal text."""
    settings = summary.settings
    name = str(settings.get("source") or "Prepared pictures")
    return f"---\n{head(records, name)}---\n\n{MARK}\n\n# {line(name)}\n\n{body(summary, records)}"


def head(records: Records, name: str) -> str:
    import yaml  # where it is needed: every process of prepare imports this module

    splits = [split for split in SPLITS.values() if records.pairs[split]]
    total = sum(records.pairs.values())
    shards = {split: prefix for prefix, split in SPLITS.items()}
    tree: dict[str, Any] = {"pretty_name": name}
    named = [licence for licence in records.licences if licence]
    if len(records.licences) == 1 and named:
        known = re.sub(r"[\s_]+", "-", named[0].strip().lower())
        tree |= {"license": known} if known in LICENCES else {"license": "other", "license_name": named[0][:80]}
    languages = sorted(language for language in records.languages if re.fullmatch(r"[a-z]{2,3}", language))
    if languages:
        tree["language"] = languages
    tree |= {"task_categories": ["text-to-image", "image-to-text"], "tags": ["tokun", "webdataset"]}
    tree["size_categories"] = [next((name for most, name in SIZES if total < most), "n>10M")]
    if splits:
        files = [{"split": split, "path": f"{shards[split]}-*.tar"} for split in splits]
        json_feature = feature("json", records.fields)
        tree["configs"] = [{"config_name": "default", "data_files": files}]
        tree["dataset_info"] = {
            "features": [
                *({"name": suffix, "dtype": "image"} for suffix in sorted(records.suffixes)),
                *([json_feature] if json_feature else []),
                {"name": "__key__", "dtype": "string"},
                {"name": "__url__", "dtype": "string"},
            ],
            "splits": [{"name": split, "num_bytes": records.bytes[split], "num_examples": records.pairs[split]} for split in splits],
            "download_size": sum(records.bytes.values()),
            "dataset_size": sum(records.bytes.values()),
        }
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=200)


def body(summary: Summary, records: Records) -> str:
    settings, total = summary.settings, sum(records.pairs.values())
    style = f" in the style {settings['style']}" if settings.get("style") else ""
    parts = [
        f"{total:,} pictures with captions{style}, {settings.get('side', '?')} pixels on the short side, as WebDataset shards: "
        f"`KEY.{'/'.join(sorted(records.suffixes)) or 'webp'}` and `KEY.json`.",
        "```python\nfrom datasets import load_dataset\n\n"
        'pairs = load_dataset("FOLDER", split="train")  # or the id of this data set on the Hub\n'
        f'pairs[0]["{min(records.suffixes, default="webp")}"], pairs[0]["json"]["caption"]\n```',
        "## Splits\n\n"
        + table(
            ("split", "pairs", "bytes"),
            [(s, f"{records.pairs[s]:,}", f"{records.bytes[s]:,}") for s in SPLITS.values() if records.pairs[s]],
        ),
    ]
    licences = [(line(name) or "not stated", f"{count:,}") for name, count in records.licences.most_common(MOST_LICENCES)]
    if any(records.licences):
        parts.append(
            "## Licences\n\nAs given with the pictures; each pair has its own in `json.license`.\n\n"
            + table(("licence", "pairs"), licences)
        )
    else:
        parts.append("## Licences\n\nNone was given. Whoever publishes these pictures has to state one.")
    left_out = [(status, line(reason), f"{count:,}") for (status, reason), count in summary.reasons.most_common(MOST_REASONS)]
    if left_out:
        more = len(summary.reasons) - len(left_out)
        parts.append(
            f"## What was left out\n\n{summary.total:,} files were read. `manifest.parquet` has a row for each; `report.html` shows them."
            f"{f' {more} rarer reasons are only there.' if more > 0 else ''}\n\n" + table(("status", "reason", "files"), left_out)
        )
    return "\n\n".join(parts) + "\n"


def table(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (names, ("---",) * len(names), *rows))


def line(text: str) -> str:
    """Text for one cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").strip()[:160]
