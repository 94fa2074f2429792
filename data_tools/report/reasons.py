"""Reasons: the meaning of each reason in a manifest, and what to do about it."""

from __future__ import annotations

import re

UNREADABLE = "Open the file in a picture viewer. If it is broken there too, fetch or scan it again; otherwise save it as PNG or JPEG."
NOT_OPENED = "Put the picture itself into the folder, and run again."
ELSEWHERE = (
    "Put the picture itself into the folder, and run again; or name the folder that the paths of a table are counted from with --root."
)
KEEP_AMBIGUOUS = "Look through the pictures below. If they belong to the collection, run prepare again with --keep-ambiguous."
KEEP_REJECTED = "Usually right. Pictures that are worth keeping can be prepared from a separate folder with --no-clean."
EXPLANATIONS: dict[str, tuple[str, str]] = {
    "a pointer of Git LFS, not the picture: run git lfs pull": (
        "The collection was cloned without Git LFS, so the file only holds three lines that say where the picture is.",
        "Install git-lfs, run git lfs pull in the collection's folder, and run prepare again.",
    ),
    "no caption": (
        "Nothing says what the picture shows.",
        "Write one line about it into a text file with the same name beside it (wolf.jpg, wolf.txt), or into a table captions.csv.",
    ),
    "caption is only a label": (
        "The only words with the picture are a number or a kind of picture, such as “Fig. 12” or “Frontispiece”.",
        "Write a caption that says what it shows, as a text file beside the picture or in captions.csv.",
    ),
    "caption too short": ("The words with the picture are too few to say anything.", "Write a longer caption."),
    "caption too long": (
        "The words with the picture are a passage, not a caption, and would have been cut in the middle.",
        "Shorten the caption by hand if the picture is worth it.",
    ),
    "caption is a list": (
        "The words with the picture look like a table of contents or an index.",
        "Give the picture its own caption, or leave it out.",
    ),
    "caption is a heading": (
        "The words with the picture look like the number and title of a chapter, which seldom say what is shown.",
        "Write a caption for the pictures that are worth it, or run prepare again with --keep-ambiguous.",
    ),
    "caption is a fragment": (
        "The words with the picture begin or end in the middle of a sentence.",
        "Correct the caption, in a text file beside the picture or in captions.csv.",
    ),
    "caption file cannot be read": (
        "There is a caption file beside the picture, but it is damaged or in an unsupported format.",
        "Open it in a text editor and save it again as plain text (UTF-8), or remove it.",
    ),
    "caption table cannot be read": (
        "Nothing was prepared, since this table of captions has a fault.",
        "Correct the fault that its reason names, and run prepare again.",
    ),
    "not read: prepare stopped at a fault of another file": (
        "Nothing was prepared, since a table of captions has a fault.",
        "Correct that table, and run prepare again.",
    ),
    "too small": (
        "The picture has too few pixels. It is usually an initial, an ornament or a thumbnail.",
        "Find a larger scan, or lower --min-side if small pictures are wanted.",
    ),
    "too long": (
        "The picture is a narrow strip: a headpiece, a banner, a panorama.",
        "Raise --max-aspect if strips are wanted; a panorama can also be cut into several pictures.",
    ),
    "blank": ("An empty page, or a single tone.", "Nothing to do, unless the scan failed."),
    "nearly blank": ("Almost all of it is empty paper or solid black.", "Crop it to its content if there is something in it."),
    "colour plate": (
        "The picture is in colour, but the collection is meant to hold black prints.",
        "Usually right. Convert a hand-coloured print to gray by hand if its lines are good.",
    ),
    "photograph": (
        "It has continuous tones without lines, as in a photograph or a half-tone reproduction of a painting.",
        "Judge by eye whether it is a print. " + KEEP_AMBIGUOUS,
    ),
    "text page": ("Lines of lettering fill much of it: a page of text, a title page, handwriting.", KEEP_AMBIGUOUS),
    "ornament or initial": (
        "A decorated letter, a tailpiece or another ornament, judging by its small size or its caption.",
        "Usually right. Give it a caption of a few words if it shows a scene.",
    ),
    "map": ("A map, a chart or a plan, mostly judging by its caption.", KEEP_AMBIGUOUS),
    "music": ("Printed music: staves of five lines.", "Usually right. A ruled sky or a building can look like staves; keep those by hand."),
    "diagram": ("A section, a scheme, a figure keyed by letters or a puzzle, judging by its caption.", KEEP_AMBIGUOUS),
    "another medium": ("A model that compares pictures with words sees something other than the requested style.", KEEP_AMBIGUOUS),
    "ornament of the style sheet": (
        "The book's page uses it for its design, not as an illustration. It is usually an initial.",
        "Usually right. A picture worth keeping can be put into a separate folder with a caption.",
    ),
    "not shown in the book": (
        "The file is in the book's folder, but no page shows it.",
        "Nothing to do, or put it into a separate folder with a caption.",
    ),
    "other style": ("The picture belongs to another class than the requested one.", "Nothing to do, or request its class with --style."),
    "in no class folder": ("The picture is outside the class folders.", "Move it into the folder of its class."),
    "exact duplicate": ("The same file is there more than once; one copy was kept.", "Nothing to do."),
    "near duplicate": (
        "It looks the same as another picture that was kept, such as a second scan or another size.",
        "Nothing to do, unless two plates are truly different: then run prepare again with --duplicates exact.",
    ),
    "thumbnail": ("A small version of another picture in the collection; the large one is used.", "Nothing to do."),
    "too like a picture for training": (
        "It was drawn for validation, but looks so much like a training picture that it would not be a fair test.",
        "Nothing to do.",
    ),
    "empty file": ("The file has no content.", "Download it again."),
    "not a picture that can be read": ("The file is not a picture, or is in an unsupported format.", UNREADABLE),
    "truncated or damaged": ("The file is incomplete, or its data are damaged.", UNREADABLE),
    "colours cannot be read": ("The picture's colours are stored in an unsupported way.", UNREADABLE),
    "too many pixels": (
        "The picture is so large that opening it could exhaust the memory.",
        "Save a smaller version of it, or raise the limit with `--max-megapixels`.",
    ),
    "file too large": ("The file is larger than the limit.", "Save a smaller version of it."),
    "cannot be read": ("The system could not read the file.", "Check the permissions of the file and the health of the disk."),
    "folder cannot be read": ("The folder could not be opened, so its contents are unknown.", "Check the permissions of the folder."),
    "symlink leaves the source": ("A link that points outside the folder; for safety it is not followed.", NOT_OPENED),
    "path leaves the source": ("The list names a file outside the collection's folder; for safety it is not opened.", ELSEWHERE),
    "missing file": ("The list or the page names a file that does not exist.", ELSEWHERE),
    "a web address, not a file": ("The list gives a web address; nothing is downloaded from there.", NOT_OPENED),
    "symlink to a folder": ("A link to another folder; it is not followed, because pictures would appear twice.", NOT_OPENED),
    "broken symlink": ("A link to something that does not exist.", NOT_OPENED),
    "not a regular file": ("A device or a pipe named like a picture.", "Remove it from the folder."),
    "changed while being read": ("The file changed during the run.", "Run again when nothing is writing to the folder."),
}
NOT_READ = "Nothing to do, unless it holds pictures or captions: see tokun prepare --help for the files that are read and their names."
EXPLANATIONS |= {
    "not read: neither a picture nor words for one": ("A file of another kind.", NOT_READ),
    "not read: a picture in a format that is not read; save it as PNG or JPEG": (
        "A drawing, a camera's raw file or another format that this tool cannot open.",
        "Save it as PNG or JPEG, under the same name, and run again.",
    ),
    "not read: compressed; unpack it": ("An archive, which is not opened.", "Unpack it into the folder, and run again."),
    "not read: captions in another form; see --help for the tables that are read": (
        "It is named like a list of captions, but it is not a table with a header that can be read.",
        "Save it as captions.csv, with the columns file_name and caption.",
    ),
    "not read: a COCO file; give it as SOURCE, or name it captions.json": (
        "A list of pictures and captions in the form of COCO.",
        "Give this file itself as SOURCE, or name it captions.json and put it beside its pictures.",
    ),
    "not read: a table in a tar: unpack the tar to use it": (
        "A table among the members of a tar file; only KEY.txt and KEY.json are read there.",
        "Unpack the tar, and give the folder as SOURCE.",
    ),
    "not read: a part of a saved data set; give its folder as SOURCE": (
        "An Arrow file of a data set that was saved by `save_to_disk`.",
        "Give its folder, with dataset_dict.json or state.json in it, as SOURCE.",
    ),
    "not read: has a picture's name, but no suffix of words that are read; write its words into NAME.txt": (
        "It may hold words about the picture with the same name, but in a form that is not read.",
        "Put the caption into a text file with the picture's name (wolf.jpg, wolf.txt).",
    ),
    "not read: a text with the name of a picture in another folder; put it beside the picture": (
        "Texts are read only beside their pictures, not from a separate folder.",
        "Put the texts into the folder of the pictures, or write the captions into captions.csv.",
    ),
    "not read: a text without a picture of its name": (
        "The text is beside pictures, but none of them has its name.",
        "If it is a caption, give it the name of its picture (wolf.jpg, wolf.txt).",
    ),
    "not read: its name is longer than its picture's; name it NAME.txt": (
        "A text whose name has extra parts after the picture's name, such as wolf.en.txt beside wolf.jpg.",
        "Give the one that is the caption the name of its picture (wolf.txt). "
        "Write several captions of a picture into several rows of captions.csv.",
    ),
    "not read: words under another name than their picture's": (
        "Words in a sample of a tar file, under a name that is neither the picture's nor one for captions.",
        "Name the member KEY.txt, KEY.json or KEY.caption.txt.",
    ),
    "not read: ambiguous: several pictures have its name": (
        "A text file whose name fits several pictures (wolf.txt beside wolf.jpg and wolf.png), "
        "so it is unclear which of them it describes.",
        "Give it the whole name of its picture (wolf.jpg.txt), or write the captions into captions.csv.",
    ),
    "not read: JSON without a picture of its name": (
        "No picture has the name of this JSON file.",
        "Give it the name of its picture; if it is a table of captions, name it captions.json.",
    ),
    "not read: its picture has another file of words, which is read": (
        "A picture can have one text file and one JSON file; this is an extra one.",
        "If the wrong one was read, remove that one.",
    ),
    "not read: a table under another name than captions or metadata, in object storage": (
        "A table that is not read as captions.",
        "If it holds captions, name it captions.csv (.tsv, .jsonl), or download it and give it with --captions.",
    ),
    "not read: a table without captions that are known as such, or one of several": (
        "A table that is not read as captions.",
        "If it holds captions, name it captions.csv (.tsv, .jsonl, .parquet), or give it as SOURCE, with --root for the pictures' folder.",
    ),
    "ambiguous: several pictures under one key": (
        "A sample in a tar file holds several pictures, and it is unclear which of them its words describe.",
        "Give each picture a key of its own.",
    ),
    "ambiguous: its key is there twice": (
        "Two samples in a tar file have the same key, so it is unclear which words belong to which.",
        "Give each picture a key of its own.",
    ),
}
UNKNOWN = ("This page has no explanation for this reason.", "Look at the pictures and file names below.")
FAMILIES = tuple(
    (re.compile(pattern, re.S), name)
    for pattern, name in (
        (r"(thumbnail|near duplicate) of ", r"\1"),
        (r"too like ", "too like a picture for training"),
        (r"CLIP sees", "another medium"),
        (r"caption table: ", "caption table cannot be read"),
        (r"caption file", "caption file cannot be read"),
        (r"(colours cannot be read)", r"\1"),
    )
)


def family(reason: str) -> str:
    """The reason without file names: all `thumbnail of …` are one family, all `near duplicate of …` another."""
    for pattern, name in FAMILIES:
        if found := pattern.match(reason):
            return found.expand(name)
    return reason
