"""Promises of tokun/tokenizers/text.py. Captions are made up here; nothing is read from disk or network."""

import io
import pickle
import random
import stat
import unicodedata

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokun.config import Config
from tokun.tokenizers import text as text_tokenizer
from tokun.tokenizers.text import PretrainedTextTokenizer, TextTokenizer, normalize
from tokun.training.text_tokenizer import captions_of

ADDED = [
    "<bos>",
    "<eos>",
    "<pad>",
    "<boi>",
    "<eoi>",
    "<boc>",
    "<eoc>",
    "<style:wood-engraving>",
    "<image:0>",
    "<image:1>",
]
NAMED = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}

ARTICLES = ["The", "A", "An old", "One"]
THINGS = [
    "fox",
    "lighthouse",
    "knight",
    "Bee-eater (Merops apiaster)",
    "Don Quixote",
    "château",
    "Dürer's hare",
    "windmill",
]
PLACES = [
    "in the snow",
    "by the river Seine",
    "at Provins, 14th century",
    "before 1863",
    "— plate XXIX",
    "under the moon…",
]
ODDMENTS = [
    "   ", "\t\n", "\u00a0\u3000", "....", "!?!?", "-----", "((('\"", "1863 12,345.67", "0000", "aaaaaaa", "ababab",
    "日本の木口木版画", "가각", "\U0001f98a\U0001f469\u200d\U0001f3a8\U0001f5bc\ufe0f", "e\u0301\u0316", "\u1e0b\u0323",
    "ﬁ½Å", "\u2581", "\u2585", "\ufffd", "\x00\x07", "<unk>", "<0x41>", "<s>", "\U0010ffff", "क्षि", "\u202eabc",
]  # fmt: skip

ANY_TEXT = st.text(st.characters(), max_size=60)  # every code point, lone surrogates too


def captions(n, seed=0):
    """Captions as they should be."""
    pick = random.Random(seed).choice
    return [f"{pick(ARTICLES)} {pick(THINGS)} {pick(PLACES)}." for _ in range(n)]


def strange_captions(n, seed=0):
    """Captions as they come: oddments strewn in, words shuffled to letters."""
    rng = random.Random(seed)
    texts = []
    for text in captions(n, seed):
        letters = list(text)
        if rng.random() < 0.3:
            rng.shuffle(letters)
        for _ in range(rng.randrange(4)):
            letters.insert(rng.randrange(len(letters)), rng.choice(ODDMENTS) * rng.randint(1, 3))
        texts.append("".join(letters))
    return texts


