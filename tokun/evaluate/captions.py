"""The captions: how well they are predicted, how varied and complete they are, how close they come to human captions.

Each figure of the generated captions is paired with the same figure of the held-out ones, which people wrote: theirs is the
target, not 0 or 1. Knows texts and likelihoods, no pixels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tokun.data import cropping
from tokun.data.caption_words import words
from tokun.data.cropping import Grid
from tokun.data.question_wordings import QuestionWordings, wording_of
from tokun.evaluate import figures
from tokun.evaluate.figures import Figure, bootstrap
from tokun.evaluate.held_out_pairs import RealPair, grids_of
from tokun.inference import conditional_generation
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import Tags, tag_word
from tokun.tokenizers.wordings import SUBJECT

if TYPE_CHECKING:
    from tokun.inference.model import Pair, Tokun

ORDERS = 4  # longest n-grams, in words
LEADS_ON = (
    "a an the of and or in on at to by for from with into upon over under between near his her its their our your this these those "
    "as is are was were be being been has have had that which who whose when where while than through after before against among"
)
HANGING = frozenset(LEADS_ON.split())
OPEN_ENDS = ",;:-–—(["


def measure(
    model: Tokun, held_out: Sequence[RealPair], samples: Sequence[Pair], *, seed: int, training: Sequence[str] = ()
) -> list[Figure]:
    """`training`: the training captions, to find copies of."""
    real, made = [pair.caption for pair in held_out], [pair.caption for pair in samples]
    found = likelihoods(model, held_out, seed) + variety(made, real, seed)
    for what, texts in (("generated", made), ("held-out", real)):
        found += repetition(texts, what) + (copies(texts, training, what) if training else [])
    found += wholeness([(pair.caption, len(pair.caption_ids) >= model.vocabulary.max_text) for pair in samples], real)
    found += agreement(captions_for(model, held_out, seed), real, seed) + subjects_named(model, held_out)
    return found + questions_answered(model, held_out, seed)


def grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


# --- likelihood -------------------------------------------------------------------------------------------------------


def likelihoods(model: Tokun, held_out: Sequence[RealPair], seed: int) -> list[Figure]:
    """Nats per text token (pieces and the end) and per UTF-8 byte of held-out captions, given their pictures and without them."""
    tags, ids = [pair.tags for pair in held_out], [pair.caption_ids for pair in held_out]
    units = {"text token": [len(i) + 1 for i in ids], "byte": [len(model.text_tokenizer.decode(i).encode()) for i in ids]}
    found = []
    for how, codes in (("given the picture", [pair.codes for pair in held_out]), ("without a picture", None)):
        nats = model.caption_nll(tags, ids, codes)
        for unit, counts in units.items():
            cases = np.array([nats, counts]).T
            low, high = bootstrap(cases, _per_unit, seed=seed)
            found.append(Figure(f"held-out nats a {unit}, {how}", _per_unit(cases), len(ids), low, high, "less"))
    return found


def _per_unit(cases: np.ndarray) -> float:  # (n, 2): nats, units
    total = cases.sum(0)
    return float(total[0] / total[1])


# --- variety and completeness -----------------------------------------------------------------------------------------


def variety(made: Sequence[str], real: Sequence[str], seed: int) -> list[Figure]:
    """distinct-1, -2, -3, over equally many held-out captions, since more text repeats itself more."""
    drawn = np.random.default_rng(seed).permutation(len(real))[: len(made)]
    texts = {"generated": list(made), "held-out": [real[i] for i in drawn]}
    return [
        Figure(f"distinct-{n}, {what}", distinct(few, n), len(few), better="more" if what == "generated" else "", note="of all together")
        for n in (1, 2, 3)
        for what, few in texts.items()
    ]


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams (Li et al., 2016, A Diversity-Promoting Objective Function, 5.2)."""
    counts = sum((grams(words(text), n) for text in texts), Counter())
    return len(counts) / max(1, counts.total())


def repetition(texts: Sequence[str], what: str) -> list[Figure]:
    better = "less" if what == "generated" else ""
    return [
        figures.share(f"captions that repeat three words, {what}", [repeats(text) for text in texts], better=better),
        figures.share(
            f"captions that loop, {what}", [loops(text) for text in texts], better=better, note="one to four words twice in a row"
        ),
    ]


def repeats(text: str) -> bool:
    """Whether three consecutive words occur twice."""
    return max(grams(words(text), 3).values(), default=0) > 1


def loops(text: str) -> bool:
    """Whether one to four words are immediately repeated."""
    said = words(text)
    return any(said[i : i + n] == said[i + n : i + 2 * n] for n in range(1, ORDERS + 1) for i in range(len(said) - 2 * n + 1))


def copies(texts: Sequence[str], training: Sequence[str], what: str) -> list[Figure]:
    lines = {" ".join(words(text)) for text in training}
    return [figures.share(f"captions that training holds word for word, {what}", [" ".join(words(text)) in lines for text in texts])]


