"""Language: which of six languages a caption is in, by its stop words."""

from __future__ import annotations

import re

# The most common words of each language, and a few that captions begin with.
STOP_WORDS = {
    "en": "a an and are as at be before but by for from had has have he her his how in into is it its me my not of on or our out she that "
    "the their them they this to up upon was we were when which who with you your",
    "fr": "vue ville rue église à au aux avec ce ces cette chez d dans de des du elle en est et il ils je l la le les leur mais ne nous on "
    "ou où par pas pour qu que qui sa se ses son sous sur un une vous",
    "de": "ansicht stadt am an auf aus bei das dem den der des die ein eine einem einen einer eines er es für hat ich im in ist mit nach "
    "nicht sein sich sie sind über um und unter vom von vor war wie wird zu zum zur",
    "es": "vista ciudad iglesia a al con de del el en entre es está la las lo los más muy para pero por que se sin sobre su sus un una y",
    "it": "veduta città chiesa a ai al alla che con da dal dalla degli dei del della delle di e gli i il in la le lo nel nella non per più "
    "sono su sul sulla un una uno è",
    "la": "ab ad atque cum de ejus eius est et ex hic hoc in inter non per pro quae quam qui quod sed sive sub sunt super ut vel",
}
LANGUAGES = {tag: frozenset(words.split()) for tag, words in STOP_WORDS.items()}


def language(text: str) -> str:
    """en, fr, de, es, it or la by a text's stop words; "und" if they are too few or inconclusive."""
    words = [word.lower() for word in re.findall(r"[^\W\d_]+", text) if not re.fullmatch("[B-Z]", word)]
    scores = {tag: sum(word in stops for word in words) for tag, stops in LANGUAGES.items()}
    best, second, *_ = sorted(scores, key=lambda tag: -scores[tag])
    if scores[best] == scores[second] or 12 * scores[best] < len(words):
        return "und"
    return best
