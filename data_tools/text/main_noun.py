"""Main noun: the thing that a description is about, by rules and statistics of all descriptions. English only.

    lexicon = Lexicon.learn(descriptions)
    lexicon.thing("A large moth with spread wings, seen from above.")      # "moth"
    lexicon.thing("Two armed knights fighting")                            # "knight"
    lexicon.thing("Portrait of a bearded man")                             # "man"

A description begins with its subject, so its thing is the head of its first noun phrase: the last noun before a preposition, a
conjunction, a comma or a participle that follows a noun. Nouns are recognised by statistics of the descriptions: nouns occur before
such a border, adjectives before nouns. If the head only frames what is shown ("portrait of", "a pair of", "the head of"), the thing
is what follows. Plurals become singular; of several possible singulars, one that occurs in the descriptions is taken.

No parser such as spaCy's, because that needs a package and a model to download, and another version of the model may give other nouns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

TOKEN = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*['’]?|\d+|[^\w\s]")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


NUMBERS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen",
    "sixteen", "twenty",
)  # fmt: skip
BEFORE = _set(
    "a an the this that these those its his her their both all each every another other several many few some various numerous "
    "more most no single half dozen dozens hundreds very rather almost nearly partly richly finely heavily highly tightly closely "
    "roughly simply deeply widely thickly slightly and or not"
) | frozenset(NUMBERS)
"""Words before a noun that are not nouns. "and", "or": between adjectives; after a noun they end the phrase."""
BORDERS = _set(
    "with without of in on at by from to into onto over under above below beneath behind beside besides between among amid amidst "
    "before after against along across around about near through up down off out within upon toward towards "
    "beyond for as like while when where who whom whose which than but nor so if because is are was were be been has have "
    "had does do did it he she they them him there here stand stands sit sits lie lies hold holds carry carries walk walks "
    "asleep alone afloat ashore aground ablaze aflame alight alive apart aside away aloft abreast awake together forward ahead "
    "inward outward upward downward upside sideways overhead underwater head-on side-on indoors outdoors nearby just only also being"
)
"""Words that end a noun phrase."""
JOINTS = _set("and or all both each that one")
"""Words that end a noun phrase after a noun."""
LOOSE = _set(
    "round past full back inside outside opposite upright open long high wide "
    "cut set seen shown shaped made held worn hung drawn bound laid left torn split sunk woven written broken overgrown"
)
"""Words that end it only if a border follows: "a stone cut in half", but "a plain round vase"."""
FRAMES = _set(
    "portrait view picture scene image drawing sketch study print engraving detail close-up closeup pair row line group cluster "
    "bunch number part piece pieces fragment set series collection kind type sort variety couple trio dozen half side front top "
    "end edge corner interior exterior section half-length likeness profile outline silhouette impression page plate sheet "
    "display array assortment selection mass lot handful heap pile stack flock herd pack swarm shoal school team band company "
    "party procession crowd gathering circle bust head heads face faces rear body back inside clump glimpse form figure shape model copy "
    "version specimen example spray sprig bouquet suit ground-plan cross-section rows pairs groups lines views kinds parts fragments "
    "head-and-shoulders upper lower pattern half-figure cutaway diagram relief statue statuette"
)
"""Heads that, if "of" follows, only frame what is shown."""
BACKS = _set("front interior inside side view scene end corner exterior facade back")
"""Heads that only name the visible part of the noun before them: "a temple front" is a temple."""
BOTH = _set("oval square round plain stern light dark general whole standing seated bearded long open old young rough")
"""Adjectives that are also nouns: "an oval view"."""
SPELLINGS = {"armor": "armour", "harbor": "harbour", "theater": "theatre", "fiber": "fibre", "plow": "plough"}
"""One spelling for each thing."""
IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "people", "feet": "foot", "teeth": "tooth", "geese": "goose",
    "mice": "mouse", "lice": "louse", "oxen": "ox", "dice": "die", "leaves": "leaf", "wolves": "wolf", "knives": "knife", "halves": "half",
    "calves": "calf", "loaves": "loaf", "thieves": "thief", "shelves": "shelf", "sheaves": "sheaf", "elves": "elf", "wives": "wife",
    "hooves": "hoof", "scarves": "scarf", "wharves": "wharf", "lives": "life", "larvae": "larva", "pupae": "pupa", "antennae": "antenna",
    "algae": "alga", "fungi": "fungus", "cacti": "cactus", "nuclei": "nucleus", "fishes": "fish", "brethren": "brother", "axes": "axe",
    "buses": "bus", "crocuses": "crocus", "octopuses": "octopus", "walruses": "walrus", "lenses": "lens", "irises": "iris",
    "cherubim": "cherub",
}  # fmt: skip
NO_PLURALS = _set(
    "scissors trousers shears tongs pincers pliers bellows spectacles glasses series species sheep deer swine cattle barracks "
    "gallows stocks works arms clothes stairs ruins remains news lens glass grass moss brass cross dress press mattress fortress "
    "abbess princess goddess lioness tigress cypress walrus iris octopus crocus cactus hippopotamus platypus bus pancreas canvas atlas "
    "compass harness cutlass bass ass albatross mantis ibis trellis oasis tennis chess hibiscus asparagus gas christmas tortoise rhinoceros"
)
NOT_BEFORE = 0.35  # a word is a noun if at least this share of its occurrences is before a border
SUFFIX_ADJECTIVE = re.compile(r".*(?:-(?:shaped|like|sided|legged|handled|\w+ed)|ed|en|ing)")


def tokens_of(text: str) -> list[str]:
    """Words and signs in lower case, with straight apostrophes."""
    return [token.replace("’", "'").lower() for token in TOKEN.findall(text)]


def is_border(token: str) -> bool:
    return token in BORDERS or not token[0].isalnum()


@dataclass(frozen=True)
class Lexicon:
    """Word statistics of the descriptions."""

    count: Counter[str]
    """Occurrences of each word."""
    ends: Counter[str]
    """Occurrences directly followed by a border."""
    capital: Counter[str]
    """Capitalised occurrences inside a sentence."""

    @classmethod
    def learn(cls, descriptions: Iterable[str]) -> Lexicon:
        count: Counter[str] = Counter()
        ends: Counter[str] = Counter()
        capital: Counter[str] = Counter()
        for text in descriptions:
            tokens = tokens_of(text)
            count.update(tokens)
            for token, after in zip(tokens, [*tokens[1:], "."]):
                if is_border(after) or after in ("and", "or", "seen", "shown") or (after.endswith("ing") and after not in NOUNS):
                    ends[token] += 1
            capital.update(word.lower() for word in TOKEN.findall(text)[1:] if word[0].isupper())
        return cls(count, ends, capital)

    def is_noun(self, word: str) -> bool:
        """Whether a word occurs at the end of phrases. Rare words are judged by their shape."""
        if self.count[word] < 4:
            return not SUFFIX_ADJECTIVE.fullmatch(word)
        return self.ends[word] >= NOT_BEFORE * self.count[word]

    def thing(self, description: str) -> str:
        """The main noun in the singular; "" if there is none."""
        tokens = tokens_of(description)
        start, framed = 0, ""
        for _ in range(3):  # "part of a row of columns"
            head, end = self.head(tokens, start)
            if not head:
                break
            noun = self.singular(head)
            after = tokens[end] if end < len(tokens) else ""
            framing = after == "of" and (head in FRAMES or noun in FRAMES)
            if framing and end - start > 1 and self.is_noun(tokens[end - 2]) and tokens[end - 2] not in BOTH:
                framing = False  # "spear heads of different shapes"
            if not framing and not (noun == "view" and after.isalpha()):  # "a view across a lake"
                return SPELLINGS.get(noun, noun)
            framed, start = framed or noun, end + 1
        return framed

    def head(self, tokens: list[str], start: int) -> tuple[str, int]:
        """The last noun of the phrase that begins at `start`, and the end of the phrase."""
        found: list[str] = []
        place = start
        while place < len(tokens):
            token, after = tokens[place], tokens[place + 1] if place + 1 < len(tokens) else "."
            noun = bool(found) and self.is_noun(found[-1])
            closed = is_border(after) or after in BEFORE
            if token == "side" and after == "by":  # "two men side by side"
                break
            if token.endswith("'s") or token.endswith("s'"):
                found.clear()  # "a man's hat": the owner is not the thing
            elif is_border(token):
                adjectives = token == "," and not noun and self.continues(tokens, place + 1)
                if not adjectives and (found or token not in (",", "-")):
                    break
            elif noun and (token in JOINTS or (token in LOOSE and closed)):
                break
            elif token in BEFORE or token in JOINTS:
                if noun:
                    break
            elif self.is_participle(token):
                if noun and (closed or token.endswith("ing")):  # "a stern bearded man" goes on
                    break
                if closed and self.is_noun(token):
                    found.append(token)  # "a building with", "a wooden carving of"
            elif not token.isdigit():
                found.append(token)
            place += 1
        if len(found) > 1 and self.singular(found[-1]) in BACKS and self.is_noun(found[-2]) and found[-2] not in BOTH:
            found.pop()
        return (found[-1] if found else ""), place

    def continues(self, tokens: list[str], place: int) -> bool:
        """Whether the noun phrase continues after a comma between two adjectives: "a tall, thin man"."""
        return place < len(tokens) and tokens[place] not in BEFORE and not is_border(tokens[place])

    def is_participle(self, word: str) -> bool:
        """Whether a word is a form in -ing or -ed: an adjective before a noun, the end of the phrase after one."""
        if word.endswith("ing"):
            stem = word[:-3]
        elif word.endswith("ed"):
            stem = word[:-2]
        else:
            return False
        return len(stem) > 1 and any(letter in "aeiouy" for letter in stem) and word not in NOUNS

    def singular(self, word: str) -> str:
        """The singular of a noun; of several possible ones, the most frequent in the descriptions."""
        head, dash, last = word.rpartition("-")
        if last in IRREGULAR:
            return head + dash + IRREGULAR[last]
        for plural in ("men", "women", "children", "wives"):  # fishermen
            if last.endswith(plural) and len(last) > len(plural) + 1:
                return head + dash + last[: -len(plural)] + IRREGULAR[plural]
        if last in NO_PLURALS or not last.endswith("s") or last.endswith(("ss", "us", "is")) or len(last) < 4:
            return word
        forms = [last[:-1]]
        if last.endswith("ies"):
            forms.insert(0, last[:-3] + "y")
        if last.endswith("ves"):
            forms += [last[:-3] + "f", last[:-3] + "fe"]
        if last.endswith(("ches", "shes", "xes", "sses", "zes", "oes")):
            forms.insert(0, last[:-2])
        return head + dash + max(forms, key=lambda form: self.count[head + dash + form])

    def lowercase_start(self, description: str) -> str:
        """A description to follow a colon: its first letter in lower case, unless the first word is a name."""
        words = TOKEN.findall(description)
        first = words[0] if words else ""
        name = self.capital[first.lower()] > 0.5 * (self.count[first.lower()] - 1) or (len(first) > 1 and first.upper() == first)
        return description if not first or (name and first.lower() not in BEFORE) else description[0].lower() + description[1:]


NOUNS = _set(
    "king ring wing string ceiling evening morning bunting lettering handwriting railing wedding building bed seed weed reed shed seaweed "
    "sled steed viking herring duckling gosling seedling sapling starling earring sling spring lightning awning rigging clothing clearing "
    "dwelling stocking pudding thing something farthing whiting lapwing redwing waxwing lemming grayling fledgling nestling gathering "
    "flooring moulding molding dumpling changeling flatbed seabed hundred bobsled breed creed"
)
"""Nouns in -ing and -ed that are not participles."""
