"""Captions to ids and back with sentencepiece: training, encoding, decoding. Knows no images, no control tokens, no torch.

    tokenizer = TextTokenizer.train(captions, vocab_size=4096)
    tokenizer.decode(tokenizer.encode(caption)) == normalize(caption)      # for any Unicode string

Two classes, one interface (size, illegal_ids, encode, decode, save, load, fingerprint, save_hf):

  TextTokenizer             our own sentencepiece BPE with byte fallback: no caption is unencodable
  PretrainedTextTokenizer   any fast Hugging Face tokenizer, for generators that start from a pretrained language model

Ids run from 0 to size - 1. `vocabulary.py` defines what follows them in the joint vocabulary (controls, image codes);
`save_hf` only takes their names.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import sentencepiece

from tokun.utils import network_access
from tokun.utils.errors import UserError, reading
from tokun.utils.files import write_bytes

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)

SPACE_MARK = "\u2581"  # ▁: how sentencepiece writes a space; it writes one before the first word too
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not UTF-8
TRAINING_CHUNK = 4000  # characters; longer captions are split for training: sentencepiece silently drops overlong lines
PROBE = "No 1863: \u201ca  \ufb01ne caf\u00e9\u201d, \u6728\u53e3\u6728\u7248 \U0001f5bc\ufe0f\u200d <unk> <0x41>"


# --- What a caption is ------------------------------------------------------------------------------------------------

_REPLACED = ((re.compile("[\x00-\x1f\x7f-\x9f]"), " "), (re.compile("[\ud800-\udfff]"), REPLACEMENT),
             (re.compile(SPACE_MARK), "_"))  # fmt: skip


def normalize(text: str) -> str:
    """Normalise a caption before it is tokenised. Idempotent and total: any `str` in, a tokenisable `str` out.

    Control characters (NUL, tab, newline, C1) become spaces, lone surrogates U+FFFD, and "▁" (sentencepiece's own mark)
    "_". Then NFC; runs of whitespace of any kind become one space; the ends are stripped. Joiners and variation
    selectors stay: emoji need them.
    """
    if text.isascii() and text.isprintable():  # nothing below applies
        return " ".join(text.split())
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return " ".join(unicodedata.normalize("NFC", text).split())


# --- Our own tokenizer ------------------------------------------------------------------------------------------------


class TextTokenizer:
    """text <-> ids 0..size-1, by sentencepiece BPE: id 0 unknown (never emitted), 1..256 the bytes, then pieces.

    size         number of ids
    illegal_ids  ids a sampler must never emit
    """

    def __init__(self, model: bytes) -> None:
        """`model`: the bytes of a model made by `train`. Raises UserError for any other."""
        self._model = bytes(model)
        self._processor = _open_model(self._model)
        self.size: int = self._processor.get_piece_size()
        self.illegal_ids: tuple[int, ...] = tuple(
            i for i in range(self.size) if self._processor.is_unknown(i) or self._processor.is_control(i)
        )
        self._bytes = [self._bytes_of(i) for i in range(self.size)]
        if self.decode(self._processor.encode(PROBE)) != PROBE:
            raise UserError("it rewrites text or is incomplete, so captions would not survive encoding and decoding")

    @classmethod
    def train(cls, captions: Iterable[str], *, vocab_size: int, character_coverage: float = 0.9995) -> TextTokenizer:
        """Train BPE on `captions`. The same captions, in any order, give the same model.

        vocab_size          total number of ids, including the unknown and the 256 bytes. Lowered, with a log message, if
                            the captions do not yield so many pieces
        character_coverage  share of the text whose characters get a piece of their own; rarer ones are encoded as bytes

        Raises UserError if there is no text, or if `vocab_size` is too small for the bytes and the characters.
        """
        if isinstance(captions, str):
            raise UserError(f"captions is the str {captions[:40]!r}: pass an iterable of them, [caption] for a single one")
        lines = [text[start : start + TRAINING_CHUNK] for text in map(normalize, captions) for start in range(0, len(text), TRAINING_CHUNK)]
        if not lines:
            raise UserError("no caption has any text: a text tokenizer needs at least one caption to train on")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=False,  # too few pieces in the corpus: a smaller vocabulary, not an error
                character_coverage=character_coverage,
                byte_fallback=True,
                normalization_rule_name="identity",  # `normalize` has already run
                remove_extra_whitespaces=False,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                max_sentence_length=4 * TRAINING_CHUNK,  # bytes
                num_threads=1,  # stored in the model, so it must not depend on the machine
                minloglevel=2,
            )
        except RuntimeError as error:
            too_small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
            if too_small:
                raise UserError(
                    f"vocab_size {vocab_size} is too small: the bytes and the characters of these captions alone take "
                    f"{too_small[1]}. Raise vocab_size, or lower character_coverage ({character_coverage})"
                ) from None
            if "!sentences_.empty()" in str(error):
                raise UserError(f"sentencepiece can use none of the captions; the first is {lines[0][:80]!r}") from None
            raise
        tokenizer = cls(model.getvalue())
        if tokenizer.size < vocab_size:
            logger.warning("text vocabulary lowered from %d to %d: these captions yield no more pieces", vocab_size, tokenizer.size)
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of `normalize(text)`; none for text that is only whitespace."""
        return self._processor.encode(normalize(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`: `decode(encode(t)) == normalize(t)`.

        Ids sampled from a model may not form valid UTF-8: each broken run decodes to U+FFFD and its neighbours stay
        readable. Such text may not be normalized. Raises UserError for an id outside 0..size-1.
        """
        pieces = []
        for i in map(int, ids):
            if not 0 <= i < self.size:
                raise UserError(f"id {i} is not text: this tokenizer has ids 0..{self.size - 1}")
            pieces.append(self._bytes[i])
        # Marks become spaces only at the end: a mark too rare for a piece of its own is three byte pieces.
        return b"".join(pieces).decode("utf-8", errors="replace").replace(SPACE_MARK, " ").removeprefix(" ")

    def _bytes_of(self, i: int) -> bytes:
        """The UTF-8 bytes of id `i`."""
        if i in self.illegal_ids:
            return REPLACEMENT.encode()
        piece = self._processor.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if self._processor.is_byte(i) else piece.encode()

    def save(self, path: Path) -> None:
        """Write the sentencepiece model to the file `path`, atomically."""
        write_bytes(Path(path), self._model)

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """Read what `save` wrote. Raises FileNotFoundError if it is missing, UserError if it is anything else."""
        path = Path(path)
        way_out = "copy it again from its checkpoint, or train one with TextTokenizer.train"
        if not path.exists():
            raise FileNotFoundError(f"no text tokenizer at {path}: {way_out}")
        if path.is_dir():
            raise UserError(f"{path} is a directory, not a sentencepiece model; PretrainedTextTokenizer.load reads those")
        try:
            return cls(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path} is not a tokun text tokenizer ({error}): {way_out}") from None

    def fingerprint(self) -> str:
        """sha256 of the model's bytes, in hex: equal fingerprints mean equal ids."""
        return hashlib.sha256(self._model).hexdigest()

    def save_hf(self, directory: Path, added_tokens: Sequence[str], *, bos: str, eos: str, pad: str) -> None:
        """Write the tokenizer for Hugging Face: `AutoTokenizer.from_pretrained(directory)` gives the ids of `encode`.

        `added_tokens` become special tokens with ids size, size + 1, … in order; `bos`, `eos` and `pad` are
        among them. No token is added around the text. Three differences from `encode` / `decode` remain:
        an added token spelt out in a text is read as that token (`split_special_tokens=True` turns that off); NFC is that
        of Unicode 9.0, so unnormalized text may differ in newer combining marks; and in a run of byte pieces that is not
        UTF-8, every byte decodes to U+FFFD.
        """
        _write_hf(self._backend(), Path(directory), added_tokens, bos=bos, eos=eos, pad=pad)

    def _backend(self) -> tokenizers.Tokenizer:
        """The same model in the `tokenizers` library."""
        from tokenizers import Tokenizer, decoders, models, normalizers

        names = [self._processor.id_to_piece(i) for i in range(self.size)]
        backend = Tokenizer(
            models.BPE(
                vocab={name: i for i, name in enumerate(names)},
                merges=self._merges(),
                unk_token=names[0],
                byte_fallback=True,
                fuse_unk=True,
            )
        )
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), normalizers.Replace(" ", SPACE_MARK)])
        backend.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(SPACE_MARK, " "), decoders.Strip(" ", 1, 0)]
        )
        return backend

    def _merges(self) -> list[tuple[str, str]]:
        """The merges, first merge first.

        sentencepiece stores no merges: it joins the two neighbours that form the piece with the highest score, however
        that piece was learned. So every split of a piece into two pieces is a merge, at the piece's rank.
        """
        scores = {
            self._processor.id_to_piece(i): self._processor.get_score(i)
            for i in range(self.size)
            if not (i in self.illegal_ids or self._processor.is_byte(i))
        }
        return [
            (piece[:cut], piece[cut:])
            for piece in sorted(scores, key=scores.__getitem__, reverse=True)
            for cut in range(1, len(piece))
            if piece[:cut] in scores and piece[cut:] in scores
        ]


# --- A pretrained language model's tokenizer --------------------------------------------------------------------------


class PretrainedTextTokenizer:
    """The same interface over a fast Hugging Face tokenizer, for a generator that starts from a pretrained model.

    `decode(encode(t)) == normalize(t)` only where that tokenizer is lossless: byte-level BPE and sentencepiece with
    byte fallback are (GPT-2, Qwen, Llama), an uncased or a WordPiece one is not.

    size         number of ids, including its own special and added tokens
    illegal_ids  its special tokens
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """`backend`: the `tokenizers` object; it is copied."""
        self._backend = _copy(backend)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True  # "<|endoftext|>" in a caption is text, not the end
        self.size: int = self._backend.get_vocab_size(with_added_tokens=True)
        last = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if last + 1 != self.size:
            raise UserError(
                f"this tokenizer has {self.size} tokens but ids up to {last}, and tokun's vocabulary has no gaps: "
                "choose another pretrained model"
            )
        self.illegal_ids: tuple[int, ...] = tuple(
            sorted(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)
        )

    def __reduce__(self):
        return type(self), (self._backend,)  # through __init__: a pickled backend loses encode_special_tokens

    @classmethod
    def from_pretrained(cls, id_or_path: str | Path) -> PretrainedTextTokenizer:
        """The tokenizer of a model on the Hugging Face hub, or in a local directory. Raises UserError if it is a slow one."""
        from transformers import AutoTokenizer

        with reading(f"the tokenizer of {id_or_path}"), network_access.fetched(id_or_path, "the pretrained model"):
            tokenizer = AutoTokenizer.from_pretrained(str(id_or_path))
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(f"{id_or_path} has no fast tokenizer (tokenizer.json): choose a model that has one")
        backend = _copy(tokenizer.backend_tokenizer)
        # A token may be special by name alone (unk_token in tokenizer_config.json); mark it where `save` keeps it.
        ids = backend.get_vocab(with_added_tokens=True)
        backend.add_special_tokens([token for token in tokenizer.all_special_tokens if token in ids])
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        """The ids of `normalize(text)`, without special tokens."""
        return self._backend.encode(normalize(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens spelt out. Raises UserError for an id outside 0..size-1."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.size:
                raise UserError(f"id {i} is not text: this tokenizer has ids 0..{self.size - 1}")
        return self._backend.decode(ids, skip_special_tokens=False)

    def save(self, directory: Path) -> None:
        """Write `directory`/tokenizer.json, atomically."""
        write_bytes(Path(directory) / "tokenizer.json", self._backend.to_str().encode())

    @classmethod
    def load(cls, directory: Path) -> PretrainedTextTokenizer:
        """Read what `save` wrote. Raises FileNotFoundError if it is missing, UserError if it is anything else."""
        from tokenizers import Tokenizer

        path = Path(directory) / "tokenizer.json"
        way_out = "copy it again from its checkpoint, or call PretrainedTextTokenizer.from_pretrained"
        if not path.exists():
            raise FileNotFoundError(f"no text tokenizer at {path}: {way_out}")
        try:
            backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare `Exception`
            raise UserError(f"{path} is not a Hugging Face tokenizer ({error}): {way_out}") from None
        return cls(backend)

    def fingerprint(self) -> str:
        """sha256 of the vocabulary and of the ids of a probe text, in hex.

        Not of tokenizer.json: the library's releases write the same tokenizer differently.
        """
        vocabulary = sorted(self._backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        return hashlib.sha256(json.dumps([vocabulary, self.illegal_ids, self.encode(PROBE)]).encode()).hexdigest()

    def save_hf(self, directory: Path, added_tokens: Sequence[str], *, bos: str, eos: str, pad: str) -> None:
        """As `TextTokenizer.save_hf`. The pretrained model's chat template and its bos, eos and pad are dropped."""
        _write_hf(_copy(self._backend), Path(directory), added_tokens, bos=bos, eos=eos, pad=pad)


def text_tokenizer_at(path: Path) -> TextTokenizer | PretrainedTextTokenizer:
    """Load what either class wrote: a file is ours, a folder a pretrained one. Raises what their `load` raises."""
    return PretrainedTextTokenizer.load(path) if path.is_dir() else TextTokenizer.load(path)


# --- Files ------------------------------------------------------------------------------------------------------------


def _open_model(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """The processor for `model`. Raises UserError unless it has the layout of `TextTokenizer.train`."""
    if not model:
        raise UserError("it is empty")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise UserError("it is not a sentencepiece model, or is truncated") from None
    size = processor.get_piece_size()
    if size < 257 or processor.unk_id() != 0 or not all(map(processor.is_byte, range(1, 257))):
        raise UserError("it lacks the bytes at ids 1..256, so that some captions could not be encoded")
    return processor


def _copy(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(backend.to_str())


def _write_hf(backend: tokenizers.Tokenizer, directory: Path, added_tokens: Sequence[str], *, bos: str, eos: str, pad: str) -> None:
    """Add `added_tokens` to `backend` (in place) and write the three files that `AutoTokenizer` reads."""
    from tokenizers import AddedToken, Regex, normalizers

    size = backend.get_vocab_size(with_added_tokens=True)
    known = backend.get_vocab(with_added_tokens=True)
    clashes = [token for token in added_tokens if token in known]
    if clashes:
        raise UserError(f"the text tokenizer already has {clashes[:5]}: give those added tokens other names")
    if len(set(added_tokens)) != len(added_tokens):
        raise UserError("added_tokens holds a token twice: names must be distinct")
    missing = [token for token in (bos, eos, pad) if token not in added_tokens]
    if missing:
        raise UserError(f"{missing} are missing from added_tokens: bos, eos and pad must be in it")

    # `normalize` in terms of the library; surrogates cannot reach it
    steps = [
        normalizers.Replace(Regex(r"\p{Cc}"), " "),
        normalizers.Replace(SPACE_MARK, "_"),
        normalizers.NFC(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added_tokens])
    assert [backend.token_to_id(token) for token in added_tokens] == list(range(size, size + len(added_tokens)))

    tokenizer = json.loads(backend.to_str())
    tokenizer["post_processor"] = None  # a pretrained tokenizer's may prepend its own bos
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    # transformers 5 writes "TokenizersBackend" here. Both 4 and 5 read this older name, and neither then rebuilds
    # the tokenizer as the class that config.json's model_type suggests.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config), ("special_tokens_map.json", named)):
        write_bytes(directory / name, json.dumps(content, ensure_ascii=False, indent=2).encode())
