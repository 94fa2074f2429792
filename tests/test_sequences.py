"""Promises of tokun/tokenizers/sequences.py and grammar.py: every sequence is laid out in one place, and the grammar is stated once."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fixtures import slow_next
from tokun.inference.latents import Slots
from tokun.tokenizers import sequences
from tokun.tokenizers.grammar import EMPTY, END, FULL, PART, STATES, Grammar
from tokun.tokenizers.vocabulary import Tags, Vocabulary

ROOT = Path(__file__).parents[1]
V = Vocabulary(
    text_size=20, codebook_size=8, styles=("etching",), subjects=("sea", "sky"), grids=((2, 2), (1, 3)), max_text=6, illegal_text=(0, 3),
    things=("fox",)
)  # fmt: skip
TAGS, CODES, WORDS, OTHER = Tags("etching", "sky", "plain", (1, 3), "fox"), [7, 0, 3], [4, 9, 5], [6, 6]


def starts(ids, prompt):
    return ids[: len(prompt)] == prompt and len(prompt) < len(ids)


@pytest.mark.parametrize("tags", [TAGS, Tags(grid=(1, 3))])
def test_a_prompt_is_the_front_of_the_sequence_that_is_trained_on(tags):
    joint = sequences.pack_joint(V, tags, CODES, WORDS).input_ids
    assert starts(joint, sequences.image_prompt(V, tags)) and starts(joint, sequences.caption_prompt(V, tags, CODES))
    drawn = sequences.pack_text_to_image(V, tags, CODES, WORDS).input_ids
    assert starts(drawn, sequences.image_prompt(V, tags, WORDS)) and starts(drawn, sequences.caption_prompt(V, tags, None))
    assert starts(sequences.pack_rewrite(V, tags, WORDS, "era", OTHER).input_ids, sequences.rewrite_prompt(V, tags, WORDS, "era"))
    asked = sequences.pack_question(V, tags, CODES, WORDS, OTHER)
    assert asked.input_ids[: asked.prompt] == sequences.question_prompt(V, tags, CODES, WORDS)
    told = sequences.caption_scored(V, tags, CODES, WORDS)
    assert told.input_ids[: told.prompt] == sequences.caption_prompt(V, tags, CODES) and starts(joint, told.input_ids)


def test_what_guidance_leads_away_from_has_no_tags_but_the_grid():
    bos, boi = V.id("<bos>"), V.id("<boi>")
    assert sequences.unconditional_image_prompt(V, (1, 3)) == [bos, V.id("<grid:1x3>"), boi]
    one = Vocabulary(text_size=5, codebook_size=4, styles=("etching",))
    assert sequences.unconditional_image_prompt(one, (8, 8)) == [one.id("<bos>"), one.id("<boi>")]


def test_what_is_scored_ends_with_its_span():
    joint = sequences.pack_joint(V, TAGS, CODES, WORDS).input_ids
    image, given, alone = (
        sequences.image_scored(V, TAGS, CODES), sequences.caption_scored(V, TAGS, CODES, WORDS),
        sequences.caption_scored(V, TAGS, None, WORDS),
    )  # fmt: skip
    assert starts(joint, image.input_ids) and starts(joint, given.input_ids)
    assert image.input_ids[image.prompt :] == [*sequences.code_ids(V, CODES, TAGS), V.id("<eoi>")]
    assert given.input_ids[given.prompt :] == alone.input_ids[alone.prompt :] == [*WORDS, V.id("<eoc>")]
    assert alone.input_ids[: alone.prompt] == [*sequences.prefix(V, TAGS), V.id("<boc>")]
    assert sequences.padded(V, [[1, 2], [1]]) == [[1, 2], [1, V.id("<pad>")]]


@pytest.mark.parametrize("wrong", [[], [1] * 7, [0], [20]])
def test_no_prompt_takes_a_text_that_no_span_holds(wrong):
    for lay in (
        lambda: sequences.image_prompt(V, TAGS, wrong), lambda: sequences.question_prompt(V, TAGS, CODES, wrong),
        lambda: sequences.rewrite_prompt(V, TAGS, wrong, "era"), lambda: sequences.caption_scored(V, TAGS, None, wrong),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="a text span"):
            lay()


def test_a_new_generator_has_room_for_every_sequence_and_as_much_as_before():
    """The number of positions stands in the checkpoints: another would be another model."""
    longest = [1] * V.max_text
    packed = [
        sequences.pack_joint(V, Tags("etching", "sky", "plain", (2, 2), "fox"), [0] * 4, longest),
        sequences.pack_text_to_image(V, TAGS, CODES, longest),
        sequences.pack_question(V, TAGS, CODES, longest, longest), sequences.pack_rewrite(V, TAGS, longest, "era", longest),
    ]  # fmt: skip
    assert max(len(one.input_ids) for one in packed) <= sequences.most_positions(V)
    assert sequences.most_positions(V) == Slots(V.max_codes, V.max_text).size + V.max_text + 16
    for one in packed:
        tags = 6 if one is not packed[-1] and one is not packed[-2] else len(sequences.prefix(V, TAGS))
        for prompt in {tags, max(one.prompt, tags)}:
            assert len(one.input_ids) <= sequences.longest_from(V, prompt, 4)
    assert sequences.joint_length(V, V.max_text) == len(packed[0].input_ids)


def test_a_row_of_the_tables_is_what_the_grammar_says_for_a_span_so_full():
    for state, name in enumerate(STATES):
        limit = {"image": 4, "drawn": 4}.get(name, V.max_text)
        for case, length in ((EMPTY, 0), (PART, limit - 1), (FULL, limit)):
            row = V.grammar.allowed[3 * state + case]
            span = [V.code_offset if name in ("image", "drawn") else 1] * length
            said = [slow_next(V, name, token, {name: span}, {}) for token in range(V.size)]
            assert row.tolist() == [one is not None for one in said]
            assert int(V.grammar.case(*(torch.tensor(x) for x in (state, length, limit)))) == 3 * state + case
            for token, target in enumerate(said):
                following, further = V.grammar.step(state, length, token, 4)
                assert (following, further) == ((-1, 0) if target is None else (STATES.index(target), length + 1 if target == name else 0))


def test_a_sampler_chooses_no_forbidden_id_and_begins_no_text_with_some():
    forbid, first = (V.id("<boq>"), 7), (4, 5)
    allowed, ruled = V.grammar.chosen_from(forbid, first, V.code_offset)
    assert torch.equal(allowed, V.grammar.allowed[:, : V.code_offset]) and not ruled[:, list(forbid)].any()
    for state, name in enumerate(STATES):
        for case in (EMPTY, PART, FULL):
            row, gone = 3 * state + case, {*forbid, *(first if name in ("caption", "prompt", "asked", "answer") and case == EMPTY else ())}
            assert {i for i in range(V.code_offset) if allowed[row, i] and not ruled[row, i]} == {
                i for i in gone if i < V.code_offset and allowed[row, i]
            }
    assert V.grammar.chosen_from(forbid, first, V.code_offset)[1] is ruled


def test_a_grammar_is_made_once_for_a_device_and_knows_where_a_picture_may_come():
    assert V.grammar.on("cpu") is V.grammar and isinstance(V.grammar.on("meta"), Grammar) and V.grammar.on("meta") is V.grammar.on("meta")
    assert V.grammar.in_image.nonzero().flatten().tolist() == [STATES.index("image"), STATES.index("drawn")]
    never = {"image_done", "caption", "caption_done", "asked", "asked_done", "answer", "answer_done", "drawn_done", "rewrite", "end"}
    assert {name for name, may in zip(STATES, V.grammar.may_draw.tolist()) if not may} == never and STATES[END] == "end"


def test_a_latents_slots_give_and_decide_ids():
    slots = Slots(4, 6)
    given = slots.given(2, codes=torch.tensor([[30, 31], [32, 33]]), text=torch.tensor([5]))
    assert given.shape == (2, slots.size) and given[:, slots.image : slots.image + 2].tolist() == [[30, 31], [32, 33]]
    assert given[:, slots.text].tolist() == [5, 5] and int((given >= 0).sum()) == 6
    deciding = slots.deciding(torch.tensor([True, False, False]), torch.tensor([1, 2, 99]))
    assert deciding.tolist() == [slots.image + 1, slots.text + 2, slots.size - 1]


LAID_OUT_ELSEWHERE = {
    "tokun/inference/sampling.py": {"<boi>", "<eoi>"},  # where a picture begins, and the end that a full one has
    "tokun/serving/grammar.py": {"<eos>"},  # a request that is no sequence ends
    "tokun/training/preferences.py": {"<boi>", "<boc>"},  # which of the two comes first in a packed sequence
    "tokun/training/": {"<bos>", "<eos>"},  # what a generator's config names
}


def test_no_other_module_puts_ids_together():
    """Structure tokens are named in tokenizers/ alone, <pad> aside; exceptions with their reason above."""
    found = {}
    for path in sorted((ROOT / "tokun").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith("tokun/tokenizers/"):
            continue
        tokens = {
            node.args[0].value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
            and getattr(node.func, "attr", "") == "id"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        }
        excepted = {token for place, some in LAID_OUT_ELSEWHERE.items() if name.startswith(place) for token in some}
        found[name] = tokens - excepted - {"<pad>"}
    assert not {name: tokens for name, tokens in found.items() if tokens}


def test_codes_in_the_bytes_of_shards_are_taken_as_they_are():
    assert sequences.code_ids(V, np.array(CODES, np.uint16), TAGS) == [V.code_offset + code for code in CODES]


def test_a_pair_knows_where_its_written_caption_is_and_codes_become_ids_and_back():
    joint, prompted = (pack(V, TAGS, CODES, [5, 6]).input_ids for pack in (sequences.pack_joint, sequences.pack_text_to_image))
    caption = sequences.written_caption(V, joint)
    assert caption is not None and joint[caption] == [5, 6, V.id("<eoc>")] and sequences.written_caption(V, prompted) is None
    ids = V.ids_of_codes(torch.tensor(CODES))
    assert V.codes_of_ids(ids).tolist() == list(CODES) and [i for i in joint if V.is_code(i)] == ids.tolist()
    assert V.is_code(torch.arange(V.size)).nonzero()[:, 0].tolist() == list(range(V.size))[V.code_range]
    shown, again = sequences.unconditional_images(V, TAGS.grid, torch.tensor([CODES])), V.bare(TAGS.grid)
    assert shown.tolist() == [sequences.image_scored(V, again, CODES).input_ids[:-2]]
    given = sequences.pack_rewrite(V, again, [5], V.registers[0], [6, 7], given=True)
    assert given.input_ids[given.prompt :] == [6, 7, V.id("<eoc>"), V.id("<eos>")]
