"""What text ids look like: which are never sampled, may not begin a caption, begin a word, or are not words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tokun.inference.token_choice import Constraints
from tokun.tokenizers import sequences
from tokun.tokenizers.text import PretrainedTextTokenizer, TextTokenizer
from tokun.tokenizers.vocabulary import Vocabulary


def constraints_of(tokenizer: TextTokenizer | PretrainedTextTokenizer, vocabulary: Vocabulary) -> Constraints:
    """The constraints of pictures with captions, not questions, where words may be repeated: control characters are never sampled, and
    blanks may not begin a caption."""
    shown = {i: tokenizer.decode([i]) for i in range(vocabulary.text_size) if i not in vocabulary.illegal_text}
    control = [i for i, text in shown.items() if text and not text.isspace() and not text.isprintable() and "\ufffd" not in text]
    control += [i for i, text in shown.items() if text in ("\t", "\n", "\r", "\v", "\f")]
    blank = (i for i, text in shown.items() if not text.strip())
    return Constraints((*sequences.other_tasks(vocabulary), *control), tuple(blank))


def without_repeats(
    constraints: Constraints,
    tokenizer: TextTokenizer | PretrainedTextTokenizer,
    vocabulary: Vocabulary,
    unrepeated_words: Iterable[str] = (),
) -> Constraints:
    """The same with what `Choice.no_repeats` needs: every piece is decoded once more. `unrepeated_words`: those that a caption has at most
    once."""
    after = after_a_letter(tokenizer, vocabulary)
    return replace(constraints, word_starts=word_starts(after), marks=marks(after), unrepeated=ids_of_words(after, unrepeated_words))


def after_a_letter(tokenizer: TextTokenizer | PretrainedTextTokenizer, vocabulary: Vocabulary) -> dict[int, str]:
    """What each text id makes of "a" when it follows."""
    before = tokenizer.encode("a")
    return {i: tokenizer.decode([*before, i]) for i in range(vocabulary.text_size) if i not in vocabulary.illegal_text}


def word_starts(after: Mapping[int, str]) -> list[int]:
    """Text ids that begin a word, and so may follow a blank."""
    return [i for i, text in after.items() if text.startswith("a ")]


def ids_of_words(after: Mapping[int, str], words: Iterable[str]) -> list[list[int]]:
    """For each word that has an id of its own, its ids, in upper and lower case."""
    found: dict[str, list[int]] = {word: [] for word in words}
    for i in word_starts(after):
        if (own := found.get(after[i].removeprefix("a ").lower())) is not None:
            own.append(i)
    return [ids for ids in found.values() if ids]


def marks(after: Mapping[int, str]) -> list[int]:
    """Text ids that are neither letters nor digits: commas, quotes, dashes. Parts of a character (bytes) do not count as marks, nor do full
    stops: "W. W. Skeat"."""
    texts = {i: text[1:].strip() for i, text in after.items()}
    return [i for i, text in texts.items() if text and not any(letter.isalnum() or letter in ".\ufffd" for letter in text)]
