"""Reasons: what each reason in a manifest means, and what can be done about it."""

from __future__ import annotations

import re

UNREADABLE = "Open the file in a picture viewer. If it is broken there too, fetch or scan it again; otherwise save it as PNG or JPEG."
NOT_OPENED = "Put the picture itself into the folder, and run again."
KEEP_AMBIGUOUS = "Look through the pictures below. If they belong to the collection, run prepare again with --keep-ambiguous."
KEEP_REJECTED = "Right for most. Pictures that are worth keeping can be prepared from a folder of their own with --no-clean."
EXPLANATIONS: dict[str, tuple[str, str]] = {
    "a pointer of Git LFS, not the picture: run git lfs pull": (
        "The collection was cloned without Git LFS: in the picture's place lie three lines that say where it is.",
        "Install git-lfs, run git lfs pull in the collection's folder, and run prepare again.",
    ),
    "no caption": (
        "Nothing was found that says what the picture shows.",
        "Write one line about it into a text file of the same name beside it (wolf.jpg, wolf.txt), or into a table captions.csv.",
    ),
    "caption is only a label": (
        "The only words beside the picture are a number or a kind of picture, such as “Fig. 12” or “Frontispiece”.",
        "Write a caption that says what it shows, as a text file beside the picture or in captions.csv.",
    ),
    "caption too short": ("The words beside the picture are too few to say anything.", "Write a longer caption for it."),
    "caption too long": (
        "The words beside the picture are a passage and not a caption; they would have been cut in the middle.",
        "Shorten the caption by hand where the picture is worth it.",
    ),
    "caption is a list": (
        "The words beside the picture look like a table of contents or an index.",
        "Give the picture a caption of its own, or leave it out.",
    ),
    "caption is a heading": (
        "The words beside the picture look like the number and title of a chapter; such titles seldom say what is shown.",
        "Write a caption for the pictures that are worth it, or run prepare again with --keep-ambiguous.",
    ),
    "caption is a fragment": (
        "The words beside the picture begin or end in the middle of a sentence.",
        "Mend the caption, in a text file beside the picture or in captions.csv.",
    ),
    "caption file cannot be read": (
        "A file with the caption lies beside the picture, and it is damaged or not of a kind that is read.",
        "Open it in a text editor and save it again as plain text (UTF-8), or remove it.",
    ),
    "too small": (
        "The picture has too few pixels: most often an initial, an ornament or a thumbnail.",
        "Find a larger scan, or lower --min-side if small pictures are wanted.",
    ),
    "too long": (
        "The picture is a narrow strip: a headpiece, a banner, a panorama.",
        "Raise --max-aspect if strips are wanted; a panorama can also be cut into several pictures.",
    ),
    "blank": ("An empty page, or one even tone.", "Nothing to do, unless the scan failed."),
    "nearly blank": ("Almost all of it is empty paper, or solid black.", "Crop it to its content if there is something in it."),
    "colour plate": (
        "The picture is in colours, and the collection is to be one of prints in black.",
        "Right for most. Convert a hand-coloured print to gray by hand if its lines are good.",
    ),
    "photograph": (
        "Its tones flow without lines, as in a photograph or a half-tone reproduction of a painting.",
        "Judge by eye whether it is a print. " + KEEP_AMBIGUOUS,
    ),
    "text page": ("Lines of lettering fill much of it: a page of text, a title page, a handwriting.", KEEP_AMBIGUOUS),
    "ornament or initial": (
        "A decorated letter, a tailpiece or another ornament, by its smallness or by its caption.",
        "Right for most. Give it a caption of some words if it shows a scene.",
    ),
    "map": ("A map, a chart or a plan, mostly told by its caption.", KEEP_AMBIGUOUS),
    "music": ("Printed music: staves of five lines.", "Right for most. A ruled sky or a building can be mistaken; keep those by hand."),
    "diagram": ("A section, a scheme, a figure keyed by letters or a puzzle, as its caption says.", KEEP_AMBIGUOUS),
    "another medium": ("A model that compares pictures with words takes it for something else than the style asked for.", KEEP_AMBIGUOUS),
    "ornament of the style sheet": (
        "The page of the book uses it for its design, not as an illustration: most often an initial.",
        "Right for most. A picture worth keeping can be put into a folder of its own with a caption.",
    ),
    "not shown in the book": (
        "The file lies in the book's folder, and no page shows it.",
        "Nothing to do, or put it into a folder of its own with a caption.",
    ),
    "other style": ("The picture belongs to another class than the one asked for.", "Nothing to do, or ask for its class with --style."),
    "in no class folder": ("The picture lies outside the folders that name the classes.", "Move it into the folder of its class."),
    "exact duplicate": ("The very same file is there more than once; one copy was kept.", "Nothing to do."),
    "near duplicate": (
        "It looks the same as another picture that was kept: a second scan, another size.",
        "Nothing to do, unless two plates are truly different: then run prepare again with --duplicates exact.",
    ),
    "thumbnail": ("A small version of another picture in the collection; the large one is used.", "Nothing to do."),
    "too like a picture for training": (
        "It was drawn for validation, and looks so much like a training picture that it would be no fair test.",
        "Nothing to do.",
    ),
    "empty file": ("The file has no content.", "Fetch it again."),
    "not a picture that can be read": ("The file is no picture, or of a kind that is not read.", UNREADABLE),
    "truncated or damaged": ("The file breaks off, or its data are damaged.", UNREADABLE),
    "colours cannot be read": ("The picture's colours are stored in a way that could not be understood.", UNREADABLE),
    "too many pixels": (
        "The picture is so large that opening it could exhaust the machine.",
        "Save a smaller version of it, or raise the limit with `--max-megapixels`.",
    ),
    "file too large": ("The file is larger than what is opened.", "Save a smaller version of it."),
    "cannot be read": ("The disk did not hand the file out.", "Check the permissions of the file and the health of the disk."),
    "folder cannot be read": ("The folder could not be entered, so nothing inside was seen.", "Check the permissions of the folder."),
    "symlink leaves the source": ("A link that points out of the folder; it is not followed, for safety.", NOT_OPENED),
    "path leaves the source": ("The list names a file outside the folder of the collection; it is not opened, for safety.", NOT_OPENED),
    "missing file": ("The list or the page names a file that is not there.", NOT_OPENED),
    "a web address, not a file": ("The list gives an address on the web; nothing is fetched from there.", NOT_OPENED),
    "symlink to a folder": ("A link to another folder; it is not followed, or pictures would come twice.", NOT_OPENED),
    "broken symlink": ("A link to something that is not there.", NOT_OPENED),
    "not a regular file": ("A device or a pipe with the name of a picture.", "Remove it from the folder."),
    "changed while being read": ("The file changed during the run.", "Run again when nothing writes into the folder."),
}
NOT_READ = (
    "Nothing to do, unless it holds pictures or captions: see python -m data_tools.prepare --help for what is read, and under which names."
)
EXPLANATIONS |= {
    "not read: neither a picture nor words for one": ("A file of another kind.", NOT_READ),
    "not read: a text without a picture of its name": (
        "A text that lies beside pictures and bears the name of none.",
        "Give it the name of its picture (wolf.jpg, wolf.txt) if it is a caption.",
    ),
    "not read: ambiguous: several pictures have its name": (
        "A file of words whose name fits several pictures (wolf.txt beside wolf.jpg and wolf.png), so that it cannot be told which of them it describes.",
        "Call it by the whole name of its picture (wolf.jpg.txt), or write the captions into captions.csv.",
    ),
    "not read: JSON without a picture of its name": (
        "A JSON file that bears the name of no picture.",
        "Give it the name of its picture, or call a table of captions captions.json.",
    ),
    "not read: its picture has another file of words, which is read": (
        "A picture has one file of text and one of JSON; this is one more.",
        "Remove one of them if the wrong one was read.",
    ),
    "not read: a table under another name than captions or metadata": (
        "A table that is not taken for captions.",
        "Call it captions.csv (.tsv, .jsonl, .parquet) if it holds captions, or give it as SOURCE.",
    ),
    "ambiguous: several pictures under one key": (
        "A sample of a tar file holds several pictures, and it cannot be told which of them its words are about.",
        "Give each picture a key of its own.",
    ),
    "ambiguous: its key is there twice": (
        "Two samples of a tar file have one key, and their words cannot be told apart.",
        "Give each picture a key of its own.",
    ),
}
UNKNOWN = ("This page has no further words for this reason.", "Look at the pictures and file names below.")
FAMILIES = tuple(
    (re.compile(pattern, re.S), name)
    for pattern, name in (
        (r"(thumbnail|near duplicate) of ", r"\1"),
        (r"too like ", "too like a picture for training"),
        (r"CLIP sees", "another medium"),
        (r"caption file", "caption file cannot be read"),
        (r"(colours cannot be read)", r"\1"),
    )
)


def family(reason: str) -> str:
    """The reason without the names in it: `thumbnail of a/b.jpg` and `near duplicate of c.jpg` are one each."""
    for pattern, name in FAMILIES:
        if found := pattern.match(reason):
            return found.expand(name)
    return reason
