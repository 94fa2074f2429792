"""Promises of tokun/inference/native.py: the same function as the steps and choices in torch, by a program of its own."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from tokun.inference import decoder, latents, native, sampling
from tokun.inference.decoder import NativeDecoder, NativeStream, Stream, TorchDecoder
from tokun.inference.token_choice import Choice, Constraints, DecodingSettings
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import Tags

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="there is no C++ compiler")
VOCABULARY = 200


def model_of(**sizes):
    torch.manual_seed(0)
    standard = {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    model = AutoModelForCausalLM.from_config(
        Qwen3Config(vocab_size=VOCABULARY, max_position_embeddings=256, **{**standard, **sizes})
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
            elif "proj" in name:
                weight.mul_(5)  # so that attention looks at something
    return model


@pytest.fixture
def ids():
    return torch.randint(VOCABULARY, (6, 90), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["oneDNN", "loops"])
def products(request, monkeypatch):
    """The program with torch's small products, and with its own loops."""
    if request.param == "oneDNN" and not native.has_products():
        pytest.skip("this processor or torch has no small products")
    program = native._load(native.build(native._flags(request.param == "oneDNN")))
    monkeypatch.setattr(native, "program", lambda: program)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


SHAPES = {
    "as tiny": {},
    "heads of their own keys": {"num_key_value_heads": 4, "head_dim": 64},
    "three queries a key": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24},
    "no multiples of 16": {"hidden_size": 36, "intermediate_size": 50, "head_dim": 10},
    "wide heads": {"head_dim": 128, "hidden_size": 64, "intermediate_size": 352},
}


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_the_models_own_forward(shape, ids, products):
    model = model_of(**SHAPES[shape])
    expected = model(input_ids=ids).logits
    stream = NativeStream(NativeDecoder(model), [ids[:, :5]], 90)
    for t in range(5, 90):
        torch.testing.assert_close(stream.logits(slice(0, VOCABULARY)), expected[:, t - 1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(stream.logits(slice(7, 24)), expected[:, t - 1, 7:24], rtol=1e-3, atol=1e-3)
        stream.step(ids[:, t])


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize("length", [3, 20, 70])
def test_a_prompt_is_read_as_one_id_after_another_would_be(ids, products, length):
    weights = NativeDecoder(model_of())
    at_once, by_turns = NativeStream(weights, [ids[:, :length]], 90), NativeStream(weights, [ids[:, :1]], 90)
    for t in range(1, length):
        by_turns.step(ids[:, t])
    for t in range(length, 80):
        torch.testing.assert_close(at_once.hidden, by_turns.hidden, rtol=1e-4, atol=1e-4)
        at_once.step(ids[:, t])
        by_turns.step(ids[:, t])


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize("starts", [(9, 2), (2, 9), (70, 1)])
def test_half_precision_is_as_near_to_float32_as_torch_is(ids, starts):
    """Of two prompts of different lengths, in steps that begin at odd places too."""
    exact = model_of()
    half = copy.deepcopy(exact).bfloat16()
    prompts, errors = [ids[:, : starts[0]], ids[:, : starts[1]]], torch.zeros(2)
    streams = [
        Stream(TorchDecoder(exact), prompts, 100),
        Stream(TorchDecoder(half), prompts, 100),
        NativeStream(NativeDecoder(half), prompts, 100),
    ]
    for t in range(70, 89):
        expected, *found = (stream.logits(slice(0, VOCABULARY)).float() for stream in streams)
        errors += torch.stack([(logits - expected).abs().mean() for logits in found])
        for stream in streams:
            stream.step(ids[:, t].repeat(2))
    assert errors.isfinite().all() and errors[1] < 1.1 * errors[0]


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bits_beside_any_others_and_with_any_number_of_threads(dtype, products, threads):
    model = model_of(head_dim=64).to(dtype)
    ids = torch.randint(VOCABULARY, (64, 40), generator=torch.Generator().manual_seed(1))

    def read(rows, leave):
        stream = NativeStream(NativeDecoder(model), [ids[rows, :4]], 40)
        for t in range(4, 40):
            stream.step(ids[rows, t])
            if leave and t == 20:
                rows = rows[-2:]
                stream.keep(torch.tensor([stream.rows.index.numel() - 2, stream.rows.index.numel() - 1]))
        return stream.logits(slice(0, VOCABULARY))[-1]

    expected = read(list(range(64)), False)
    for many in (3, 2, 1):
        threads(many)
        for rows in (range(63, 64), range(61, 64), range(47, 64)):
            assert torch.equal(read(list(rows), False), expected)
            assert torch.equal(read(list(rows), len(rows) > 1), expected)


@needs_compiler
def test_what_is_not_written_is_not_read(ids, monkeypatch, products):
    """Caches are not cleared: whatever lies there, results are the same."""
    model = model_of()
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        for junk in (float("nan"), 0.0):
            monkeypatch.setattr(
                torch,
                "empty",
                lambda *shape, junk=junk, empty=torch.empty, **of: (
                    empty(*shape, **of).fill_(junk) if of.get("dtype") != torch.long else empty(*shape, **of)
                ),
            )
            with torch.inference_mode():
                stream = NativeStream(NativeDecoder(model.to(dtype)), [ids[:, :9], ids[:, :2]], 90)
                for t in range(9, 80):
                    stream.step(ids[:, t].repeat(2))
                made.append(stream.logits(slice(0, VOCABULARY)))
            monkeypatch.undo()
        assert made[-1].isfinite().all() and torch.equal(made[-1], made[-2])


@needs_compiler
@torch.inference_mode()
def test_places_and_rows_that_are_not_there_are_refused(ids):
    stream = NativeStream(NativeDecoder(model_of()), [ids[:, :4]], 6)
    stream.step(ids[:, 4])
    stream.step(ids[:, 5])
    with pytest.raises(IndexError, match="positions 6 to 7; there are 6 rows of 6"):
        stream.step(ids[:, 6])
    with pytest.raises(IndexError, match="5 rows"):
        NativeStream(NativeDecoder(model_of()), [ids[:, :4]], 8).step(ids[:5, 4])


@needs_compiler
@pytest.mark.parametrize("V", [5, 1024, 2103])
@pytest.mark.parametrize(
    "choice", [Choice(), Choice(0.0), Choice(0.7, 0, 0.95), Choice(1.3, 40, 1.0), Choice(1.0, 3, 0.5), Choice(0.01, 0, 0.3)], ids=str
)
def test_choices_are_those_of_torch(V, choice):
    """But where u falls between two ids as near as sums round."""
    draw = torch.Generator().manual_seed(V)
    differ = 0
    for spread in (0.1, 1.0, 10.0):
        logits, u = spread * torch.randn(64, V, generator=draw), torch.rand(64, generator=draw)
        u[:4] = torch.tensor([0.0, 1e-9, 1 - 2**-24, 1.0])
        legal = torch.rand(64, V, generator=draw) < 0.6
        legal[:, 2] = True
        for mask in (None, legal):
            found, expected = native.choose(logits, mask, u, choice), sampling.choose(logits, mask, u, choice)
            differ += int((found != expected).sum())
            assert mask is None or mask.gather(1, found[:, None]).all()
            nats = native.nats(logits, mask, found)
            torch.testing.assert_close(nats, sampling.nats(logits.double(), mask, found), rtol=1e-5, atol=1e-5)
    assert differ <= 3  # of 384


@needs_compiler
def test_ids_as_likely_as_the_last_that_is_in_are_in():
    logits, u = torch.zeros(101, 10), torch.linspace(0, 1, 101)
    logits[:, 4] = 1
    for choice in (Choice(1.0, 2, 1.0), Choice(1.0, 0, 0.3)):
        assert set(native.choose(logits, None, u, choice).tolist()) == set(range(10))
    assert set(native.choose(logits, None, u, Choice(1.0, 1, 1.0)).tolist()) == {4}


@needs_compiler
def test_a_picture_drawn_in_one_call_is_the_one_that_is_watched(tiny_model):
    """`watch` makes a call of each id."""
    v, slots = tiny_model.vocabulary, tiny_model.slots
    prompt = [*sequences.prefix(v, Tags("engraving", "", "plain", (4, 4))), v.id("<boi>")]
    u = latents.uniform(latents.draw(3, range(5), slots.size))
    seen = []

    def made(watch, rows=range(5)):
        return sampling.generate(
            tiny_model.generator,
            sampling.Rules(v, slots, DecodingSettings(Choice(0.9, 0, 0.9)), Constraints((v.id("<boq>"),))),
            torch.tensor([prompt] * len(rows)),
            u[rows],
            watch=watch,
        )

    assert decoder.is_compiled(tiny_model.generator)
    one, other, alone = made(None), made(lambda ids: seen.append(ids.clone())), made(None, [4])
    assert len(seen) > 16 and torch.equal(one.ids, other.ids)
    assert torch.equal(one.image_nll, other.image_nll) and torch.equal(one.text_nll, other.text_nll)
    assert sequences.unpack(v, alone.ids[0].tolist()) == sequences.unpack(v, one.ids[4].tolist())


@needs_compiler
def test_compiled_samples_are_the_plain_ones_but_for_rounding(tiny_model):
    """With guidance of pictures and of words."""
    v, slots, generator = tiny_model.vocabulary, tiny_model.slots, copy.deepcopy(tiny_model.generator)
    prompt = [*sequences.prefix(v, Tags("engraving", "", "plain", (4, 4))), v.id("<boi>")]
    bare = torch.tensor([[v.id("<bos>"), v.id("<boi>")]] * 16)
    u = latents.uniform(latents.draw(3, range(16), slots.size))
    for scale in (1.0, 2.0):
        made, how = [], DecodingSettings(guidance_scale=scale, text_guidance_scale=scale)
        for compiled in (True, False):
            assert decoder.compile_steps(generator, compiled) == compiled
            made.append(
                sampling.generate(
                    generator,
                    sampling.Rules(v, slots, how, Constraints((v.id("<boq>"),))),
                    torch.tensor([prompt] * 16),
                    u,
                    unconditional_image=bare,
                    unconditional_text=torch.tensor([prompt[:-1]] * 16),
                )
            )
        same = [sequences.unpack(v, a.tolist()) == sequences.unpack(v, b.tolist()) for a, b in zip(made[0].ids, made[1].ids)]
        assert sum(same) >= 15
        kept = torch.tensor(same)
        torch.testing.assert_close(made[0].image_nll[kept], made[1].image_nll[kept], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(made[0].text_nll[kept], made[1].text_nll[kept], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(made[0].text_nll_alone[kept], made[1].text_nll_alone[kept], rtol=1e-4, atol=1e-3)
        assert (made[0].text_nll_alone > 0).all() == (scale != 1)


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokun"


@needs_compiler
def test_what_cannot_be_built_says_why_and_leaves_nothing(cache, tmp_path, monkeypatch):
    (tmp_path / "native.cpp").write_text("int main( {")
    monkeypatch.setattr(native, "SOURCE", tmp_path / "native.cpp")
    with pytest.raises(RuntimeError, match=r"could not build native\.cpp: .*error"):
        native.build([])
    assert list(cache.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(native.tempfile, "TemporaryDirectory", lambda dir: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(RuntimeError, match=r"native-\w+\.so cannot be written: .*No space left"):
            native.build([])
    monkeypatch.setattr(native, "compiler", lambda: None)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        native.build([])


@needs_compiler
def test_it_is_built_once_for_a_source_and_by_many_at_once(cache, tmp_path, monkeypatch, capfd):
    source = tmp_path / "native.cpp"
    source.write_text('extern "C" int tokun() { return 1; }')
    monkeypatch.setattr(native, "SOURCE", source)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(native.build, [["-O1"]] * 4))
    assert len(paths) == 1 and [path.suffix for path in cache.iterdir()] == [".so"]
    made = paths.pop().stat().st_mtime_ns
    capfd.readouterr()
    path = native.build(["-O1"])
    assert path.stat().st_mtime_ns == made and capfd.readouterr().err == ""
    path.write_bytes(b"")  # what a machine that goes down may leave
    assert native.build(["-O1"]).stat().st_size and "once per machine" in capfd.readouterr().err
    source.write_text('extern "C" int tokun() { return 2; }')
    assert native.build(["-O1"]).stat().st_mtime_ns != made and "once per machine" in capfd.readouterr().err


@needs_compiler
def test_a_file_that_is_no_program_is_told(tmp_path):
    (tmp_path / "native.so").write_bytes(b"no program")
    with pytest.raises(RuntimeError, match=r"native\.so cannot be loaded"):
        native._load(tmp_path / "native.so")


def test_the_environment_can_forbid_it(monkeypatch):
    native.is_there.cache_clear()
    monkeypatch.setenv("TOKUN_NATIVE", "0")
    try:
        assert not native.is_there()
        with pytest.warns(UserWarning, match="not compiled.*TOKUN_NATIVE=0"):
            assert not decoder.compile_steps(model_of())
    finally:
        native.is_there.cache_clear()
