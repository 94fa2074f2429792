"""Promises of tokun/inference/tags.py: tags are drawn as often as they stand together in training, or are what is asked for."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokun.inference.tags import Frequencies, count_tags, grid_of, read_counts, settings_json
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import Tags, Vocabulary

V = Vocabulary(
    text_size=300, codebook_size=16, styles=("engraving", "etching"), subjects=("animals", "ships"), things=("brig", "fox", "moth"),
    grids=((4, 4), (3, 5), (5, 3), (2, 8)),
)  # fmt: skip
ROWS = [
    ("engraving", "animals", "moth", "3x5", 30), ("engraving", "animals", "moth", "4x4", 10), ("engraving", "animals", "fox", "4x4", 2),
    ("engraving", "animals", "okapi", "5x3", 18), ("etching", "ships", "brig", "3x5", 30), ("etching", "ships", "", "5x3", 10),
]  # fmt: skip
BOTH = Frequencies(ROWS, V)
ANY = Tags()
EVEN = [(i + 0.5) / 50 for i in range(50)]


def drawn(wanted=ANY, **options):
    """Everything that latents spread evenly over the three slots draw."""
    return [BOTH.draw((a, b, c, 0.5), wanted, **options) for a in EVEN[::5] for b in EVEN for c in EVEN]


def share(tags, **kept):
    return sum(all(getattr(t, k) == v for k, v in kept.items()) for t in tags) / len(tags)


def test_tags_stand_together_as_often_as_in_training():
    tags = drawn()
    assert share(tags, style="engraving", subject="animals") == pytest.approx(0.6) and share(
        tags, style="etching", subject="ships"
    ) == pytest.approx(0.4)
    moths = [t for t in tags if t.thing == "moth"]
    assert len(moths) / len(tags) == pytest.approx(0.4, abs=0.02) and share(moths, grid=(3, 5)) == pytest.approx(0.75, abs=0.02)
    assert share(tags, thing="") == pytest.approx(0.18 + 0.1, abs=0.02), "what has no tag of its own is drawn without one"
    assert all(t.register == "plain" for t in tags) and Counter(t.grid for t in tags).keys() == {(4, 4), (3, 5), (5, 3)}


def test_each_slot_decides_its_own_tags():
    whole = BOTH.draw((0.1, 0.1, 0.1, 0.1), Tags())
    assert BOTH.draw((0.1, 0.1, 0.1, 0.9), Tags()) == whole
    other = BOTH.draw((0.1, 0.1, 0.95, 0.1), Tags())
    assert (other.style, other.subject, other.thing) == (whole.style, whole.subject, whole.thing) and other.grid != whole.grid
    other = BOTH.draw((0.1, 0.95, 0.1, 0.1), Tags())
    assert (other.style, other.subject) == (whole.style, whole.subject) and other.thing != whole.thing


def test_a_rare_things_shapes_are_those_of_its_subject():
    foxes = drawn(Tags(thing="fox"))
    assert share(foxes, subject="animals") == 1 and share(foxes, grid=(3, 5)) == pytest.approx(0.5, abs=0.02)


def test_what_is_asked_for_is_kept_and_the_rest_fits_it():
    assert {(t.style, t.subject) for t in drawn(Tags(thing="brig"))} == {("etching", "ships")}
    assert {t.grid for t in drawn(Tags(grid=(2, 8)))} == {(2, 8)}, "even where nothing in training has that shape"
    tall = drawn(Tags(grid=(5, 3)))
    assert {t.grid for t in tall} == {(5, 3)} and {(t.style, t.thing) for t in tall} == {("engraving", ""), ("etching", "")}
    odd = drawn(Tags("etching", "", "era", None, "moth"))
    assert {(t.style, t.subject, t.thing, t.register) for t in odd} == {("etching", "animals", "moth", "era")}, (
        "what never stood together may be asked for"
    )


def test_beside_a_prompt_what_fits_it_is_drawn_and_shapes_are_those_of_the_thing():
    given_fox = BOTH.given({("animals", "fox"): 1.0, ("animals", "moth"): 0.05})
    tags = [given_fox.draw((a, b, c, 0.5), ANY) for a in EVEN[::5] for b in EVEN for c in EVEN[::5]]
    assert {t.subject for t in tags} == {"animals"} and {t.thing for t in tags} == {"fox", "moth"}
    assert share(tags, thing="fox") == pytest.approx(2 / (2 + 40 * 0.05), abs=0.02), "likelihood times count"
    assert {t.grid for t in tags if t.thing == "moth"} == {(3, 5), (4, 4)}
    given_moth = BOTH.given({("animals", "moth"): 1.0})
    ships = [given_moth.draw((a, b, 0.5, 0.5), Tags(subject="ships")) for a in EVEN for b in EVEN]
    assert {t.thing for t in ships} == {"brig", ""}, "what is asked for wins over what fits"
    assert BOTH.subjects_and_things(Tags(thing="moth")) == {("animals", "moth"): 40}
    assert BOTH.likelihoods is None, "the counts themselves are unchanged"


def test_rows_of_before_there_were_things_draw_what_they_drew():
    old = Frequencies([("engraving", "animals", 3), ("etching", "ships", 2), ("etching", "comets", 1)], V)
    tags = [old.draw(((i + 0.5) / 600, 0.9, 0.9, 0.9), Tags()) for i in range(600)]
    assert Counter((t.style, t.subject, t.thing, t.grid) for t in tags) == {
        ("engraving", "animals", "", (4, 4)): 300, ("etching", "ships", "", (4, 4)): 200, ("etching", "", "", (4, 4)): 100,
    }  # fmt: skip
    assert Frequencies([], V).draw((0.5,) * 4, Tags()) == Tags("", "", "plain", (4, 4))


@given(st.tuples(*[st.floats(0, 1, exclude_max=True)] * 4), st.sampled_from(["", "moth", "fox"]), st.sampled_from([None, *V.grids]))
def test_any_latent_draws_tags_that_the_vocabulary_knows(u, thing, grid):
    assert sequences.prefix(V, BOTH.draw(u, Tags(thing=thing, grid=grid)))


def test_where_plain_was_not_trained_another_register_is_spoken():
    quiet = Vocabulary(text_size=300, codebook_size=16, registers=("era", "poetic"))
    assert (
        Frequencies([], quiet).draw((0.5,) * 4, Tags()).register == "era"
        and Vocabulary(text_size=300, codebook_size=16, registers=()).default_register == ""
    )


def test_samples_are_counted_and_rows_of_both_kinds_are_read():
    assert count_tags([("a", "x"), ("b", ""), ("a", "x"), ("a", "")]) == [("a", "x", 2), ("a", "", 1), ("b", "", 1)]
    assert count_tags([("a", "x", "fox", "3x5")] * 2) == [("a", "x", "fox", "3x5", 2)]
    assert read_counts([["a", "x", 2], ["a", "x", "fox", "3x5", 2], ["a", "", "", "", 1]]) == [
        ("a", "x", 2),
        ("a", "x", "fox", "3x5", 2),
        ("a", "", "", "", 1),
    ]
    for bad in (["a", 2], ["a", "x", "fox", 2], ["a", "x", "fox", "wide", 2], ["a", 1, 2], ["a", "x", "many"], 3):
        with pytest.raises((ValueError, TypeError)):
            read_counts([bad])


@pytest.mark.parametrize("rows", [[], [("etching", "ship", 2)], [("etching", "ship", "boat", "2x3", 2), ("", "", "", "3x2", 1)]])
def test_a_row_of_counts_is_a_line_of_the_file_and_the_rest_is_as_it_was(rows):
    """Thousands of rows, a word a line, were half of what an adapter weighs."""
    text = settings_json({"a": [1, 2], "tag_counts": rows, "b": {"tag_counts": []}})
    assert json.loads(text) == {"a": [1, 2], "tag_counts": [list(row) for row in rows], "b": {"tag_counts": []}}
    assert all(f"  {json.dumps(row)}" in text for row in rows) and text.endswith("}\n")


@pytest.mark.parametrize(
    ("aspect", "grid"),
    [("", None), ("2x8", (2, 8)), (" 4X4", (4, 4)), ("6:5", (4, 4)), ("4:3", (3, 5)), ("3:4", (5, 3)), ("0.6:1", (5, 3)), ("20:1", (2, 8)),
     ("wide", (3, 5)), ("tall", (5, 3)), ("Square", (4, 4))],
)  # fmt: skip
def test_a_shape_is_the_nearest_grid(aspect, grid):
    assert grid_of(aspect, V) == grid


@pytest.mark.parametrize("aspect", ["9x9", "0x4", "big", "4:0", "0:4", "4:", ":", "-4:3", "nan:1", "4/3", "٤:٣", "1e3:1", None, 1.5, True])
def test_what_is_no_shape_is_refused_with_what_there_is(aspect):
    with pytest.raises(ValueError, match=r"aspect is .*(4x4, 3x5, 5x3, 2x8|give a str)"):
        grid_of(aspect, V)


def test_wide_is_never_square_where_anything_is_wide():
    few = Vocabulary(text_size=300, codebook_size=16, grids=((4, 4), (2, 8)))
    assert grid_of("wide", few) == (2, 8) and grid_of("4:3", few) == grid_of("tall", few) == (4, 4)
