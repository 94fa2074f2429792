"""Promises of tokun/inference/model.py: one seed, one pair. The model is the tiny random one of fixtures.py."""

import dataclasses
import json
import pickle
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import tokun
from tokun.inference import conditional_generation, folders
from tokun.inference.load import load
from tokun.inference.model import Tokun, count_tags
from tokun.tokenizers import sequences
from tokun.tokenizers.text import normalize
from tokun.tokenizers.vocabulary import Tags, Vocabulary
from tokun.utils.errors import UserError

PROMPT = "  Two\tships   on a dark ground — “café” "


def tokens(pairs):
    """What must agree token for token."""
    return [(p.seed, p.index, p.tags, p.codes, p.caption_ids, p.caption) for p in pairs]


# --- one seed, one pair ---------------------------------------------------------------------------------------------


def test_same_seed_same_pair_for_any_batch_size(tiny_model):
    whole = tiny_model.sample(3, n=16)
    assert len({tuple(p.codes) for p in whole}) == 16 and [p.index for p in whole] == list(range(16))
    for batch_size in (1, 3, 16, 100):
        pairs = tiny_model.sample(3, n=16, batch_size=batch_size)
        assert tokens(pairs) == tokens(whole)
        assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(pairs, whole))
    assert tokens(tiny_model.sample(3, n=4)) == tokens(whole[:4])
    assert tokens(tiny_model.sample(3, indices=[11, 2])) == tokens([whole[11], whole[2]])


def test_same_seed_same_pair_under_every_setting(tiny_model):
    guided = {"style": "etching", "guidance_scale": 2.0, "batch_size": 2}
    for options in (guided, {"prompt": PROMPT, "top_k": 9}, {"temperature": 1.3, "top_p": 0.9}):
        a, b = tiny_model.sample(9, n=5, **options), tiny_model.sample(9, n=3, **{**options, "batch_size": 1})
        assert tokens(a[:3]) == tokens(b)


def test_a_call_is_sample_zero(tiny_model):
    image, caption = tiny_model(7)
    pair = tiny_model.sample(7, n=1)[0]
    assert isinstance(image, Image.Image) and image.size == (32, 32) and image.mode == "L"
    assert (image.tobytes(), caption) == (pair.image.tobytes(), pair.caption)


