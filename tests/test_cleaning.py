"""Promises of data_tools/text and of images/measure.py, judge.py and trim.py, on pictures drawn on the spot.

On real engravings, too, where they are at hand."""

from __future__ import annotations

import io
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from benchmarks import cleaning as benchmark
from data_tools.images.judge import reasons
from data_tools.images.measure import look, percentiles
from data_tools.images.trim import trim
from data_tools.pipeline.verdicts import AMBIGUOUS, REJECT, Verdict, decide
from data_tools.text.captions import BLOCK_TAG, INLINE_TAG, clean_caption, plain_once, plain_text, settled
from data_tools.text.language import language

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BOOKS = SHARED / "raw-books"
LABELS = Path(__file__).resolve().parents[1] / "benchmarks" / "labels.tsv"


def needs(path: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not path.exists(), reason=f"{path.name} is not at hand: the reference data lie beside the repository")


def hatched(size: tuple[int, int] = (320, 240), seed: int = 0) -> Image.Image:
    """A figure and a ground of slanting black lines on white: line work as a wood engraving has it."""
    y, x = np.mgrid[: size[1], : size[0]]
    figure = np.hypot(x - size[0] * (0.4 + 0.05 * seed), y - size[1] * 0.55) < min(size) * 0.3
    lines = np.where(figure, (x + y) % 4 < 3, (x - 2 * y) % 7 < 2)
    ground = y > size[1] * (0.3 + 0.1 * (seed % 3))
    return Image.fromarray(np.where(lines & (figure | ground), 10, 250).astype(np.uint8))


def on_paper(image: Image.Image, margin: int = 40, paper: int = 250) -> Image.Image:
    page = Image.new("L", (image.width + 2 * margin, image.height + 2 * margin), paper)
    page.paste(image, (margin, margin))
    return page


def page_of_text(lines: int = 24) -> Image.Image:
    """Rows of short strokes with gaps between words, as far as a page of print is rows of letters."""
    random = np.random.default_rng(0)
    page = Image.new("L", (400, 40 + 20 * lines), 250)
    pen = ImageDraw.Draw(page)
    for row in range(lines):
        for x in range(20, 380, 5):
            if random.random() < 0.8:
                pen.rectangle((x, 20 + 20 * row, x + 2, 27 + 20 * row), fill=20)
    return page


def sheet_of_music() -> Image.Image:
    page = Image.new("L", (400, 420), 250)
    pen = ImageDraw.Draw(page)
    for stave in range(4):
        for line in range(5):
            pen.line((10, 30 + 100 * stave + 8 * line, 390, 30 + 100 * stave + 8 * line), fill=20)
        for note in range(12):
            x, y = 30 + 30 * note, 30 + 100 * stave + 4 * (note % 8)
            pen.ellipse((x, y, x + 8, y + 6), fill=20)
    return page


