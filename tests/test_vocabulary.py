"""Promises of tokun/tokenizers/vocabulary.py."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures import slow_next
from tokun.tokenizers import sequences
from tokun.tokenizers.grammar import STATES, TAG_KINDS
from tokun.tokenizers.sequences import Unpacked
from tokun.tokenizers.text import TextTokenizer, normalize
from tokun.tokenizers.vocabulary import REGISTERS, Tags, Vocabulary, grid_name, tag_word

GRIDS = ((2, 3), (1, 4), (3, 3))
WORDS = ["A fox in the snow.", "Two ships beside a lighthouse", "“Café” at Provins, 1863 — plate XXIX"]
TEXT = TextTokenizer.train(WORDS * 20, vocab_size=300)
V = Vocabulary(
    text_size=TEXT.size, codebook_size=16, styles=("engraving", "wood-engraving"), subjects=("animals", "ships"),
    grids=GRIDS, max_text=40, illegal_text=TEXT.illegal_ids, things=("fox", "moth"),
)  # fmt: skip
COMMON = settings(max_examples=40, deadline=None)

any_text = st.text(st.characters(), max_size=12).filter(lambda t: 0 < len(TEXT.encode(t)) <= V.max_text)
tags_of = st.builds(
    Tags, st.sampled_from(["", *V.styles]), st.sampled_from(["", *V.subjects]), st.sampled_from(["", *REGISTERS]),
    st.sampled_from([None, *GRIDS]), st.sampled_from(["", *V.things]),
)  # fmt: skip


@st.composite
def packed_sequences(draw):
    """A packed sequence of any task, and what `unpack` must say of it."""
    tags, caption, other = draw(tags_of), TEXT.encode(draw(any_text)), TEXT.encode(draw(any_text))
    rows, columns = tags.grid or V.default_grid
    codes = draw(st.lists(st.integers(0, 15), min_size=rows * columns, max_size=rows * columns))
    match draw(st.sampled_from(["joint", "text_to_image", "question", "rewrite"])):
        case "joint":
            return sequences.pack_joint(V, tags, codes, caption), Unpacked("joint", tags, codes, caption)
        case "text_to_image":
            return sequences.pack_text_to_image(V, tags, codes, caption), Unpacked("text_to_image", tags, codes, caption)
        case "question":
            return sequences.pack_question(V, tags, codes, caption, other), Unpacked("question", tags, codes, None, caption, other)
        case "rewrite":
            register = draw(st.sampled_from(REGISTERS))
            packed = sequences.pack_rewrite(V, tags, caption, register, other)
            return packed, Unpacked("rewrite", tags, None, caption, None, None, other, register)


def accepted_by_tensors(ids: list[int], grid: tuple[int, int]) -> bool:
    """The shortcut that sampling masks with, one id at a time."""
    states, lengths = torch.tensor([STATES.index("start")]), torch.tensor([0])
    n_codes = torch.tensor([grid[0] * grid[1]])
    for token in ids:
        if not V.grammar.legal_mask(states, lengths, n_codes)[0, token]:
            return False
        states, lengths = V.grammar.advance(states, lengths, torch.tensor([token]))
    return int(states) == STATES.index("end")


def accepted_by_the_slow_twin(ids: list[int]) -> bool:
    """The rules said once more, apart from the tables."""
    state, spans, tags = "start", {}, {}
    for token in ids:
        following, kind = slow_next(V, state, token, spans, tags), V.class_of(token)
        if following is None:
            return False
        if kind in ("text", "code"):
            spans.setdefault(state, []).append(token)
        if kind == "grid" and state != "prompt_done":
            tags["grid"] = next(grid for grid in V.grids if V.id(grid_name(grid)) == token)
        state = following
    return state == "end"


def accepted_by_unpack(ids: list[int]) -> bool:
    """Its slow twin."""
    try:
        sequences.unpack(V, ids)
    except ValueError:
        return False
    return True


def grid_in(ids: list[int]) -> tuple[int, int]:
    named = [i for i in ids[:6] if V.class_of(i) == "grid"]
    return GRIDS[V.controls.index(V.name(named[0])) - V.controls.index("<grid:2x3>")] if named else V.default_grid


@COMMON
@given(packed_sequences(), st.integers(0, 3))
def test_pack_then_unpack_gives_back_every_part(made, padding):
    packed, parts = made
    assert sequences.unpack(V, packed.input_ids) == parts
    assert sequences.unpack(V, packed.input_ids + [V.id("<pad>")] * padding) == parts


@COMMON
@given(any_text)
def test_any_unicode_caption_survives_the_sequence(text):
    packed = sequences.pack_joint(V, Tags(), [0] * 6, TEXT.encode(text))
    assert TEXT.decode(sequences.unpack(V, packed.input_ids).caption) == normalize(text)


@COMMON
@given(packed_sequences(), st.data())
def test_the_mask_and_unpack_accept_the_same_sequences(made, data):
    """Whole ones, and ones with an id replaced, dropped, doubled or two swapped."""
    ids = list(made[0].input_ids)
    assert accepted_by_tensors(ids, grid_in(ids)) and accepted_by_unpack(ids) and accepted_by_the_slow_twin(ids)
    at = data.draw(st.integers(0, len(ids) - 1))
    match data.draw(st.sampled_from(["replace", "drop", "double", "swap", "cut"])):
        case "replace":  # among the controls as often as among all ids
            ids[at] = data.draw(st.integers(0, V.size - 1) | st.integers(V.text_size, V.code_offset - 1))
        case "drop":
            del ids[at]
        case "double":
            ids.insert(at, ids[at])
        case "swap":
            other = data.draw(st.integers(0, len(ids) - 1))
            ids[at], ids[other] = ids[other], ids[at]
        case "cut":
            del ids[at:]
    assert accepted_by_tensors(ids, grid_in(ids)) == accepted_by_unpack(ids) == accepted_by_the_slow_twin(ids)


@COMMON
@given(packed_sequences(), st.data())
def test_an_id_of_another_class_is_refused_at_every_position(made, data):
    ids = made[0].input_ids
    at = data.draw(st.integers(0, len(ids) - 1))
    kind = V.class_of(ids[at])
    wrong = data.draw(st.sampled_from([i for i in (5, V.code_offset, V.id("<pad>"), V.id("<bos>")) if V.class_of(i) != kind]))
    broken = [*ids[:at], wrong, *ids[at + 1 :]]
    assert not accepted_by_unpack(broken) and not accepted_by_tensors(broken, grid_in(ids))


def test_of_another_models_tags_those_are_kept_that_are_known_here():
    assert V.known(Tags("etching", "ships", "none of these", (9, 9), "moth")) == Tags("", "ships", V.default_register, (9, 9), "moth")
    assert V.known(tags := Tags("engraving", "", "plain", None, "")) == tags


def test_tags_stand_once_and_in_one_order():
    codes, names = [0] * 6, ["<style:engraving>", "<subject:ships>", "<thing:moth>", "<register:plain>", "<grid:2x3>"]
    body = sequences.pack_joint(V, Tags(), codes, [5]).input_ids[1:]
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            ids = [V.id("<bos>"), V.id(a), V.id(b), *body]
            assert accepted_by_unpack(ids) == accepted_by_tensors(ids, (2, 3)) == (i < j)


def test_ids_are_text_controls_and_codes_without_gap_or_overlap():
    kinds = [V.class_of(i) for i in range(V.size)]
    assert kinds[: V.text_size] == ["text"] * V.text_size
    assert kinds[V.code_offset :] == ["code"] * 16 and V.code_offset == V.text_size + len(V.controls)
    assert [V.id(c) for c in V.controls] == list(range(V.text_size, V.code_offset))
    assert [V.name(V.id(c)) for c in V.controls] == list(V.controls)
    assert not {"text", "code"} & set(kinds[V.text_size : V.code_offset])
    assert len(V.added_tokens) == V.size - V.text_size and len(set(V.added_tokens)) == len(V.added_tokens)
    assert torch.equal(V.is_image, torch.tensor([k == "code" for k in kinds]))
    counts = Counter(kinds)
    assert [counts[k] for k in TAG_KINDS] == [2, 2, 2, 5, 3]
    for outside in (-1, V.size):
        with pytest.raises(ValueError, match="outside this vocabulary"):
            V.class_of(outside)


def test_a_picture_has_exactly_n_codes_and_a_text_holds_none():
    n = torch.tensor([6])
    for state in ("image", "drawn"):
        row = torch.tensor([STATES.index(state)])
        for length in range(6):
            assert torch.equal(V.grammar.legal_mask(row, torch.tensor([length]), n)[0], V.is_image)
        assert V.grammar.legal_mask(row, n, n)[0].nonzero().flatten().tolist() == [V.id("<eoi>")]
    for state, end in {"caption": "<eoc>", "prompt": "<eoc>", "asked": "<eoq>", "answer": "<eoa>"}.items():
        row = torch.tensor([STATES.index(state)])
        pieces = set(range(V.text_size)) - set(V.illegal_text)
        for length, legal in [(0, pieces), (1, pieces | {V.id(end)}), (V.max_text, {V.id(end)})]:
            assert set(V.grammar.legal_mask(row, torch.tensor([length]), n)[0].nonzero().flatten().tolist()) == legal


def test_no_state_is_a_dead_end():
    n = torch.tensor([6])
    for state in range(len(STATES)):
        for length in (0, 1, 6, V.max_text):
            assert V.grammar.legal_mask(torch.tensor([state]), torch.tensor([length]), n).any()


def test_prompts_carry_no_loss_and_everything_else_does():
    codes, text = [1] * 6, [5, 6]
    joint, scored = sequences.pack_joint(V, Tags(), codes, text), sequences.caption_scored(V, Tags(), codes, text)
    assert joint.prompt == 1 and joint.input_ids[scored.prompt - 1] == V.id("<boc>")
    question = sequences.pack_question(V, Tags("engraving"), codes, text, [7])
    assert question.input_ids[question.prompt - 1 :] == [V.id("<boa>"), 7, V.id("<eoa>"), V.id("<eos>")]


@pytest.mark.parametrize("codes", [[], [0] * 5, [0] * 7, [0] * 5 + [16], [0] * 5 + [-1]])
def test_codes_that_do_not_fit_are_refused(codes):
    with pytest.raises(ValueError, match="codes"):
        sequences.pack_joint(V, Tags(), codes, [5])


@pytest.mark.parametrize("text", [[], [5] * 41, [0], [-1], [V.text_size], [V.code_offset]])
def test_text_that_does_not_fit_is_refused(text):
    with pytest.raises(ValueError, match="text span"):
        sequences.pack_joint(V, Tags(), [0] * 6, text)


def test_an_unknown_tag_lists_its_kin():
    with pytest.raises(ValueError, match="<style:cubism> is not in this vocabulary; style can be: engraving, wood-engraving"):
        sequences.prefix(V, Tags(style="cubism"))
    with pytest.raises(ValueError, match="grid can be: 2x3, 1x4, 3x3"):
        sequences.prefix(V, Tags(grid=(9, 9)))


def test_of_hundreds_of_kin_the_nearest_are_listed_and_their_number():
    things = tuple(f"thing-{i:03d}" for i in range(397)) + ("moth", "mouth", "month")
    many = Vocabulary(text_size=300, codebook_size=16, things=things)
    with pytest.raises(ValueError, match=r"^<thing:moths> is not in this vocabulary; thing can be: moth, \w+, \w+ … \(400 in all\)$"):
        many.id("<thing:moths>")
    with pytest.raises(ValueError, match=r"thing-000, .* … \(400 in all, none spelt like it\)$") as error:
        many.id("<thing:zyzzyva>")
    assert len(str(error.value)) < 200
    with pytest.raises(ValueError, match="thing can be: nothing here"):
        Vocabulary(text_size=300, codebook_size=16).id("<thing:moth>")


OLD = {
    "text_size": 300,
    "codebook_size": 16,
    "styles": ["etching"],
    "subjects": ["ships"],
    "registers": ["plain", "era"],
    "grids": [[2, 3]],
    "max_text": 40,
    "illegal_text": [0],
}


def test_a_file_from_before_there_were_things_gives_the_ids_and_sequences_it_gave(tmp_path):
    (tmp_path / "vocabulary.json").write_text(json.dumps(OLD))
    v = Vocabulary.load(tmp_path / "vocabulary.json")
    names = ["<style:etching>", "<subject:ships>", "<register:plain>", "<register:era>", "<grid:2x3>"]
    assert [v.id(name) for name in names] == list(range(311, 316)) and v.code_offset == 316 and v.to_dict() == OLD
    packed = sequences.pack_joint(v, Tags("etching", "ships", "era", (2, 3)), [0, 1, 2, 3, 4, 5], [7, 8])
    assert packed.input_ids == [301, 311, 312, 314, 315, 303, *range(316, 322), 304, 305, 7, 8, 306, 302]
    assert v.bare() == Tags() and v.max_codes == 6


def test_where_there_are_several_grids_the_front_of_a_sequence_says_how_many_codes_follow():
    assert V.max_codes == 9 and V.bare() == Tags(grid=(2, 3)) and V.bare((1, 4)) == Tags(grid=(1, 4))
    for grid, n in {None: 6, (2, 3): 6, (1, 4): 4, (3, 3): 9}.items():
        for tags in (Tags(grid=grid), Tags("engraving", "ships", "era", grid, "moth")):
            assert (
                V.n_codes(sequences.prefix(V, tags))
                == V.n_codes([*sequences.prefix(V, tags), V.id("<boi>"), *range(V.code_offset, V.size)])
                == n
            )


@pytest.mark.parametrize("change", [{"styles": ("wood engraving",)}, {"styles": ("a>b",)}, {"styles": ("a", "a")}, {"grids": ()}])
def test_names_that_cannot_be_control_tokens_are_refused(change):
    with pytest.raises(ValueError, match=r"control token|needs at least one grid"):
        Vocabulary(**{"text_size": 300, "codebook_size": 16, **change})


def test_any_metadata_makes_a_tag_word_that_the_vocabulary_takes():
    for raw in ["Wood engraving (after a drawing)", "  ETCHING ", "<b>x</b>", "木口木版", "a\tb\nc", "a>b"]:
        Vocabulary(text_size=300, codebook_size=16, styles=(tag_word(raw),))
    assert tag_word("Wood engraving (after a drawing)") == "wood-engraving-after-a-drawing"


def test_saved_then_loaded_is_equal(tmp_path):
    V.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    assert loaded == V == Vocabulary.from_dict(json.loads(json.dumps(V.to_dict())))
    assert loaded.added_tokens == V.added_tokens and hash(loaded) == hash(V)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"text_size": 3, "wrong": 1, "grids": []}', '{"grids": 3}'])
def test_a_broken_file_is_named(tmp_path, text):
    (tmp_path / "vocabulary.json").write_text(text)
    with pytest.raises(ValueError, match=r"vocabulary\.json is not a vocabulary"):
        Vocabulary.load(tmp_path / "vocabulary.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vocabulary\.json is missing"):
        Vocabulary.load(tmp_path / "vocabulary.json")


def test_tags_that_come_later_stand_behind_the_codes_and_no_other_id_moves(tmp_path):
    more = V.extended(styles=["lithograph", V.styles[0]], registers=["studio"], things=["kite"])
    assert more.appended == ("<style:lithograph>", "<thing:kite>", "<register:studio>") and more.size == V.size + 3
    assert [more.id(name) for name in more.appended] == [V.size, V.size + 1, V.size + 2] and [
        more.name(V.size + i) for i in range(3)
    ] == list(more.appended)
    assert more.added_tokens[: len(V.added_tokens)] == V.added_tokens and more.code_offset == V.code_offset and more.code_end == V.size
    assert [more.class_of(V.size + i) for i in range(3)] == ["style", "thing", "register"] and not more.is_image[V.size :].any()
    assert V.extended(styles=V.styles) == V and more.extended(subjects=["x"]).id("<subject:x>") == more.size
    tags = Tags("lithograph", "", "studio", (2, 3), "kite")
    packed = sequences.pack_joint(more, tags, [0, 1, 2, 3, 4, 5], [7, 8])
    assert sequences.unpack(more, packed.input_ids) == replace(
        sequences.unpack(V, sequences.pack_joint(V, Tags(grid=(2, 3)), [0, 1, 2, 3, 4, 5], [7, 8]).input_ids), tags=tags
    )
    allowed = more.grammar.allowed
    assert (
        allowed[3 * STATES.index("tags"), V.size] and allowed[3 * STATES.index("image")].nonzero()[:, 0].tolist()[-1] == more.code_end - 1
    )
    more.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json") == more and "appended" not in V.to_dict()
    with pytest.raises(ValueError, match="appended names"):
        replace(V, appended=("<style:nowhere>",))
