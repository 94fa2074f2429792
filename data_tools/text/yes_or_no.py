"""Yes/no questions such as "is this a moth?" about pictures with a known main thing and kind, balanced so that none gives its answer away.

    asked = is_this(pictures, seed)        # asked[i]: [("Is this a moth?", "yes"), ("Is this a beetle?", "no"), …] of picture i

Each question has exactly as many pictures with the answer yes as with no. The no-questions are the yes-questions of other pictures,
reassigned: first among pictures of the same family of kinds, which are easily confused, then among all. No picture gets a no-question
about a thing that its description names, that is another word for its own thing, or that its own thing may also be: "a bird" is not
asked whether it is an owl. A question that cannot be reassigned is dropped, both yes and no.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = {
    "portrait": "a portrait", "figure": "a single figure", "people": "several people", "interior": "an interior", "street": "a street",
    "battle": "a battle", "animal": "an animal", "bird": "a bird", "fish": "a fish", "insect": "an insect", "shell": "a shell",
    "plant": "a plant", "tree": "a tree", "landscape": "a landscape", "sea": "the sea", "ship": "a ship", "building": "a building",
    "ruin": "a ruin", "room-object": "a household object", "vessel": "a vessel", "machine": "a machine", "arms": "a weapon or armour",
    "ornament": "an ornament", "sculpture": "a sculpture", "coin": "a coin", "emblem": "an emblem", "diagram": "a diagram",
}  # fmt: skip
"""The name of a kind in a question. Other subjects are not asked about."""
FAMILIES = (
    {"portrait", "figure", "people", "battle"}, {"animal", "bird", "fish", "insect", "shell"}, {"plant", "tree"},
    {"landscape", "sea", "street", "ruin", "building", "interior", "ship"},
    {"room-object", "vessel", "machine", "arms", "ornament", "sculpture", "coin", "emblem", "diagram"},
)  # fmt: skip
PEOPLE = frozenset({"portrait", "figure", "people", "battle", "street", "interior", "sculpture", "coin", "other"})
MALE, FEMALE = frozenset({"man", "boy", "king", "gentleman"}), frozenset({"woman", "girl", "lady", "queen", "goddess"})
GENERIC = frozenset({
    "animal", "creature", "beast", "monster", "bird", "fish", "insect", "shell", "plant", "flower", "tree", "building", "ship", "boat",
    "vessel", "machine", "tool", "instrument", "ornament", "statue", "figure", "person", "shield", "stone", "object", "piece", "head",
    "family", "couple", "crowd", "skeleton",
})  # fmt: skip
"""Generic names, which cover other things of their kind."""
SIMILAR = tuple(
    frozenset(words.split())
    for words in (
        "ship boat steamer steamship warship vessel galley frigate canoe",
        "deer stag antelope goat",
        "ox bull cow",
        "monkey lemur ape",
        "house building mansion palace castle hall hut tower church cathedral chapel temple abbey gate gateway wall arch doorway window "
        "porch courtyard shrine tomb nave room lighthouse",
        "jar vase urn pot jug vessel bottle cup bowl pitcher dish plate",
        "wasp bee fly insect moth butterfly",
        "leaf twig branch stem plant flower sprig fern lily tree trunk cone seaweed coral",
        "street town village city square courtyard bridge building house",
        "river lake bay sea shore valley mountain hill plain cliff rock waterfall landscape village town wave island",
        "ring brooch pendant ornament medal coin seal cross star crown",
        "stone slab block rock column pillar capital panel frame ornament statue tomb mound",
        "axe blade tool hilt sword",
        "machine engine instrument tool locomotive",
        "shield emblem crest arms cross star",
        "skeleton skull bone head tooth",
        "sparrow finch bunting warbler wren bird",
        "eagle hawk falcon vulture",
        "pigeon dove",
        "chair table box cabinet lamp",
        "angel god goddess demon figure statue",
        "dragon monster beast creature lion",
        "starfish star urchin anemone jellyfish coral shell",
        "helmet armour shield",
        "bird warbler flycatcher thrush swallow cuckoo jay woodpecker",
    )
)
"""Groups of things that can be mistaken for each other, or for which a picture may show either."""
LIKE = {thing: [group for group in SIMILAR if thing in group] for thing in frozenset().union(*SIMILAR)}
NO_ARTICLE = frozenset({"armour", "seaweed", "coral", "people", "scissors", "cattle", "ruins", "clothes", "grass"})
NOT_ASKED = frozenset(
    {
        "people",
        "crowd",
        "couple",
        "family",
        "head",
        "hand",
        "view",
        "square",
        "plain",
        "general",
        "person",
        "figure",
        "oval",
        "piece",
        "group",
    }
)
MOST_OF_A_THING, MOST_OF_A_KIND = 300, 2500
"""Most pictures asked about one thing, and about one kind. More would leave too few others of their kind to exchange with."""
ROUNDS = 40  # of exchanging questions that do not fit


@dataclass(frozen=True)
class Shown:
    """The known facts about one picture."""

    thing: str = ""
    """Its main thing if the description names a single one ("a moth"), else ""."""
    kind: str = ""
    words: frozenset[str] = frozenset()
    """The words of its description, in the singular."""


def with_article(text: str) -> str:
    return f"{'an' if text[:1] in 'aeiou' else 'a'} {text}" if text else ""


def named(thing: str) -> str:
    """A thing with its article, if any: "an owl", "armour"."""
    return thing if thing in NO_ARTICLE else with_article(thing)


def is_this(pictures: Sequence[Shown], seed: int) -> list[list[tuple[str, str]]]:
    """For each picture, its (question, answer) pairs about its thing and its kind."""
    asked: list[list[tuple[str, str]]] = [[] for _ in pictures]
    things = {i: one.thing for i, one in enumerate(pictures) if one.thing and one.thing not in NOT_ASKED}
    where = kinds_of_things(pictures)
    family = {kind: number for number, kinds in enumerate(FAMILIES) for kind in kinds}
    groups = {i: pictures[i].kind for i in things}
    rng = np.random.default_rng([seed, 1])
    yes, no = deal(at_most(things, MOST_OF_A_THING, rng), groups, lambda i, thing: is_no(pictures[i], thing, where), rng)
    for i in things:
        asked[i] += [(f"Is this {named(name)}?", answer) for name, answer in ((yes.get(i), "yes"), (no.get(i), "no")) if name]
    kinds = {i: one.kind for i, one in enumerate(pictures) if one.kind in KINDS}
    groups = {i: str(family.get(kind, -1)) for i, kind in kinds.items()}
    rng = np.random.default_rng([seed, 2])
    yes, no = deal(at_most(kinds, MOST_OF_A_KIND, rng), groups, lambda i, kind: is_other_kind(pictures[i], kind), rng)
    for i in kinds:
        asked[i] += [(f"Is the subject {KINDS[name]}?", answer) for name, answer in ((yes.get(i), "yes"), (no.get(i), "no")) if name]
    return asked


def at_most(own: dict[int, str], most: int, rng: np.random.Generator) -> dict[int, str]:
    """The pictures, with at most `most` drawn for each name."""
    places = list(own)
    taken: Counter[str] = Counter()
    kept: list[int] = []
    for i in (places[n] for n in rng.permutation(len(places))):
        taken[own[i]] += 1
        if taken[own[i]] <= most:
            kept.append(i)
    return {i: own[i] for i in sorted(kept)}


def kinds_of_things(pictures: Sequence[Shown]) -> dict[str, frozenset[str]]:
    """The kinds in which a thing occurs more than occasionally."""
    count: dict[str, Counter[str]] = {}
    for one in pictures:
        if one.thing:
            count.setdefault(one.thing, Counter())[one.kind] += 1
    return {thing: frozenset(kind for kind, n in kinds.items() if n >= 0.02 * kinds.total()) for thing, kinds in count.items()}


def is_no(picture: Shown, thing: str, where: dict[str, frozenset[str]]) -> bool:
    """Whether the answer to "is this a `thing`?" is certainly no."""
    own, kind = picture.thing, picture.kind
    if thing == own or thing in picture.words or any(own in group or group & picture.words for group in LIKE.get(thing, ())):
        return False
    if own in MALE | FEMALE and thing in MALE | FEMALE:
        return (own in MALE) != (thing in MALE)
    if kind in PEOPLE and where[thing] & {"portrait", "figure", "people"}:  # a knight is also a man
        return False
    return not ((thing in GENERIC or own in GENERIC) and kind in where[thing])


def is_other_kind(picture: Shown, kind: str) -> bool:
    """Whether the answer to "is the subject a `kind`?" is certainly no."""
    return (
        kind != picture.kind
        and kind not in picture.words
        and {kind, picture.kind}
        not in ({"vessel", "room-object"}, {"ruin", "building"}, {"portrait", "figure"}, {"tree", "plant"}, {"sea", "ship"})
    )


def deal(
    own: dict[int, str], groups: dict[int, str], fits: Callable[[int, str], bool], rng: np.random.Generator
) -> tuple[dict[int, str], dict[int, str]]:  # fmt: skip
    """({picture: its own name, answer yes}, {picture: another name, answer no}), with as many yes as no for each name.

    own: name by picture. groups: members of one group exchange first. fits: whether a picture may be asked about a name.
    """
    dealt: dict[int, str] = {}
    left: list[int] = []
    names: list[str] = []
    grouped: dict[str, list[int]] = {}
    for i in sorted(own):
        grouped.setdefault(groups[i], []).append(i)
    for _, members in sorted(grouped.items()):
        bad = exchange(members, [own[i] for i in members], fits, rng, dealt)
        left += [i for i, _ in bad]
        names += [name for _, name in bad]
    # names that fit nobody in their group are exchanged among all, together with as many that fit
    helpers = sorted(dealt)
    helpers = [helpers[n] for n in rng.permutation(len(helpers))[: len(left)]]
    bad = exchange([*left, *helpers], [*names, *(dealt.pop(i) for i in helpers)], fits, rng, dealt)
    yes = dict(own)
    by_name: dict[str, list[int]] = {}
    for i in own:
        by_name.setdefault(own[i], []).append(i)
    for _, name in bad:
        del yes[by_name[name].pop()]
    return yes, dealt


def exchange(
    members: list[int], names: list[str], fits: Callable[[int, str], bool], rng: np.random.Generator, dealt: dict[int, str]
) -> list[tuple[int, str]]:  # fmt: skip
    """Assign the names to the members so that each fits, into `dealt`. Returns those without a place."""
    hand = [names[n] for n in rng.permutation(len(names))]
    good = [fits(i, name) for i, name in zip(members, hand)]
    for _ in range(ROUNDS):
        wrong = [n for n, fine in enumerate(good) if not fine]
        if not wrong:
            break
        for n, m in zip(wrong, rng.integers(len(members), size=len(wrong)).tolist()):
            a = not good[n] and fits(members[n], hand[m])
            b = a and fits(members[m], hand[n])
            if a and (b or not good[m]):
                hand[n], hand[m], good[n], good[m] = hand[m], hand[n], a, b
    dealt.update((i, name) for i, name, fine in zip(members, hand, good) if fine)
    return [(i, name) for i, name, fine in zip(members, hand, good) if not fine]