def soft_picture(size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Tones that flow, as in a photograph."""
    random = np.random.default_rng(1)
    return Image.fromarray(random.integers(0, 256, (6, 8), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def coloured() -> Image.Image:
    random = np.random.default_rng(2)
    return Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((240, 200), Image.Resampling.NEAREST)


def yellowed(image: Image.Image) -> Image.Image:
    gray = np.asarray(image).astype(np.float32)[..., None] / 255
    return Image.fromarray((np.array([60, 45, 30]) + gray * np.array([180, 175, 130])).astype(np.uint8))


def initial() -> Image.Image:
    image = Image.new("L", (60, 70), 255)
    ImageDraw.Draw(image).rectangle((25, 8, 36, 62), fill=0)
    return image


BLANK = look(Image.new("L", (64, 64), 250))


def found(image: Image.Image, caption: str = "The wolf and the lamb", **options) -> set[tuple[str, str]]:
    return {(one.kind, one.reason) for one in reasons(look(image), caption, **options)}


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_a_line_engraving_has_nothing_against_it():
    assert found(hatched()) == found(yellowed(hatched())) == found(on_paper(hatched())) == set()


@pytest.mark.parametrize(
    "image, caption, reason",
    [
        (coloured(), "A garden", "colour plate"),
        (soft_picture(), "A garden", "photograph"),
        (Image.new("L", (200, 200), 243), "A garden", "blank"),
        (page_of_text(), "A garden", "text page"),
        (sheet_of_music(), "A song", "music"),
        (initial(), "", "ornament or initial"),
        (hatched(), "[Illustration: Tailpiece]", "ornament or initial"),
        (hatched(), "Fig. 3.—MAP OF AFRICA", "map"),
        (hatched(), "Diagram of the valves", "diagram"),
        (hatched((40, 60)), "A garden", "too small"),
        (hatched((600, 120)), "A garden", "too long"),
    ],
)
def test_each_clear_case_is_rejected_with_its_reason(image, caption, reason):
    assert (REJECT, reason) in found(image, caption)


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_a_print_that_is_partly_as_smooth_as_a_photograph_is_ambiguous(share):
    tones = np.array(hatched())
    tones[: round(240 * share)] = np.asarray(soft_picture())[: round(240 * share)]
    assert found(Image.fromarray(tones)) == {(AMBIGUOUS, "photograph")}


def test_made_prints_are_kept_and_their_captions_stay_as_they_are():
    prints = [hatched((220 + 20 * (seed % 7), 200 + 30 * (seed % 4)), seed % 6) for seed in range(24)]
    captions = [f"{what} {where}" for what in ("A heron", "Two mills", "The old ferry") for where in ("by a pond", "at dusk.", "in Kent")]
    assert [decide(reasons(look(image), caption)) for image, caption in zip(prints, captions * 3)] == [("kept", "")] * 24
    assert [clean_caption(caption).reason for caption in captions] == [""] * 9
    assert [clean_caption(caption).text for caption in captions] == captions


def test_a_few_strokes_on_a_page_are_nearly_blank():
    page = Image.new("L", (400, 400), 250)
    ImageDraw.Draw(page).rectangle((180, 180, 215, 215), fill=0)
    assert found(page) == {(REJECT, "nearly blank")}


@pytest.mark.parametrize(
    "caption, reason",
    [
        ("Plan of the harbour", "map"),
        ("Music—a hymn", "music"),
        ("Facsimile of a letter", "text page"),
        ("Ornaments", "ornament or initial"),
        ("THE EDITOR'S POCKET-BOOK.", "ornament or initial"),
        ("Our Post-office Box", "ornament or initial"),
        ("Pods, and microscopic details", "diagram"),
        ("Anatomy of the carp. a, the gills; b, the heart; c, the liver.", "diagram"),
    ],
)
def test_a_caption_that_only_hints_makes_a_picture_ambiguous(caption, reason):
    assert found(hatched(), caption) == {(AMBIGUOUS, reason)}


def test_words_save_a_small_picture_from_being_taken_for_an_initial():
    small = hatched((150, 160))
    assert found(small, "") == {(AMBIGUOUS, "ornament or initial")}
    assert found(small, "A fox in the snow") == found(small, "Pampeluna") == set()


def test_paintings_and_photographs_pass_where_no_print_is_asked_for():
    assert found(coloured(), prints=False) == found(soft_picture(), prints=False) == set()


def test_limits_of_size_and_shape_are_the_callers():
    assert (REJECT, "too small") not in found(hatched((40, 60)), min_side=32)
    assert found(hatched((600, 120)), max_aspect=6) == set()


def test_reject_outweighs_ambiguous_and_the_first_of_a_kind_counts():
    verdicts = [Verdict(AMBIGUOUS, "map"), Verdict(REJECT, "too small"), Verdict(REJECT, "blank")]
    assert decide(verdicts) == ("rejected", "too small")
    assert decide(verdicts[:1]) == ("ambiguous", "map")
    assert decide([]) == ("kept", "")


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["L", "RGB"]), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_any_picture_can_be_measured_judged_and_trimmed(width, height, mode, seed):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(values).convert(mode)
    measured = look(image)
    assert measured == look(image) and 0 <= measured.white <= 1
    assert reasons(measured) and trim(image)[0].width >= 1


# ---- margins and plates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paper", [255, 238, 205])
def test_a_plain_margin_goes_and_the_picture_stays(paper):
    picture = hatched().point(lambda tone: min(tone, paper))
    trimmed, box = trim(on_paper(picture, 40, paper))
    top = next(y for y in range(picture.height) if np.asarray(picture)[y].min() < 100)
    assert all(abs(a - b) <= 3 for a, b in zip(box, (40, 40 + top, 40 + picture.width, 40 + picture.height)))
    assert trimmed.size == (box[2] - box[0], box[3] - box[1])


def test_specks_do_not_hold_a_margin_but_thin_lines_do():
    page = on_paper(hatched())
    plain = trim(page)[1]
    page.putpixel((3, 3), 0)
    page.putpixel((page.width - 5, 9), 0)
    assert trim(page)[1] == plain
    pen = ImageDraw.Draw(page)
    pen.line((10, 12, page.width - 11, 12), fill=0)  # a frame line
    pen.line((200, 20, 200, 120), fill=0)  # a spire
    assert trim(page)[1][:2] == (9, 11)


def test_a_frame_a_light_sky_and_dark_ground_are_no_margin():
    framed = hatched()
    ImageDraw.Draw(framed).rectangle((0, 0, framed.width - 1, framed.height - 1), outline=0)
    dark = Image.eval(on_paper(hatched()), lambda tone: 255 - tone)
    sky = on_paper(hatched())
    sky.paste(232, (0, 0, sky.width, 40))
    assert trim(framed)[1] == (0, 0, *framed.size)
    assert trim(dark)[1] == (0, 0, *dark.size)
    assert trim(sky)[1][1] == 0


def test_an_empty_page_comes_back_whole():
    page = Image.new("L", (80, 60), 250)
    assert trim(page) == (page, (0, 0, 80, 60))


# ---- captions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw, text",
    [
        ("<p>The <b>W</b>olf &amp; the&nbsp;Lamb</p>", "The Wolf & the Lamb"),
        ("[Illustration: THE WOLF. [Pg 12] (See page 14.)]", "The Wolf."),
        ("{12} The cat[3] sits.", "The cat sits."),
        ("The cat. Click to enlarge.", "The cat."),
        ("The cat (see larger image)", "The cat"),
        ("The Launch of the Lifeboat.  From a photograph by W. H. Franklin.", "The Launch of the Lifeboat."),
        ("The boom of a gun. From a photograph by W. H. Franklin. James Laming", "The boom of a gun. James Laming"),
        ("La Mina. From an old print.", "La Mina."),
        ("Fig. 7.&mdash;PARKIA BIGLOBOSA.", "Parkia Biglobosa."),
        ("IMPROVED CREAM SEPARATOR. Fig. 2.", "Improved Cream Separator."),
        ("Plate IV. The Tower of London. To face page 12.", "The Tower of London."),
        ("Frontispiece—The Queen of France", "The Queen of France"),
        ("Illustration: 'STODDART ... CARRIED HIM'", "'Stoddart ... Carried Him'"),
        ("\u201cWHAT IS THIS?\u201d\r\n\r\n(page 30)", '"What Is This?"'),
        ("HENRY VIII. AND H.M.S. BEAGLE", "Henry VIII. and H.M.S. Beagle"),
        ("The wolf . . . . . . . 12", "The wolf"),
        ('"DAISY AND DOLLY." (See p. 176).', '"Daisy and Dolly."'),
        ("HENRY VIII—THE KING", "Henry VIII—The King"),
        ("_Coxswain_ of the boat--at rest", "Coxswain of the boat—at rest"),
        ("12. The fox", "The fox"),
    ],
)
def test_what_is_no_part_of_a_caption_goes(raw, text):
    assert clean_caption(raw).text == text
    assert clean_caption(raw).reason == ""


@pytest.mark.parametrize(
    "text",
    [
        "Figure skating in Holland", "Plate of fruit", "No. 12 Downing Street", "1812. The retreat", "2 < 3 wolves and 5 > 4",
        "A page of Caxton",
        "King Charles I", "Edward the Confessor's chapel, and the Abbot's house", "Carriage drawn by oxen", "By the river", "The Mosquito.",
        "1. The boat-house; 2. The ships", "I—I beg your pardon!", "Hornet, the", "Part of the ruins", "A scene in Spain",
        "Old bits: 1. A door. 2. A gate. 3. A wall.", "A map-seller", "Capital of a Column (destroyed), Paris. (Eleventh Century.)",
        "...and left",
    ],
)  # fmt: skip
def test_a_good_caption_stays_as_it_is(text):
    assert clean_caption(text).text == text
    assert clean_caption(text).verdicts == []


@pytest.mark.parametrize(
    "raw",
    ["Fig. 12", "Figs. 1., 2., and 3.", "Frontispiece", "[Illustration]", "Plate IV.", "Tailpiece", "Illo7", "i_012.jpg", "B", "12",
     "* * *",
     "Title page", "[Click to see full-resolution scan]", "Page 5", "From a photograph by Brady", "List of Illustrations"],
)  # fmt: skip
def test_a_label_alone_counts_as_missing(raw):
    caption = clean_caption(raw)
    assert (caption.text, caption.reason) == ("", "caption is only a label")
    assert decide(caption.verdicts) == ("rejected", "caption is only a label")


def test_nothing_is_no_caption():
    assert clean_caption(" <br/>&nbsp;\n").reason == "no caption"


@pytest.mark.parametrize(
    "raw", ["LIST OF ILLUSTRATIONS The Wolf 12 The Lamb 14 The Fox 19", "The wolf, 12; the lamb, 14; the fox, 15; dogs, 16; cat, 17"]
)
def test_lists_of_plates_and_index_lines_are_ambiguous(raw):
    assert decide(clean_caption(raw).verdicts) == ("ambiguous", "caption is a list")


@pytest.mark.parametrize("raw", ["CHAPTER IV. The Caucus-Race", "IV—THE RABBIT SENDS IN A LITTLE BILL", "Canto 3", "Scene II. A wood"])
def test_titles_of_chapters_are_ambiguous(raw):
    assert decide(clean_caption(raw).verdicts) == ("ambiguous", "caption is a heading")


@pytest.mark.parametrize(
    "raw", ["Of St. Columba", "Façade of Herod's Tombs, from a", "Lords of the", "Discovered in the Palace. Explanation of Cut."]
)
def test_pieces_of_a_sentence_are_ambiguous(raw):
    assert decide(clean_caption(raw).verdicts) == ("ambiguous", "caption is a fragment")


def test_measures_are_no_page_numbers():
    assert clean_caption("Runic stone. Length, 7 feet 2 inches; width, 2 feet 4 inches; depth, 9 inches.").reason == ""


def test_a_long_caption_ends_at_a_sentence_or_is_ambiguous():
    sentence = "The wolf came down to the river to drink, and saw a lamb. "
    cut = clean_caption(sentence * 10, max_characters=200)
    assert cut.text == (sentence * 3).strip() and cut.reason == ""
    endless = clean_caption("and so on " * 60, max_characters=200)
    assert len(endless.text) <= 200 and decide(endless.verdicts) == ("ambiguous", "caption too long")


@pytest.mark.parametrize(
    "text, tag",
    [
        ("The wolf and the lamb", "en"), ("Vue de la ville de Paris", "fr"), ("Das Schloß in der Stadt", "de"),
        ("Motacilla yarrelli", "und"), ("", "und"),
        ("Vista de la ciudad y los montes", "es"), ("Veduta della città di Roma", "it"), ("Arma virumque cano, quae non sunt", "la"),
    ],
)  # fmt: skip
def test_the_language_is_told_by_its_stop_words(text, tag):
    assert language(text) == tag


PIECES = st.sampled_from(
    ["<b>", "</p>", "<img src=", "&lt;i&gt;", "&amp;", "[Illustration: ", "]", "[Pg 3]", "{1}", "(", ")", "Fig. 1.", "PLATE IV.", "— ",
     "--", "''", "_", '"',
     "THE WOLF", "The lamb. ", "From a photograph by A. B. ", "1.", " ", "\n", "\x00", "\ud800", "\u202e", "é", "e\u0301", "…", "page 12",
     "See larger image", "IX",
     "Chapter IV", "of ", ". ", "?", "<!--", "-->", "<p ", "a. lung; ", "Frontispiece", "(see page 3).", "Drawn by A. B", "To face p. 3"]
)  # fmt: skip


@given(st.one_of(st.text(max_size=120), st.lists(PIECES, max_size=14).map("".join)))
@settings(max_examples=400, deadline=None)
def test_any_text_becomes_one_clean_line_and_cleaning_again_changes_nothing(raw):
    text = clean_caption(raw).text
    assert not INLINE_TAG.search(text) and not BLOCK_TAG.search(text)
    assert all(c.isprintable() or ord(c) > 0x2FF for c in text) and "\n" not in text
    assert clean_caption(text).text == text
    text.encode("utf-8")


@pytest.mark.parametrize("piece", ["<", "<!--", "<p ", "[", "[Illustration: ", "(see ", "a, ", "a, b c; ", "X., ", "I", "IV", "1, ", " .",
                                   "''", "--", "_", "12; ", "the ", "page 1 ", "From a ", "&amp;", "drawn by A",
                                   "figs 1, 2 and ", "to face page "])  # fmt: skip
def test_no_text_is_slow(piece):
    start = time.process_time()
    clean_caption(piece * (40_000 // len(piece)))
    reasons(BLANK, piece * (40_000 // len(piece)))
    assert time.process_time() - start < 2


# ---- real books -----------------------------------------------------------------------------------------------------


def judged(path: Path, caption: str = "The wolf and the lamb") -> tuple[str, str]:
    image = Image.open(path)
    return decide(reasons(look(image if image.mode in ("L", "RGB") else image.convert("L")), caption))


# on made pictures: test_each_clear_case_is_rejected_with_its_reason and, for what is ambiguous, the two after it
@needs(BOOKS)
@pytest.mark.parametrize(
    "name, verdict",
    [
        ("17024/images/fp095.jpg", ("kept", "")),
        ("27576/images/i085.jpg", ("kept", "")),
        ("29021/images/image_127.jpg", ("kept", "")),
        ("19033/images/i014.jpg", ("kept", "")),
        ("15889/images/12.png", ("kept", "")),
        ("19033/images/plate03.jpg", ("rejected", "colour plate")),
        ("29021/images/image_044.jpg", ("rejected", "colour plate")),
        ("27576/images/i140.jpg", ("rejected", "music")),
        ("29021/images/image_004.jpg", ("rejected", "text page")),
        ("24685/images/img-134.jpg", ("ambiguous", "photograph")),
        ("27576/images/i139a.jpg", ("ambiguous", "ornament or initial")),
    ],
)
def test_real_pictures_of_whole_books_are_told_apart(name, verdict):
    assert judged(BOOKS / name) == verdict


# on made prints: test_made_prints_are_kept_and_their_captions_stay_as_they_are
@needs(SHARED / "engravings" / "val-00000.tar")
def test_clean_engravings_are_rarely_doubted_and_their_captions_rarely_changed():
    verdicts, changed = [], 0
    with tarfile.open(SHARED / "engravings" / "val-00000.tar") as tar:
        members = {info.name: info for info in tar}
        names = sorted(name for name in members if name.endswith(".webp"))[::4]
        for name in names:
            image = Image.open(io.BytesIO(tar.extractfile(members[name]).read())).convert("L")
            caption = json.load(tar.extractfile(members[name.replace(".webp", ".json")]))["caption"]
            verdicts.append(decide(reasons(look(image), caption))[0])
            changed += clean_caption(caption).reason != ""
    assert verdicts.count("rejected") < 0.03 * len(names)
    assert verdicts.count("ambiguous") < 0.08 * len(names)
    assert changed <= 0.01 * len(names)


# ---- the measurement ------------------------------------------------------------------------------------------------


def test_precision_and_recall_are_counted_from_labels_and_verdicts(capsys):
    labels = [benchmark.Label(name, name in "abc", "engraving", "", "all") for name in "abcde"]
    statuses = {"a": "kept", "b": "kept", "c": "ambiguous", "d": "kept", "e": "rejected"}
    verdicts = {name: benchmark.Verdict(status, "", "") for name, status in statuses.items()}
    assert benchmark.figures(labels, verdicts) == {"pictures": 5, "usable": 3, "kept": 3, "both": 2}
    benchmark.print_wrong(labels, verdicts)
    assert "kept and not usable: 1" in capsys.readouterr().out
    assert benchmark.wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    assert benchmark.wilson(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)


def test_more_than_three_hundred_pictures_are_labelled_each_once():
    labels = benchmark.read_labels(LABELS)
    assert len(labels) > 300 and sum(label.usable for label in labels) > 200
    assert sum(label.path.startswith("raw-books/") for label in labels) == 275


@pytest.mark.parametrize("line", ["a\t1\tengraving", "a\t2\tengraving\t", "a\t1\tengraving\t\na\t0\tmap\t"])
def test_a_broken_line_of_labels_is_refused_with_its_number(tmp_path, line):
    (tmp_path / "labels.tsv").write_text(line + "\n")
    with pytest.raises(ValueError, match=f"line {line.count(chr(10)) + 1}"):
        benchmark.read_labels(tmp_path / "labels.tsv")


@given(st.text(st.sampled_from("aB .,-'\"`<&;>_\t[1é")))
def test_the_short_way_of_plain_text_is_the_long_way(text):
    assert plain_text(text) == settled(plain_once, text)


def test_percentiles_of_a_histogram_are_numpys():
    rng = np.random.default_rng(0)
    for size, width in ((1, 256), (2, 3), (37, 256), (5_000, 20)):
        tones = rng.integers(0, width, size, dtype=np.uint8)
        assert percentiles(tones, (0, 25, 80, 97.5, 100)) == pytest.approx(np.percentile(tones, (0, 25, 80, 97.5, 100)), abs=1e-9)
