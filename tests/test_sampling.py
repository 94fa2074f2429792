"""Promises of tokun/inference/sampling.py, each shortcut beside its slow twin. The model is the tiny random one of fixtures.py."""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokun.inference import latents
from tokun.inference.sampling import Rules, generate, span_nll
from tokun.inference.token_choice import Choice, Constraints, DecodingSettings, choose, narrow
from tokun.tokenizers import sequences
from tokun.tokenizers.grammar import STATES
from tokun.tokenizers.vocabulary import Tags, parse_grid

COMMON = settings(max_examples=60, deadline=None)
JUST_BELOW_ONE = 1 - 2**-24  # the greatest float32 below 1


# --- one choice -----------------------------------------------------------------------------------------------------


def slow_distribution(logits, legal, choice):
    """Probabilities of all ids in plain Python floats: temperature, then the k likeliest, then the nucleus."""
    ids = [i for i, ok in enumerate(legal) if ok]
    top = max(logits[i] for i in ids)
    weights = {i: math.exp((logits[i] - top) / choice.temperature) for i in ids}
    if choice.top_k:
        kth = sorted((logits[i] for i in ids), reverse=True)[: choice.top_k][-1]
        weights = {i: w for i, w in weights.items() if logits[i] >= kth}
    if choice.top_p < 1:
        total, mass, kept = sum(weights.values()), 0.0, {}
        for i in sorted(weights, key=lambda i: -logits[i]):
            if mass / total >= choice.top_p:
                break
            kept[i] = weights[i]
            mass += weights[i]
        weights = kept
    total = sum(weights.values())
    return [weights.get(i, 0.0) / total for i in range(len(logits))]


@st.composite
def cases(draw):
    size = draw(st.integers(1, 30))
    logits = draw(st.lists(st.integers(-60, 60), min_size=size, max_size=size, unique=True))
    legal = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
    choice = Choice(draw(st.sampled_from([0.3, 0.7, 1.0, 2.0])), draw(st.integers(0, 6)), draw(st.sampled_from([1.0, 0.9, 0.5, 0.01])))
    return [value / 10 for value in logits], legal, choice


@COMMON
@given(cases(), st.lists(st.floats(0, JUST_BELOW_ONE, width=32), min_size=1, max_size=8))
def test_choose_is_the_inverse_cdf_in_id_order(case, us):
    logits, legal, choice = case
    probabilities = slow_distribution(logits, legal, choice)
    rows = len(us)
    chosen = choose(torch.tensor([logits] * rows), torch.tensor([legal] * rows), torch.tensor(us), choice).tolist()
    for u, got in zip(us, chosen):
        assert legal[got]
        below = sum(probabilities[:got])
        # where u falls within rounding of a border, either neighbour is right
        assert below - 1e-5 <= u < below + probabilities[got] + 1e-5
        if probabilities[got] == 0:  # a nucleus whose border lies within rounding
            assert choice.top_p < 1


@COMMON
@given(cases())
def test_the_ends_of_u_are_the_first_and_the_last_possible_id(case):
    logits, legal, _ = case
    possible = [i for i, ok in enumerate(legal) if ok]
    ends = torch.tensor([0.0, JUST_BELOW_ONE])
    low, high = choose(torch.tensor([logits] * 2), torch.tensor([legal] * 2), ends, Choice()).tolist()
    assert low == possible[0]
    assert legal[high] and sum(slow_distribution(logits, legal, Choice())[high:]) > 0


def test_illegal_ids_are_never_chosen_however_likely():
    logits = torch.full((1000, 9), -30.0)
    logits[:, [0, 4, 8]] = 60.0
    legal = torch.zeros(1000, 9, dtype=torch.bool)
    legal[:, [2, 3, 6]] = True
    u = torch.cat([torch.rand(998), torch.tensor([0.0, JUST_BELOW_ONE])])
    for choice in (Choice(), Choice(0), Choice(1e-40), Choice(1e6), Choice(1, 1), Choice(1, 0, 1e-6), Choice(5, 2, 0.5)):
        assert set(choose(logits, legal, u, choice).tolist()) <= {2, 3, 6}


@COMMON
@given(cases(), st.floats(0, JUST_BELOW_ONE, width=32))
def test_temperature_zero_is_the_likeliest_and_a_small_one_its_limit(case, u):
    logits, legal, _ = case
    best = max((i for i, ok in enumerate(legal) if ok), key=lambda i: logits[i])
    for temperature in (0, 1e-6, 1e-40):
        assert choose(torch.tensor([logits]), torch.tensor([legal]), torch.tensor([u]), Choice(temperature)).item() == best