def wholeness(made: Sequence[tuple[str, bool]], real: Sequence[str]) -> list[Figure]:
    """Unfinished captions: generated ones, each with whether it reached the maximum length, and by the same rule human ones."""
    known = Counter(word for text in real for word in words(text))
    ours = [unfinished(text, known, no_room) for text, no_room in made]
    theirs = [unfinished(text, known - Counter(words(text)), False) for text in real]
    return [
        figures.share(
            "captions left unfinished, generated", ours, better="less", note="at the maximum length, or with a broken or dangling end"
        ),
        figures.share("captions left unfinished, held-out", theirs, note="errors of the rule: human captions are complete"),
    ]


def unfinished(text: str, known: Counter[str], no_room: bool) -> bool:
    """Whether a caption ended too early: it reached the maximum length; or it ends in an opening mark or a word that needs a
    continuation ("of the"); or it has no word; or its last letters begin a word of `known` without being one.

    The rule misses a truncated caption that happens to end in a complete word.
    """
    said, end = words(text), text.strip()[-1:]
    if no_room or not said or end in OPEN_ENDS:
        return True
    if not end.isalpha():
        return False
    last = said[-1]
    return last in HANGING or (known[last] <= 0 and len(last) > 1 and any(word.startswith(last) for word in known))


# --- answers ----------------------------------------------------------------------------------------------------------


def subjects_named(model: Tokun, held_out: Sequence[RealPair]) -> list[Figure]:
    """How often the model names a picture's subject, one of its subject tags, when it is asked. Nothing without subjects, of a model that
    was not trained on questions. Skipped for one that never answers with a subject."""
    pairs = [pair for pair in held_out if pair.tags.subject]
    if not pairs or "question" not in model.tasks:
        return []
    named = [tag_word(answer) for answer in answers_to(model, SUBJECT, pairs)]
    if not {*named} & {*model.subjects, *(pair.tags.subject for pair in pairs)}:
        return [figures.skipped("subject named right, held-out", f"no answer to {SUBJECT!r} is a subject")]
    commonest = Counter(pair.tags.subject for pair in pairs).most_common(1)[0][1] / len(pairs)
    return [
        figures.share(
            "subject named right, held-out", [answer == pair.tags.subject for answer, pair in zip(named, pairs)], better="more",
            note=f"likeliest answer to {SUBJECT!r}; {len(model.subjects)} subjects, the commonest is {commonest:.1%}",
        )
    ]  # fmt: skip


MOST_ASKED, MOST_SHOWN = 128, 12  # questions of a wording; wordings


def questions_answered(
    model: Tokun, held_out: Sequence[RealPair], seed: int = 0, *, wordings: int = MOST_SHOWN, cases: int = MOST_ASKED
) -> list[Figure]:
    """How often the model gives the answer that the shards hold, for each of the most frequent `wordings` of the held-out questions, of
    which at most `cases` are drawn by the seed (free ones, such as "what is shown", are left out). Nothing of a model that was not trained
    on questions."""
    if "question" not in model.tasks:
        return []
    asked = [(pair, question, answer) for pair in held_out for question, answer in pair.questions]
    known = model.question_wordings or QuestionWordings(question for _, question, _ in asked).wordings()
    by_wording: dict[str, list[tuple[RealPair, str, str]]] = {}
    for one in asked:
        if (wording := wording_of(one[1], known)) and len(model.text_tokenizer.encode(one[1])) <= model.vocabulary.max_text:
            by_wording.setdefault(wording, []).append(one)
    found = []
    closed = {  # of the others each answer is its own: nothing is right or wrong
        wording: every for wording, every in by_wording.items() if len({answer for _, _, answer in every}) <= len(every) / 2
    }
    for wording, every in sorted(closed.items(), key=lambda item: -len(item[1]))[:wordings]:
        some = [every[i] for i in np.sort(np.random.default_rng(seed).permutation(len(every))[:cases])]
        counts = Counter(answer for _, _, answer in some)
        answers = answers_to(model, [question for _, question, _ in some], [pair for pair, _, _ in some])
        right = [words(answer) == words(wanted) for answer, (_, _, wanted) in zip(answers, some)]
        commonest, count = counts.most_common(1)[0]
        note = f"likeliest answer; always {commonest!r}: {count / counts.total():.1%}"
        found.append(figures.share(f"question answered right, held-out: {wording}", right, better="more", note=note))
    return found


def answers_to(model: Tokun, questions: str | Sequence[str], pairs: Sequence[RealPair], rows: int = 64) -> list[str]:
    """The likeliest answer to a question about each picture, or to one of its own, as `model.ask` gives it at temperature 0."""
    v, out = model.vocabulary, dict[int, str]()
    asked = [model.encode_text(text) for text in ([questions] * len(pairs) if isinstance(questions, str) else questions)]
    grids = grids_of(model, pairs)
    prompts = [sequences.question_prompt(v, Tags(grid=grid), pair.codes, ids) for grid, pair, ids in zip(grids, pairs, asked)]
    for _, part in cropping.alike(list(zip(grids, map(len, prompts))), rows):  # prompts of a batch have one length
        made = conditional_generation.write(model, [prompts[i] for i in part], model.uniforms(0, range(len(part))), model.text_choice(0.0))
        out |= {i: model.text_tokenizer.decode(sequences.unpack(v, ids).answer or []) for i, ids in zip(part, made.ids.tolist())}
    return [out[i] for i in range(len(pairs))]