def byte_level_backend(texts):
    """A tiny byte-level BPE, as GPT-2's and Qwen's are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(captions(500), vocab_size=400)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Through transformers, as a user gets one; it puts its end token round a text and knows its unk by name only."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("pretrained")
    backend = byte_level_backend(captions(300))
    backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="!")
    fast.save_pretrained(directory)
    return PretrainedTextTokenizer.from_pretrained(directory)


def auto_tokenizer(tokenizer, directory):
    """What a stranger with nothing but transformers sees, `config.json` of the backbone beside it."""
    from transformers import AutoTokenizer

    (directory / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    tokenizer.save_hf(directory, ADDED, **NAMED)
    return AutoTokenizer.from_pretrained(str(directory))


# --- normalize --------------------------------------------------------------------------------------------------------


@given(ANY_TEXT)
def test_normalize_is_idempotent_and_tokenisable(text):
    once = normalize(text)
    assert normalize(once) == once
    once.encode("utf-8")  # no surrogate left
    assert unicodedata.is_normalized("NFC", once)
    assert "\u2581" not in once and "  " not in once and once == once.strip()
    assert not any(unicodedata.category(character) == "Cc" for character in once)


def test_normalize_says_what_it_replaces():
    assert normalize(" a\x00b\t\r\n c\u3000 ") == "a b c"
    assert normalize("e\u0301 \ud800 \u2581") == "é \ufffd _"
    family = "\U0001f469\u200d\U0001f469\u200d\U0001f467\ufe0f"
    assert normalize(family) == family


@given(st.text(st.characters(max_codepoint=127)) | ANY_TEXT)
def test_normalize_has_a_short_way_for_plain_text_that_changes_nothing(text):
    slow = text
    for pattern, replacement in text_tokenizer._REPLACED:
        slow = pattern.sub(replacement, slow)
    assert normalize(text) == " ".join(unicodedata.normalize("NFC", slow).split())


# --- TextTokenizer ----------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(ANY_TEXT)
@example("<0x41> <unk>\u2585")
@example("")
def test_any_text_comes_back_as_its_normal_form(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.size for i in ids)
    assert not set(ids) & set(tokenizer.illegal_ids)
    assert tokenizer.decode(ids) == normalize(text)


@given(st.lists(st.integers(0, 399), max_size=30))
def test_any_ids_decode(tokenizer, ids):
    text = tokenizer.decode(ids)
    text.encode("utf-8")
    assert tokenizer.decode(np.array(ids, dtype=np.int64)) == text


def test_broken_bytes_read_as_replacement_and_leave_their_neighbours_readable(tokenizer):
    byte_ids = [1 + byte for byte in "木口".encode()]
    assert tokenizer.decode(byte_ids) == "木口"
    assert tokenizer.decode(byte_ids[:-1]) == "木\ufffd"
    assert tokenizer.decode(tokenizer.encode("fox") + [1 + 0xFF] + tokenizer.encode("hare")) == "fox\ufffd hare"
    assert tokenizer.decode(tokenizer.illegal_ids) == "\ufffd"


def test_an_id_that_is_not_text_is_refused(tokenizer, pretrained):
    for either in (tokenizer, pretrained):
        for stray in (-1, either.size):
            with pytest.raises(ValueError, match=rf"id {stray} is not text.*0\.\.{either.size - 1}"):
                either.decode([5, stray])


def test_training_shortens_captions_it_was_trained_on(tokenizer):
    assert tokenizer.size == 400
    text = captions(1)[0]
    assert len(tokenizer.encode(text)) < len(text) / 2


def test_same_captions_same_model_in_any_order(tokenizer):
    again = TextTokenizer.train(iter(captions(500)[::-1]), vocab_size=400)
    assert again.fingerprint() == tokenizer.fingerprint()
    other = TextTokenizer.train(captions(500), vocab_size=390)
    assert other.fingerprint() != tokenizer.fingerprint()


def test_training_is_silent(capfd):
    TextTokenizer.train(captions(50), vocab_size=330)
    assert capfd.readouterr() == ("", "")


def test_a_small_corpus_lowers_the_vocabulary_and_says_so(caplog):
    small = TextTokenizer.train(["a fox", "a fox in snow"], vocab_size=4096)
    assert 257 < small.size < 300
    assert f"lowered from 4096 to {small.size}" in caplog.text
    assert small.decode(small.encode("Ein Fuchs")) == "Ein Fuchs"


def test_of_captions_that_are_lists_the_first_text_is_read_and_of_other_values_none():
    tree = {"caption": "A ship.", "captions": {"poetic": ["O ship!", "O sea!"], "era": {"en": "A ship."}, "social": 3}}
    assert captions_of(tree, Config()) == {"plain": "A ship.", "poetic": "O ship!"}


def test_training_learns_from_captions_of_any_length():
    text = "x" * 70_000
    long = TextTokenizer.train([text], vocab_size=270)
    assert len(long.encode(text)) < len(text) / 8
    assert long.decode(long.encode(text)) == text


def test_rare_characters_are_spelt_in_bytes():
    texts = [text.replace("Z", "") for text in captions(300)] + ["Zoë"]
    byte_ids = range(1, 257)
    rare = TextTokenizer.train(texts, vocab_size=330, character_coverage=0.9995)
    assert set(rare.encode("Z")) & set(byte_ids)
    covered = TextTokenizer.train(texts, vocab_size=330, character_coverage=1.0)
    assert not set(covered.encode("Z")) & set(byte_ids)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 400, "at least one caption"),
        (["", " \n"], 400, "at least one caption"),
        (["\u2585"], 400, "can use none of the captions"),
        (captions(20), 260, r"vocab_size 260 is too small: .* take \d+\. Raise"),
        ("a fox", 400, "captions is the str 'a fox'"),
    ],
)
def test_what_cannot_be_trained_says_why(texts, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        TextTokenizer.train(texts, vocab_size=vocab_size)


def test_saved_then_loaded_is_the_original(tokenizer, tmp_path):
    path = tmp_path / "checkpoint" / "text_tokenizer.model"
    tokenizer.save(path)
    tokenizer.save(path)  # over itself
    loaded = TextTokenizer.load(path)
    texts = strange_captions(100)
    for twin in (loaded, pickle.loads(pickle.dumps(tokenizer))):
        assert (twin.size, twin.illegal_ids) == (tokenizer.size, tokenizer.illegal_ids) == (400, (0,))
        assert twin.fingerprint() == tokenizer.fingerprint()
        assert [twin.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing left aside
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_failed_save_leaves_what_was_there(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "text_tokenizer.model"
    path.write_bytes(b"before")

    def no_space(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        tokenizer.save(path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def foreign_model(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions(200)), model_writer=model, vocab_size=330, minloglevel=2,
        **{"model_type": "bpe", "bos_id": -1, "eos_id": -1, **options},
    )  # fmt: skip
    return model.getvalue()


def test_broken_and_foreign_files_are_refused(tokenizer, tmp_path):
    path = tmp_path / "text_tokenizer.model"
    with pytest.raises(FileNotFoundError, match=r"text_tokenizer\.model: .*TextTokenizer\.train"):
        TextTokenizer.load(path)
    with pytest.raises(ValueError, match=r"is a directory.*PretrainedTextTokenizer"):
        TextTokenizer.load(tmp_path)
    tokenizer.save(path)
    whole = path.read_bytes()
    broken = [b"", b"<html>404</html>", whole[:-1], whole[: len(whole) // 2]]
    broken += [whole[:-cut] for cut in range(2, 120)]  # one of these cuts falls between two fields and parses
    broken += [
        foreign_model(),
        foreign_model(byte_fallback=True),
        foreign_model(byte_fallback=True, unk_id=1, bos_id=0),
    ]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"text_tokenizer\.model is not a tokun text tokenizer .*copy it again"):
            TextTokenizer.load(path)


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    return auto_tokenizer(tokenizer, tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("coverage", [0.98, 1.0])
def test_transformers_gives_the_ids_and_the_text_of_sentencepiece(coverage, tmp_path):
    tokenizer = TextTokenizer.train(captions(500) + strange_captions(200, seed=1), vocab_size=600, character_coverage=coverage)
    exported = auto_tokenizer(tokenizer, tmp_path)
    texts = strange_captions(1000, seed=2)
    assert exported(texts)["input_ids"] == [tokenizer.encode(text) for text in texts]
    assert [exported.decode(tokenizer.encode(text)) for text in texts] == [normalize(text) for text in texts]


@given(text=ANY_TEXT)
@example(text="<eoc>")
def test_transformers_agrees_on_any_normalized_text(tokenizer, exported, text):
    ids = tokenizer.encode(text)
    # a text may spell a special token, such as "<eoc>": as words of a caption its pieces are meant, not the token
    assert exported(normalize(text), split_special_tokens=True)["input_ids"] == ids
    assert exported.decode(ids) == normalize(text)


@pytest.mark.parametrize("alphabet", ["ab", "abc", "a-."])
def test_merges_tie_as_sentencepiece_ties_them(alphabet):
    """Few letters, all repetition: where two splits of one piece overlap, if anywhere."""
    rng = random.Random(0)
    words = ["".join(rng.choices(alphabet, k=rng.randint(1, 12))) for _ in range(1000)]
    tokenizer = TextTokenizer.train([" ".join(words[i : i + 4]) for i in range(0, 1000, 4)], vocab_size=420)
    backend = tokenizer._backend()
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(2000)]
    texts += [text[:3] * 12 + text[3:7] * 5 for text in texts]
    assert [encoding.ids for encoding in backend.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]


def test_added_tokens_follow_the_text_in_order_and_stand_round_captions(tokenizer, exported):
    size = tokenizer.size
    assert exported.convert_tokens_to_ids(ADDED) == list(range(size, size + len(ADDED)))
    assert len(exported) == size + len(ADDED)
    assert (exported.bos_token, exported.eos_token, exported.pad_token) == ("<bos>", "<eos>", "<pad>")
    of = dict(zip(ADDED, range(size, size + len(ADDED))))
    ids = exported("<bos><boi><image:1><eoi><boc>A fox in the snow.<eoc><eos>")["input_ids"]
    caption = tokenizer.encode("A fox in the snow.")
    assert ids == [
        *(of[t] for t in ("<bos>", "<boi>", "<image:1>", "<eoi>", "<boc>")),
        *caption,
        of["<eoc>"],
        of["<eos>"],
    ]
    assert exported.decode(ids, skip_special_tokens=True) == "A fox in the snow."
    # spelt out in a caption it is plain text to us, and to transformers when told so
    assert exported("a <boc>", split_special_tokens=True)["input_ids"] == tokenizer.encode("a <boc>")
    assert max(tokenizer.encode("a <boc>")) < size


def test_exported_again_by_transformers_it_is_the_same(tokenizer, exported, tmp_path):
    from transformers import AutoTokenizer

    exported.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    text = captions(1)[0]
    assert again(text)["input_ids"] == tokenizer.encode(text)
    assert again.convert_tokens_to_ids(ADDED) == exported.convert_tokens_to_ids(ADDED)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (["<bos>", "<eos>"], r"\['<pad>'\] are missing from added_tokens"),
        ([*ADDED, "<boi>"], "twice"),
        ([*ADDED, "<0x41>"], r"already has \['<0x41>'\]"),
    ],
)
def test_added_tokens_that_cannot_stand_are_refused(tokenizer, tmp_path, added, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.save_hf(tmp_path, added, **NAMED)
    assert not list(tmp_path.iterdir())


# --- PretrainedTextTokenizer ------------------------------------------------------------------------------------------


@given(text=ANY_TEXT)
@example("<|endoftext|>")
def test_a_pretrained_byte_level_tokenizer_is_lossless_and_emits_no_special(pretrained, text):
    text = text.replace("!", "")  # this one's unk, by name
    ids = pretrained.encode(text)
    assert not set(ids) & set(pretrained.illegal_ids)
    assert pretrained.decode(ids) == normalize(text)


def test_a_pretrained_tokenizer_keeps_its_ids(pretrained):
    backend = byte_level_backend(captions(300))
    assert pretrained.size == backend.get_vocab_size() == 380
    assert pretrained.illegal_ids == tuple(sorted([0, backend.token_to_id("!")]))
    for text in captions(20):
        assert pretrained.encode(text) == backend.encode(text).ids


def test_a_pretrained_tokenizer_saved_then_loaded_is_the_original(pretrained, tmp_path):
    pretrained.save(tmp_path / "text")
    loaded = PretrainedTextTokenizer.load(tmp_path / "text")
    for twin in (loaded, pickle.loads(pickle.dumps(pretrained))):
        assert (twin.size, twin.illegal_ids) == (pretrained.size, pretrained.illegal_ids)
        assert twin.fingerprint() == pretrained.fingerprint()
        assert twin.encode("<|endoftext|> fox") == pretrained.encode("<|endoftext|> fox")
    assert PretrainedTextTokenizer(byte_level_backend(captions(9))).fingerprint() != pretrained.fingerprint()


def test_a_pretrained_tokenizer_is_exported_with_our_tokens(pretrained, tmp_path):
    exported = auto_tokenizer(pretrained, tmp_path)
    texts = [text.replace("!", "") for text in strange_captions(200)]
    assert exported(texts)["input_ids"] == [pretrained.encode(text) for text in texts]
    assert exported.convert_tokens_to_ids(ADDED) == list(range(pretrained.size, pretrained.size + len(ADDED)))
    assert (exported.bos_token, exported.eos_token, exported.pad_token) == ("<bos>", "<eos>", "<pad>")
    assert pretrained.encode("<bos>") != exported("<bos>")["input_ids"]  # the export did not touch the original
    with pytest.raises(ValueError, match="already has"):
        pretrained.save_hf(tmp_path, [*ADDED, "<|endoftext|>"], **NAMED)


def test_broken_pretrained_files_are_refused(pretrained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*from_pretrained"):
        PretrainedTextTokenizer.load(tmp_path)
    pretrained.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_bytes()
    for content in (b"", b"{}", b"\xff\xfe", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json is not a Hugging Face tokenizer"):
            PretrainedTextTokenizer.load(tmp_path)


def test_ids_with_holes_are_refused():
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match="2 tokens but ids up to 7"):
        PretrainedTextTokenizer(Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a")))