@COMMON
@given(cases())
def test_top_k_and_top_p_keep_what_brute_force_keeps(case):
    logits, legal, choice = case
    choice = Choice(1.0, choice.top_k, choice.top_p)
    masked = torch.tensor([logits]).masked_fill(~torch.tensor([legal]), -torch.inf)
    kept = narrow(masked, choice)[0].isfinite().tolist()
    expected = [p > 0 for p in slow_distribution(logits, legal, choice)]
    if kept != expected:  # only where the nucleus' border lies within rounding: one id more or less
        (odd,) = (i for i, (a, b) in enumerate(zip(kept, expected)) if a != b)
        before = sum(p for p, value in zip(slow_distribution(logits, legal, Choice(1.0, choice.top_k)), logits) if value > logits[odd])
        assert choice.top_p < 1 and before == pytest.approx(choice.top_p, abs=1e-5)
    assert any(kept)


def test_frequencies_follow_the_distribution():
    logits, legal = torch.tensor([[0.0, 1.0, 9.0, 2.0, -1.0]]), torch.tensor([[True, True, False, True, True]])
    u = (torch.arange(20000) + 0.5) / 20000
    counts = choose(logits.expand(20000, -1), legal.expand(20000, -1), u, Choice(0.8)).bincount(minlength=5)
    expected = torch.tensor(slow_distribution(logits[0].tolist(), legal[0].tolist(), Choice(0.8)))
    torch.testing.assert_close(counts / 20000, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("bad", [(-1.0,), (math.nan,), (math.inf,), (1.0, -1), (1.0, 0, 0.0), (1.0, 0, 1.1), (1.0, 0, math.nan)])
def test_settings_outside_their_range_are_refused(bad):
    with pytest.raises(ValueError, match=r"temperature is|top_k is|top_p is"):
        Choice(*bad)


# --- whole sequences ------------------------------------------------------------------------------------------------


def prompt_ids(v):
    return [*sequences.prefix(v, Tags("engraving", "", "plain", (4, 4))), v.id("<boi>")]


def uniforms(model, rows, seed=0):
    return latents.uniform(latents.draw(seed, rows, model.slots.size))


def run(model, prompts, u, **options):
    """`generate`; the options may also be those of `DecodingSettings` and `Constraints`."""
    options = {"forbid": (model.vocabulary.id("<boq>"),), **options}
    settings, constraints = (
        kind(**{field.name: options.pop(field.name) for field in fields(kind) if field.name in options})
        for kind in (DecodingSettings, Constraints)
    )
    return generate(model.generator, Rules(model.vocabulary, model.slots, settings, constraints), torch.tensor(prompts), u, **options)


@torch.no_grad()
def slow_generate(model, prompt, u, image, text, scale=1.0, unconditional_image=None, text_scale=1.0, starts=(), marks=(), unrepeated=()):
    """One row, the whole sequence anew for every id, no cache, the grammar asked by trial."""
    v, slots, ids = model.vocabulary, model.slots, list(prompt)
    rows, columns = next((parse_grid(v.name(token)[6:-1]) for token in prompt if v.class_of(token) == "grid"), v.default_grid)
    states, lengths = torch.tensor([STATES.index("start")]), torch.tensor([0])
    for token in ids:
        states, lengths = v.grammar.advance(states, lengths, torch.tensor([token]))
    while STATES[int(states)] != "end":
        legal = v.grammar.legal_mask(states, lengths, torch.tensor([rows * columns]))
        legal[:, v.id("<boq>")] = False
        if text.no_repeats and STATES[int(states)] == "caption":
            words = ids[ids.index(v.id("<boc>")) + 1 :]
            for piece in range(v.text_size):
                legal[0, piece] &= not (piece not in marks and stutters([*words, piece], starts, marks, at_the_end=True))
                said = complete_words([word for word in words if word not in marks], starts)
                legal[0, piece] &= not any(piece in word and set(word) & set(said) for word in unrepeated)
        logits = model.generator(input_ids=torch.tensor([ids])).logits[:, -1]
        in_image = STATES[int(states)] in ("image", "drawn")
        if scale != 1 and in_image:
            base = model.generator(input_ids=torch.tensor([unconditional_image + ids[len(prompt) :]])).logits[:, -1]
            logits = base + scale * (logits - base)
        if text_scale != 1 and STATES[int(states)] == "caption":
            words = ids[ids.index(v.id("<eoi>")) + 1 :]
            base = model.generator(input_ids=torch.tensor([prompt[:-1] + words])).logits[:, -1]
            out = logits.softmax(-1) < 0.1 * logits[legal].softmax(-1).max() * logits.softmax(-1)[legal].sum()
            logits = (base + text_scale * (logits - base)).masked_fill(out, -torch.inf)
        slot = min((slots.image if in_image else slots.text) + int(lengths), slots.size - 1)
        chosen = choose(logits, legal, u[None, slot], image if in_image else text)
        states, lengths = v.grammar.advance(states, lengths, chosen)
        ids.append(int(chosen))
    return ids


@pytest.mark.parametrize(("scale", "text_scale"), [(1.0, 1.0), (2.5, 1.0), (1.0, 2.0), (2.5, 0.5)])
def test_generating_with_the_cache_is_generating_without(tiny_model, scale, text_scale):
    v = tiny_model.vocabulary
    image, text, u = Choice(0.9, 20), Choice(0.7), uniforms(tiny_model, range(3))
    unconditional_image = [v.id("<bos>"), v.id("<boi>")]
    guided = {
        "guidance_scale": scale,
        "unconditional_image": torch.tensor([unconditional_image] * 3),
        "text_guidance_scale": text_scale,
        "unconditional_text": torch.tensor([prompt_ids(v)[:-1]] * 3),
    }
    fast = run(tiny_model, [prompt_ids(v)] * 3, u, image=image, text=text, **guided)
    for row in range(3):
        slow = slow_generate(tiny_model, prompt_ids(v), u[row], image, text, scale, unconditional_image, text_scale)
        assert fast.ids[row, : len(slow)].tolist() == slow
        assert (fast.ids[row, len(slow) :] == v.id("<pad>")).all()


def test_a_row_is_the_same_whatever_is_in_its_batch(tiny_model):
    v = tiny_model.vocabulary
    prompts, u = [prompt_ids(v)] * 20, uniforms(tiny_model, range(20))
    whole = run(tiny_model, prompts, u)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = run(tiny_model, prompts, u[order])
    parts = [[0], [1, 2, 3], [19], list(range(4, 19))]
    pieces = {i: (out, j) for rows in parts for out in [run(tiny_model, prompts[: len(rows)], u[rows])] for j, i in enumerate(rows)}
    for i in range(20):
        expected = sequences.unpack(v, whole.ids[i].tolist())
        out, j = pieces[i]
        k = order.tolist().index(i)
        assert sequences.unpack(v, out.ids[j].tolist()) == expected == sequences.unpack(v, shuffled.ids[k].tolist())
        # the same bits: rows are computed in blocks of one size
        assert out.image_nll[j] == whole.image_nll[i] == shuffled.image_nll[k]
        assert out.text_nll[j] == whole.text_nll[i] == shuffled.text_nll[k]


def test_every_sequence_respects_the_grammar(tiny_model):
    v = tiny_model.vocabulary
    for choice in (Choice(), Choice(5.0), Choice(0)):
        for extra in ([], [v.id("<boc>"), 300, 301, v.id("<eoc>")]):
            prompt = [*sequences.prefix(v, Tags("etching")), *extra, v.id("<boi>")]
            out = run(tiny_model, [prompt] * 16, uniforms(tiny_model, range(16), 7), image=choice, text=choice)
            for ids in out.ids.tolist():
                parts = sequences.unpack(v, ids)
                assert len(parts.codes) == 16 and parts.task == ("text_to_image" if extra else "joint")
                assert 1 <= len(parts.caption) <= v.max_text


def test_forbidden_ids_rule_out_a_task_and_without_them_questions_come_too(tiny_model):
    v = tiny_model.vocabulary
    tasks = {
        sequences.unpack(v, ids).task
        for ids in run(tiny_model, [prompt_ids(v)] * 32, uniforms(tiny_model, range(32)), forbid=()).ids.tolist()
    }
    assert "question" in tasks


def test_the_likelihoods_of_a_sample_are_those_of_scoring_it(tiny_model):
    v = tiny_model.vocabulary
    out = run(tiny_model, [prompt_ids(v)] * 8, uniforms(tiny_model, range(8)), image=Choice(0.5, 5), text=Choice(0.15))
    first = torch.full((8,), len(prompt_ids(v)))
    whole = span_nll(tiny_model.generator, v, out.ids, first)
    caption = span_nll(tiny_model.generator, v, out.ids, first + 16 + 2)  # behind <eoi> <boc>
    opening = span_nll(tiny_model.generator, v, out.ids, first + 16 + 1) - caption  # <boc> rather than <boq>
    torch.testing.assert_close(out.text_nll, caption, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out.image_nll + out.text_nll, whole - opening, rtol=1e-5, atol=1e-4)
    assert (opening > 0).all() and (out.image_nll > 0).all()


@torch.no_grad()
def test_span_nll_is_the_sum_over_legal_ids_one_by_one(tiny_model):
    v = tiny_model.vocabulary
    packed = sequences.pack_joint(v, Tags(), list(range(16)), [300, 20, 305]).input_ids
    start, total = packed.index(v.id("<boi>")) + 1, 0.0
    states, lengths = torch.tensor([0]), torch.tensor([0])
    for t, token in enumerate(packed):
        if t >= start:
            legal = v.grammar.legal_mask(states, lengths, torch.tensor([16]))
            logits = tiny_model.generator(input_ids=torch.tensor([packed[:t]])).logits[:, -1]
            total -= logits[legal].log_softmax(-1)[legal[0].nonzero().flatten().tolist().index(token)].item()
        states, lengths = v.grammar.advance(states, lengths, torch.tensor([token]))
    padded = torch.tensor([packed + [v.id("<pad>")] * 9, packed + [v.id("<pad>")] * 9])
    got = span_nll(tiny_model.generator, v, padded, torch.tensor([start, start]))
    torch.testing.assert_close(got, torch.full((2,), total, dtype=torch.float64), rtol=1e-5, atol=1e-4)


def test_guidance_of_one_is_no_guidance_and_more_changes_the_picture(tiny_model):
    v = tiny_model.vocabulary
    u, unconditional_image = uniforms(tiny_model, range(4)), torch.tensor([[v.id("<bos>"), v.id("<boi>")]] * 4)
    plain = run(tiny_model, [prompt_ids(v)] * 4, u)
    one = run(tiny_model, [prompt_ids(v)] * 4, u, guidance_scale=1.0, unconditional_image=unconditional_image)
    assert torch.equal(plain.ids, one.ids) and torch.equal(plain.image_nll, one.image_nll)
    assert not torch.equal(
        plain.ids, run(tiny_model, [prompt_ids(v)] * 4, u, guidance_scale=3.0, unconditional_image=unconditional_image).ids
    )
    with pytest.raises(ValueError, match="no unconditional prompt"):
        run(tiny_model, [prompt_ids(v)] * 4, u, guidance_scale=2.0)


def test_words_are_guided_by_their_picture_whoever_leaves_the_batch_before(tiny_model):
    v = tiny_model.vocabulary
    u, unconditional_text = uniforms(tiny_model, range(20)), torch.tensor([prompt_ids(v)[:-1]] * 20)
    plain = run(tiny_model, [prompt_ids(v)] * 20, u)
    guided = run(tiny_model, [prompt_ids(v)] * 20, u, text_guidance_scale=3.0, unconditional_text=unconditional_text)
    assert torch.equal(plain.image_nll, guided.image_nll), "the picture is drawn before"
    captions = [sequences.unpack(v, ids).caption for ids in guided.ids.tolist()]
    assert captions != [sequences.unpack(v, ids).caption for ids in plain.ids.tolist()]
    for i in (0, 7, 19):
        alone = run(tiny_model, [prompt_ids(v)], u[i : i + 1], text_guidance_scale=3.0, unconditional_text=unconditional_text[:1])
        assert sequences.unpack(v, alone.ids[0].tolist()).caption == captions[i]
        assert alone.text_nll_alone[0] == guided.text_nll_alone[i]
    assert not plain.text_nll_alone.any(), "nothing has read the words without the picture"
    scored = [[*prompt_ids(v)[:-1], v.id("<boc>"), *sequences.text_end(v, caption)] for caption in captions]
    first = torch.full((20,), len(prompt_ids(v)))
    without = span_nll(tiny_model.generator, v, torch.tensor(sequences.padded(v, scored)), first)
    torch.testing.assert_close(guided.text_nll_alone, without, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="without a picture"):
        run(tiny_model, [prompt_ids(v)] * 2, u[:2], text_guidance_scale=2.0)


def stutters(words, starts, marks=(), at_the_end=False):
    """Whether a phrase of one to six pieces, the first of which begins a word, stands in it twice in a row, marks left out."""
    words = [word for word in words if word not in marks]
    doubled = [
        (i, n) for n in range(1, 7) for i in range(len(words) - 2 * n + 1)
        if words[i] in starts and words[i : i + n] == words[i + n : i + 2 * n]
    ]  # fmt: skip
    return any(i + 2 * n == len(words) for i, n in doubled) if at_the_end else bool(doubled)


def complete_words(text, starts):
    """The pieces that are words of their own: the next piece begins another."""
    return [piece for piece, following in zip(text, [*text[1:], None]) if following is None or following in starts]


@pytest.mark.parametrize(("text_scale", "every"), [(1.0, 0), (2.0, 0), (1.0, 5)])
def test_an_unrepeated_word_stands_at_most_once_in_a_caption(tiny_model, text_scale, every):
    v, n, starts = tiny_model.vocabulary, 24, range(1, tiny_model.vocabulary.text_size, 2)
    words, marks = [(i, i + 2) for i in range(1, v.text_size - 2, 6)], range(0, v.text_size, every) if every else ()
    options = {
        "text_guidance_scale": text_scale, "unconditional_text": torch.tensor([prompt_ids(v)[:-1]] * n), "word_starts": starts,
        "unrepeated": words,
        "marks": marks,
    }  # fmt: skip
    u, captions = uniforms(tiny_model, range(n), seed=3), {}
    for choice in (Choice(0.15), Choice(0.15, no_repeats=True)):
        made = run(tiny_model, [prompt_ids(v)] * n, u, text=choice, **options)
        captions[choice.no_repeats] = [sequences.unpack(v, ids).caption for ids in made.ids.tolist()]

    def again(text):
        own = [piece for piece in text if piece not in marks]
        return any(piece in word and set(word) & set(complete_words(own[:i], starts)) for i, piece in enumerate(own) for word in words)

    assert not any(map(again, captions[True])) and any(map(again, captions[False]))
    row = next(i for i, (a, b) in enumerate(zip(*captions.values())) if a != b)
    slow = slow_generate(
        tiny_model,
        prompt_ids(v),
        u[row],
        Choice(),
        Choice(0.15, no_repeats=True),
        text_scale=text_scale,
        starts=starts,
        marks=marks,
        unrepeated=words,
    )
    assert sequences.unpack(v, slow).caption == captions[True][row]


@pytest.mark.parametrize(("text_scale", "every"), [(1.0, 0), (2.0, 0), (1.0, 3), (2.0, 5)])
def test_no_word_and_no_phrase_stands_twice_in_a_row(tiny_model, text_scale, every):
    v, n = tiny_model.vocabulary, 24
    some, marks = range(1, v.text_size, 2), range(0, v.text_size, every) if every else ()
    options = {
        "text_guidance_scale": text_scale,
        "unconditional_text": torch.tensor([prompt_ids(v)[:-1]] * n),
        "word_starts": some,
        "marks": marks,
    }
    u = uniforms(tiny_model, range(n), seed=3)
    captions = {}
    for choice in (Choice(0.15), Choice(0.15, no_repeats=True)):
        made = run(tiny_model, [prompt_ids(v)] * n, u, text=choice, **options)
        captions[choice.no_repeats] = [sequences.unpack(v, ids).caption for ids in made.ids.tolist()]
    assert not any(stutters(words, some, marks) for words in captions[True])
    plain = [stutters(words, some, marks) for words in captions[False]]
    assert any(plain) and not all(plain)
    as_they_were = [words == other for words, other in zip(*captions.values())]
    assert not any(same for same, was in zip(as_they_were, plain) if was)
    changed = sum(not same for same, was in zip(as_they_were, plain) if not was)
    assert changed <= plain.count(False) // 4, "what is not drawn leaves its share to the others: a choice on an edge may fall otherwise"
    row = plain.index(True)
    slow = slow_generate(
        tiny_model, prompt_ids(v), u[row], Choice(), Choice(0.15, no_repeats=True), text_scale=text_scale, starts=some, marks=marks
    )
    assert sequences.unpack(v, slow).caption == captions[True][row]


def test_a_slot_decides_its_own_choice_and_what_follows(tiny_model):
    """Changing the latent at code 5 leaves codes 0..4 as they were; changing the caption's leaves the picture."""
    v, u = tiny_model.vocabulary, uniforms(tiny_model, [0])
    for slot, kept in ((tiny_model.slots.image + 5, 5), (tiny_model.slots.text, 16)):
        other = u.clone()
        other[0, slot] = (other[0, slot] + 0.5) % 1
        a, b = (sequences.unpack(v, run(tiny_model, [prompt_ids(v)], x).ids[0].tolist()) for x in (u, other))
        assert a.codes[:kept] == b.codes[:kept] and (a.codes, a.caption) != (b.codes, b.caption)
        assert kept == 16 or a.codes[kept] != b.codes[kept]