def test_other_seeds_are_other_pairs_and_torchs_generator_is_untouched(tiny_model):
    state = torch.get_rng_state()
    assert tokens(tiny_model.sample(1, n=2)) != tokens(tiny_model.sample(2, n=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_pair_has_all_its_codes_and_a_caption_of_text(tiny_model):
    v = tiny_model.vocabulary
    for temperature in (0.0, 1.0, 3.0):
        for pair in tiny_model.sample(0, n=16, temperature=temperature):
            assert len(pair.codes) == 16 and all(0 <= c < 64 for c in pair.codes)
            assert 1 <= len(pair.caption_ids) <= v.max_text
            assert all(v.class_of(i) == "text" and i not in v.illegal_text for i in pair.caption_ids)


def test_a_prompt_is_what_is_drawn(tiny_model):
    pairs = tiny_model.sample(5, n=3, prompt=PROMPT)
    assert {p.caption for p in pairs} == {normalize(PROMPT)}
    assert {tuple(p.caption_ids) for p in pairs} == {tuple(tiny_model.encode_text(PROMPT))}
    assert len({tuple(p.codes) for p in pairs}) == 3
    assert [p.codes for p in pairs] != [p.codes for p in tiny_model.sample(5, n=3, prompt="a tree")]


def test_tags_are_drawn_as_often_as_in_training_or_as_asked(tiny_model):
    tags = tiny_model.choose_tags(torch.tensor([[(i + 0.5) / 600, 0.5, 0.5, 0.5] for i in range(600)]), Tags())
    count = lambda style, subject: sum((t.style, t.subject) == (style, subject) for t in tags)  # noqa: E731
    assert [count("engraving", "scenery"), count("etching", "shapes"), count("etching", "")] == [300, 200, 100]
    assert all(t.register == "plain" and t.grid == (4, 4) for t in tags)
    for wanted in (Tags("etching"), Tags(subject="scenery"), Tags("engraving", "shapes", "poetic")):
        (chosen,) = tiny_model.choose_tags(torch.full((1, 4), 0.4), wanted)
        assert all(not getattr(wanted, k) or getattr(wanted, k) == getattr(chosen, k) for k in ("style", "subject", "register"))
    assert tiny_model.sample(1, n=1, style="Etching ", register="era")[0].tags.names()[:1] == ["<style:etching>"]


def test_tags_too_rare_for_the_vocabulary_stay_untagged(tiny_model):
    m = tiny_model
    rare = Tokun(m.image_tokenizer, m.text_tokenizer, m.vocabulary, m.generator, tag_counts=[("engraving", "comets", 1)])
    assert rare.sample(1, n=1)[0].tags == Tags("engraving", "", "plain", (4, 4))


def test_the_record_is_plain_json(tiny_model):
    pair = tiny_model.sample(8, n=1)[0]
    record = json.loads(json.dumps(pair.record()))
    assert record["codes"] == pair.codes and record["caption"] == pair.caption and record["seed"] == 8
    assert record["pmi"] == pytest.approx(pair.pmi, abs=1e-3)


def test_captions_repeat_no_word_where_that_is_asked_for_or_the_checkpoints_own_setting(tiny_model, text_tokenizer):
    texts = {
        i: text_tokenizer.decode([*text_tokenizer.encode("a"), i])
        for i in range(text_tokenizer.size)
        if i not in text_tokenizer.illegal_ids
    }
    constraints = tiny_model.constraints_without_repeats
    assert not tiny_model.constraints.word_starts, "they cost a pass over all pieces, and are not needed without `no_repeats`"
    assert set(constraints.word_starts) == {i for i, text in texts.items() if text.startswith("a ")} and len(constraints.word_starts) > 20
    seen = {i: text[1:].strip() for i, text in texts.items()}
    assert set(constraints.marks) == {
        i for i, text in seen.items() if text and not any(letter.isalnum() or letter in ".\ufffd" for letter in text)
    }
    assert {text_tokenizer.encode(f"a{mark}")[-1] for mark in ",-"} <= set(constraints.marks)
    asked = [pair.caption for pair in tiny_model.sample(0, 8, text_temperature=0.1, no_repeats=True)]
    own = dataclasses.replace(tiny_model, defaults=dataclasses.replace(tiny_model.defaults, no_repeats=True))
    assert asked == [pair.caption for pair in own.sample(0, 8, text_temperature=0.1)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 0}, "n is 0"), ({"batch_size": 0}, "batch_size is 0"), ({"seed": -1}, "seed is -1"), ({"seed": 1.5}, "seed is 1.5"),
        ({"temperature": -1}, "temperature is -1"), ({"top_p": 0}, "top_p is 0"), ({"top_k": -1}, "top_k is -1"),
        ({"guidance_scale": -1}, "guidance_scale is -1"), ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"text_guidance_scale": -1}, "text_guidance_scale is -1"),
        ({"style": "cubism"}, "style can be: engraving, etching"), ({"subject": "cats"}, "subject can be: scenery, shapes"),
        ({"register": "slang"}, "register can be: plain, poetic"), ({"prompt": " \n"}, "holds no text"), ({"prompt": ""}, "holds no text"),
        ({"prompt": "word " * 99}, "this model takes 24"), ({"indices": [-1]}, "must be integers from 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_the_way_out(tiny_model, options, words):
    with pytest.raises(ValueError, match=words):
        tiny_model.sample(**options)


@pytest.mark.parametrize("seed", ["x", "7", 1.5, 7.0, True, None, -1, 2**63, 2**70, float("nan")])
def test_a_seed_that_is_no_whole_number_is_refused_wherever_one_is_given(tiny_model, seed):
    picture = Image.new("L", (32, 32))
    inverted = conditional_generation.Inverted(torch.zeros(tiny_model.slots.size), Tags(), [], 0)
    for call in (
        lambda: tiny_model(seed), lambda: tiny_model.sample(seed, n=2), lambda: tiny_model.best_of(seed, 1, 2),
        lambda: tiny_model.interpolate(1, seed),
        lambda: tiny_model.caption(picture, seed=seed), lambda: tiny_model.ask(picture, "what?", seed=seed),
        lambda: tiny_model.vary(inverted, 0.1, seed=seed),
        lambda: tiny_model.rewrite("a ship", "poetic", seed=seed), lambda: tiny_model.invert(picture, "a ship", seed=seed),
        lambda: tiny_model.complete(picture, "top", seed=seed),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^seed is {re.escape(repr(seed))}; it must be an integer from 0 to"):
            call()


def test_whole_numbers_of_every_kind_are_seeds(tiny_model):
    (pair,), (other,) = tiny_model.sample(np.int32(3), n=1), tiny_model.sample(3, n=1)
    assert tokens([pair]) == tokens([other]) and json.dumps(pair.record()) == json.dumps(other.record())
    assert tiny_model(2**63 - 1)[1]


# --- scoring --------------------------------------------------------------------------------------------------------


def test_pmi_is_the_difference_of_the_captions_likelihoods(tiny_model):
    pairs = tiny_model.sample(4, n=5)
    tags, captions, codes = ([getattr(p, name) for p in pairs] for name in ("tags", "caption_ids", "codes"))
    alone, given = tiny_model.caption_nll(tags, captions), tiny_model.caption_nll(tags, captions, codes)
    assert tiny_model.pmi(tags, captions, codes) == [a - g for a, g in zip(alone, given)]
    for pair, a, g in zip(pairs, alone, given):
        assert pair.caption_nll == pytest.approx(g, abs=1e-3)
        assert pair.pmi == pytest.approx(a - g, abs=2e-3)
        assert min(a, g, pair.image_nll) > 0
    one_by_one = [tiny_model.caption_nll([t], [c], [k])[0] for t, c, k in zip(tags, captions, codes)]
    assert given == pytest.approx(one_by_one, abs=1e-3)
    assert given == pytest.approx(tiny_model.caption_nll(tags, captions, codes, batch_size=2), abs=1e-3)


def test_a_given_prompt_is_scored_like_a_sampled_caption(tiny_model):
    pair = tiny_model.sample(4, n=1, prompt="a tree")[0]
    assert pair.caption_nll == pytest.approx(tiny_model.caption_nll([pair.tags], [pair.caption_ids], [pair.codes])[0], abs=1e-3)


# --- files ----------------------------------------------------------------------------------------------------------


def test_saved_then_loaded_samples_the_same(tiny_model, checkpoint_folder):
    loaded = load(checkpoint_folder, device="cpu")
    assert tokens(loaded.sample(11, n=5)) == tokens(tiny_model.sample(11, n=5))
    assert loaded.tag_counts == tiny_model.tag_counts and loaded.defaults == tiny_model.defaults
    assert not loaded.generator.training and not loaded.image_tokenizer.training
    assert tokun.load is load


def test_a_run_folder_is_as_good_as_its_checkpoint(checkpoint_folder):
    assert load(checkpoint_folder.parent, device="cpu").vocabulary == load(str(checkpoint_folder), device="cpu").vocabulary


def test_the_folder_holds_no_pickle_and_transformers_loads_the_generator(tiny_model, checkpoint_folder):
    names = {str(p.relative_to(checkpoint_folder)) for p in checkpoint_folder.rglob("*") if p.is_file()}
    assert {"README.md", "vocabulary.json", "sampling.json", "text_tokenizer.model", "image_tokenizer/config.json",
            "image_tokenizer/model.safetensors", "generator/config.json", "generator/model.safetensors",
            "generator/tokenizer.json"} <= names  # fmt: skip
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pth", ".pkl"))]
    model = AutoModelForCausalLM.from_pretrained(checkpoint_folder / "generator")
    ids = torch.arange(30)[None]
    assert torch.equal(model(input_ids=ids).logits, tiny_model.generator(input_ids=ids).logits)


def test_auto_tokenizer_gives_the_same_ids(tiny_model, checkpoint_folder, toy_captions):
    tokenizer, v = AutoTokenizer.from_pretrained(checkpoint_folder / "generator"), tiny_model.vocabulary
    for caption in [*toy_captions[:50], PROMPT, "木口木版 🦊"]:
        assert tokenizer(caption)["input_ids"] == tiny_model.text_tokenizer.encode(caption)
    assert tokenizer.convert_tokens_to_ids(v.added_tokens) == list(range(v.text_size, v.size)) and len(tokenizer) == v.size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == tuple(map(v.id, ("<bos>", "<eos>", "<pad>")))
    packed = sequences.pack_joint(v, Tags("engraving"), list(range(16)), tiny_model.encode_text("a tree")).input_ids
    spelt = "".join(tokenizer.convert_ids_to_tokens(packed[:21])) + "a tree<eoc><eos>"
    assert tokenizer(spelt)["input_ids"] == packed


def test_saving_in_half_precision_changes_nothing_here_and_halves_the_file(tiny_model, checkpoint_folder, tmp_path):
    before = {k: t.clone() for k, t in [*tiny_model.generator.named_parameters(), *tiny_model.generator.named_buffers()]}
    tiny_model.save(tmp_path, dtype=torch.bfloat16)
    for name, tensor in [*tiny_model.generator.named_parameters(), *tiny_model.generator.named_buffers()]:
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    state = safetensors.torch.load_file(tmp_path / "generator" / "model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    half = load(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert half.generator.dtype == torch.bfloat16 and len(half.sample(1, n=2)) == 2
    moved = load(checkpoint_folder, device="cpu").to(dtype=torch.bfloat16)  # the same model, cast after loading
    assert tokens(moved.sample(1, n=2)) == tokens(half.sample(1, n=2))


@pytest.fixture
def copied(checkpoint_folder, tmp_path):
    shutil.copytree(checkpoint_folder, tmp_path / "c")
    return tmp_path / "c"


FILES = ["vocabulary.json", "sampling.json", "text_tokenizer.model", "image_tokenizer/config.json", "image_tokenizer/model.safetensors",
         "generator/config.json", "generator/model.safetensors", "generator/tokenizer.json"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        load(copied, device="cpu")
    assert name.rsplit("/")[-1] in str(error.value) and str(copied) in str(error.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "garbage"])
def test_a_broken_file_is_an_error_that_names_it(copied, name, damage):
    content = (copied / name).read_bytes()
    (copied / name).write_bytes({"cut": content[: len(content) * 2 // 3], "empty": b"", "garbage": bytes(range(128, 256))}[damage])
    with pytest.raises(ValueError) as error:
        load(copied, device="cpu")
    assert str(copied / name.split("/")[0]) in str(error.value)


def test_weights_that_are_not_all_there_are_refused(copied):
    path = copied / "generator" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    del state["model.layers.1.mlp.down_proj.weight"]
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"generator lacks the weights .*layers\.1\.mlp\.down_proj"):
        load(copied, device="cpu")


class Intruder:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return open, (self.trace, "w")


@pytest.mark.parametrize("part", ["generator", "image_tokenizer"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_in_place_of_safetensors_is_refused_and_never_run(copied, tmp_path, part, name, write):
    (copied / part / "model.safetensors").unlink()
    write(Intruder(tmp_path / "trace"), copied / part / name)
    with pytest.raises(ValueError, match=rf"{part}/{name} is a pickle, which can run any code .*safetensors"):
        load(copied, device="cpu")
    assert not (tmp_path / "trace").exists()


def test_code_that_comes_with_a_checkpoint_is_not_run(copied, tmp_path):
    config = json.loads((copied / "generator" / "config.json").read_text())
    config |= {"model_type": "intruder", "auto_map": {"AutoConfig": "intruder.Config", "AutoModelForCausalLM": "intruder.Model"}}
    (copied / "generator" / "config.json").write_text(json.dumps(config))
    (copied / "generator" / "intruder.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"generator cannot be read"):
        load(copied, device="cpu")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"styles": ["etching", "engraving"]}, "<style:etching> has id"), ({"styles": ["engraving"]}, "<subject:scenery> has id"),
        ({"grids": [[2, 6], [4, 4]]}, "<grid:2x6> has id"), ({"codebook_size": 63}, "it ends at id"),
        ({"codebook_size": 65}, "<image:64> has id"),
        ({"text_size": 300}, "<pad> has id 300 there"), ({"max_texts": 9}, "is not a vocabulary"), ({"max_text": 0}, "max_text is 0"),
        ({"max_text": "64"}, "max_text is '64'"),
        ({"max_text": 10**9}, "speaks of 1000000016 codes and pieces"), ({"codebook_size": None}, "codebook_size is None"),
        ({"illegal_text": [5000]}, "illegal_text"),
    ],
)  # fmt: skip
def test_a_vocabulary_that_does_not_match_is_refused(copied, tiny_model, change, words):
    (copied / "vocabulary.json").write_text(json.dumps({**tiny_model.vocabulary.to_dict(), **change}))
    with pytest.raises(ValueError, match=rf"vocabulary\.json.*{words}"):
        load(copied, device="cpu")


def test_a_swapped_image_tokenizer_is_refused_with_both_fingerprints(copied, tiny_model):
    path = copied / "image_tokenizer" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    state["decoder.last.bias"] += 0.25
    safetensors.torch.save_file(state, path)
    with pytest.raises(ValueError, match="not the tokenizer this generator was trained with") as error:
        load(copied, device="cpu")
    other = tokun.inference.model.ImageTokenizer.load(copied / "image_tokenizer").fingerprint()
    assert tiny_model.image_tokenizer.fingerprint()[:16] in str(error.value) and other[:16] in str(error.value)


def test_a_swapped_text_tokenizer_is_refused(copied, tiny_model):
    lines = [
        f"{a} {b} of the {c}"
        for a in ("Ships", "Trees", "Towers")
        for b in ("and men", "in rain", "at night")
        for c in ("north", "old town", "river")
    ] * 9
    other = tokun.inference.model.TextTokenizer.train(lines, vocab_size=tiny_model.text_tokenizer.size)
    other.save(copied / "text_tokenizer.model")
    with pytest.raises(ValueError, match=r"text_tokenizer\.model is not the tokenizer this generator was trained with"):
        load(copied, device="cpu")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("generator/config.json", {"vocab_size": 100}, "generator cannot be read"),
        ("generator/config.json", {"num_attention_heads": 0}, "generator cannot be read"),
        ("generator/config.json", {"num_hidden_layers": 99}, "generator"), ("sampling.json", {"image_tokenizer": 5}, "not the tokenizer"),
        ("sampling.json", {"defaults": {"temperature": "hot"}}, r"sampling\.json cannot be read.*temperature"),
        ("sampling.json", {"defaults": {"guidance_scale": float("nan")}}, r"sampling\.json cannot be read.*guidance_scale"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_an_error_that_names_the_file(copied, name, change, words):
    tree = json.loads((copied / name).read_text())
    (copied / name).write_text(json.dumps({**tree, **change}))
    with pytest.raises(ValueError, match=words) as error:
        load(copied, device="cpu")
    assert "\n" not in str(error.value)


def test_parts_of_two_checkpoints_are_refused(tiny_model):
    m = tiny_model
    for change, words in (
        ({"codebook_size": 32}, "64 codes, the vocabulary 32"), ({"text_size": 300}, "pieces, the vocabulary 300"),
        ({"styles": list("abcd")}, "embeddings"),
    ):  # fmt: skip
        vocabulary = Vocabulary.from_dict({**m.vocabulary.to_dict(), **change})
        with pytest.raises(ValueError, match=words):
            Tokun(m.image_tokenizer, m.text_tokenizer, vocabulary, m.generator)


def test_a_gpu_that_lacks_float64_is_refused_with_the_way_out(checkpoint_folder):
    with pytest.raises(UserError, match=r"^device 'mps' cannot be used: the latents need float64, which MPS lacks\. Choose cpu$"):
        load(checkpoint_folder, device="mps")


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    for name in (tmp_path / "nowhere", "no such name", "./a/b"):
        with pytest.raises(FileNotFoundError, match="neither a local folder nor a Hugging Face Hub id"):
            load(name)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint.*Has its training finished"):
        load(tmp_path)


def test_tags_are_counted_most_frequent_first():
    assert count_tags([("a", "x"), ("b", ""), ("a", "x"), ("a", "")]) == [("a", "x", 2), ("a", "", 1), ("b", "", 1)]


def test_a_watcher_sees_every_choice_of_the_first_sample_as_it_is_made(tiny_model):
    seen = []
    pair = tiny_model.sample(3, 2, watch=lambda codes, words: seen.append((codes, words)))[0]
    assert seen[-1] == (pair.codes, pair.caption_ids)
    assert all(pair.codes[: len(codes)] == codes and pair.caption_ids[: len(words)] == words for codes, words in seen)
    assert [len(codes) for codes, _ in seen[: len(pair.codes)]] == list(range(1, len(pair.codes) + 1))


def test_a_run_that_has_not_ended_is_said_how_to_go_on_and_where_its_best_is(tmp_path):
    (tmp_path / "state" / "image_tokenizer" / "step-1").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"Has its training finished\?$"):
        folders.resolve(tmp_path)
    (tmp_path / "state" / "generator" / "step-1").mkdir(parents=True)
    for resolve in (folders.resolve, folders.resolve_adapter):
        with pytest.raises(FileNotFoundError, match=r"command again to resume; with train\.max_minutes=1 added it stops and saves"):
            resolve(tmp_path)
    (tmp_path / "best" / "step-00000040.partial").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"stops and saves its result"):
        folders.resolve_adapter(tmp_path)
    (tmp_path / "best" / "step-00000020").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"command again to resume; .*/best holds the best so far"):
        folders.resolve_adapter(tmp_path)


def test_a_misspelt_tag_is_told_the_nearest(tiny_model):
    style = tiny_model.styles[0]
    with pytest.raises(ValueError, match=rf"did you mean {style}\? style can be: "):
        tiny_model.vocabulary.id(f"<style:{style}x>")