def batches(model: Tokun, pairs: Sequence[RealPair], rows: int) -> Iterator[tuple[Grid, list[int]]]:
    """(grid, indices of at most `rows` pairs that have it): their prompts have one length."""
    return cropping.alike(grids_of(model, pairs), rows)


# --- agreement with human captions ------------------------------------------------------------------------------------


def captions_for(model: Tokun, pairs: Sequence[RealPair], seed: int, rows: int = 64) -> list[str]:
    """A caption for each picture, as `model.caption` writes it with the checkpoint's temperature and guidance, each with its own latent."""
    v = model.vocabulary
    out: dict[int, str] = {}
    for grid, part in batches(model, pairs, rows):
        tags = Tags(register="plain", grid=grid)
        prompts = [sequences.caption_prompt(v, tags, pairs[i].codes) for i in part]
        bare = [sequences.caption_prompt(v, tags, None)] * len(part)
        u = model.uniforms(seed + part[0], range(len(part)))
        made = conditional_generation.write(model, prompts, u, model.text_choice(), bare, model.text_guidance(None))
        out |= {i: model.text_tokenizer.decode(sequences.unpack(v, ids).caption or []) for i, ids in zip(part, made.ids.tolist())}
    return [out[i] for i in range(len(pairs))]


def agreement(made: Sequence[str], real: Sequence[str], seed: int) -> list[Figure]:
    """BLEU-1, BLEU-4 and CIDEr of captions written for held-out pictures, and of the same captions against other pictures' references."""
    order = np.random.default_rng(seed).permutation(len(real))
    other = list(real)
    for here, there in zip(order, np.roll(order, 1)):
        other[here] = real[there]
    found = []
    for what, references in (("", real), (", chance", other)):
        note, better = ("captions of other pictures" if what else "captions written for held-out pictures"), "" if what else "more"
        counts = np.array([bleu_counts(words(a), words(b)) for a, b in zip(made, references)], np.float64)
        for n in (1, ORDERS):
            low, high = bootstrap(counts, lambda cases, n=n: bleu(cases, n), seed=seed)
            found.append(Figure(f"BLEU-{n}{what}", bleu(counts, n), len(made), low, high, better, note))
        found.append(figures.mean(f"CIDEr{what}", cider(made, references), better=better, note=f"{note}, 0 to 10", seed=seed))
    return found


def bleu_counts(candidate: Sequence[str], reference: Sequence[str]) -> list[int]:
    """Clipped matches of 1 … 4 words, the possible matches, and the two lengths: the counts that BLEU sums over a corpus."""
    ours, theirs = ([grams(tokens, n) for n in range(1, ORDERS + 1)] for tokens in (candidate, reference))
    return [*((a & b).total() for a, b in zip(ours, theirs)), *(a.total() for a in ours), len(candidate), len(reference)]


def bleu(counts: np.ndarray, n: int = ORDERS) -> float:
    """BLEU-n of a corpus (Papineni et al., 2002, 2.3), one reference each, without smoothing: counts (cases, 10) of `bleu_counts`."""
    total = counts.sum(0)
    matched, possible, (ours, theirs) = total[:n], total[ORDERS : ORDERS + n], total[-2:]
    if min(matched) == 0:
        return 0.0
    brevity = min(0.0, 1 - theirs / ours)
    return math.exp(brevity + float(np.log(matched / possible).mean()))


def cider(made: Sequence[str], real: Sequence[str]) -> list[float]:
    """CIDEr of each caption, 0 to 10 (Vedantam et al., 2015, eq. 1 to 3): the cosine of TF-IDF vectors of 1 … 4 words, averaged over
    the n-gram lengths that the reference has. One reference each; words are not stemmed.
    """
    out = np.zeros((2, len(real)))  # sums of cosines, lengths
    for n in range(1, ORDERS + 1):
        ours, theirs = ([grams(words(text), n) for text in texts] for texts in (made, real))
        seen = Counter(gram for counts in theirs for gram in counts)
        idf = {gram: math.log(len(real) / count) for gram, count in seen.items()}
        for i, (a, b) in enumerate(zip(ours, theirs)):
            if b:
                out[:, i] += cosine(a, b, idf, math.log(len(real))), 1
    return (10 * out[0] / np.maximum(out[1], 1)).tolist()


def cosine(a: Counter[tuple[str, ...]], b: Counter[tuple[str, ...]], idf: dict[tuple[str, ...], float], unseen: float) -> float:
    x, y = ({gram: count * idf.get(gram, unseen) for gram, count in counts.items()} for counts in (a, b))
    length = math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))
    return sum(value * y.get(gram, 0.0) for gram, value in x.items()) / length if length else 0.0
