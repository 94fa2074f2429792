"""Promises of tokun/decoder.py: the model's own function, by another way."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tokun import decoder, latents, sampling
from tokun.decoder import CompiledStream, Decoder, GraphStream, HubStreams, Stream, decoder_of, open_stream, row_counts
from tokun.generator import can_compile
from tokun.vocabulary import Tags


@pytest.fixture
def ids(tiny_model):
    return torch.randint(tiny_model.vocabulary.size, (4, 40), generator=torch.Generator().manual_seed(0))


def whole(model):
    return slice(0, model.vocabulary.size)


@torch.inference_mode()
@pytest.mark.parametrize("prompt", [3, 25])
def test_steps_are_the_models_own_forward(tiny_model, ids, prompt):
    expected = tiny_model.generator(input_ids=ids).logits[:, :, whole(tiny_model)]
    stream = open_stream(tiny_model.generator, [ids[:, :prompt]], 40)
    assert type(stream) is Stream
    for t in range(prompt, 40):
        torch.testing.assert_close(stream.logits(whole(tiny_model)), expected[:, t - 1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stream.logits(slice(5, 20)), expected[:, t - 1, 5:20], rtol=1e-4, atol=1e-4)
        stream.step(ids[:, t])


@torch.inference_mode()
def test_fixed_shapes_give_what_growing_ones_give(tiny_model, ids):
    """What a GPU replays as a graph, here run as it is."""
    prompts, plain = [ids[:, :3], ids[:, :1]], Decoder(tiny_model.generator, pack=False)  # as on a GPU
    growing, fixed = Stream(decoder_of(tiny_model.generator), prompts, 40), GraphStream(plain, prompts, 40)
    for t in range(3, 20):
        for stream in (growing, fixed):
            stream.step(ids[:, t].repeat(2))
        torch.testing.assert_close(fixed.logits(whole(tiny_model)), growing.logits(whole(tiny_model)), rtol=1e-4, atol=1e-4)
    for stream in (growing, fixed):
        stream.only_first(4)
        stream.step(ids[:, 20])
    torch.testing.assert_close(fixed.logits(whole(tiny_model)), growing.logits(whole(tiny_model)), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="there is no C++ compiler")
def test_compiled_steps_give_what_plain_ones_give_and_the_same_for_every_batch(tiny_model, ids):
    """With guidance too, where two prompts of different lengths step together."""
    v, generator = tiny_model.vocabulary, copy.deepcopy(tiny_model.generator)
    ids = torch.cat([ids] * 4)
    prompt = [*v.prefix(Tags("engraving", "", "plain", (4, 4))), v.id("<boi>")]
    u = latents.uniform(latents.draw(3, range(5), tiny_model.slots.size))

    def made(rows, scale):
        given, bare = torch.tensor([prompt] * len(rows)), torch.tensor([[v.id("<bos>"), v.id("<boi>")]] * len(rows))
        found = sampling.generate(generator, v, given, u[rows], tiny_model.slots, forbid=(v.id("<boq>"),), guidance_scale=scale, unguided=bare)
        return [v.unpack(row) for row in found.ids.tolist()]

    with torch.inference_mode():
        plain = open_stream(generator, [ids[:8, :3], ids[8:, :1]], 40)
        assert decoder.compile_steps(generator) and decoder.is_compiled(generator)
        assert row_counts(generator, [3]) == (decoder.SAFE,)
        fast = open_stream(generator, [ids[:8, :3], ids[8:, :1]], 40)
        assert type(fast) is CompiledStream
        for t in range(3, 20):
            for stream in (plain, fast):
                stream.step(ids[:, t])
            torch.testing.assert_close(fast.logits(whole(tiny_model)), plain.logits(whole(tiny_model)), rtol=1e-4, atol=1e-4)
    for scale in (1.0, 2.0):
        assert made(range(5), scale)[4] == made([4], scale)[0]
    decoder.forget(generator)
    assert not decoder.is_compiled(generator)


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="there is no C++ compiler")
def test_compiled_steps_in_half_precision_are_as_near_to_float32_as_plain_ones(tiny_model, ids):
    exact, half = copy.deepcopy(tiny_model.generator), copy.deepcopy(tiny_model.generator).bfloat16()
    ids = torch.cat([ids] * 4)
    prompts, errors = [ids[:8, :3], ids[8:, :1]], torch.zeros(2)
    with torch.inference_mode():
        plain = open_stream(half, prompts, 40)
        assert decoder.compile_steps(half)
        streams = [open_stream(exact, prompts, 40), plain, open_stream(half, prompts, 40)]
        assert type(streams[2]) is CompiledStream
        for t in range(3, 20):
            for stream in streams:
                stream.step(ids[:, t])
            expected, *found = (stream.logits(whole(tiny_model)).float() for stream in streams)
            errors += torch.stack([(logits - expected).abs().mean() for logits in found])
    decoder.forget(half)
    assert errors[1] < 1.2 * errors[0]


def test_attention_written_out_is_the_ready_made_one():
    """Groups of queries that share a key, rows that begin later."""
    draw = torch.Generator().manual_seed(0)
    q, cache = torch.randn(3, 2, 2, 8, generator=draw), torch.randn(3, 4, 7, 8, generator=draw)
    keys, values = cache.split(2, 1)
    visible = torch.zeros(3, 1, 1, 7).masked_fill(torch.arange(7) < torch.tensor([0, 2, 4])[:, None, None, None], -torch.inf)
    expected = decoder.Step.attend(q, keys, values, visible)
    found = decoder.Step.attend(*(part.bfloat16() for part in (q, keys, values, visible)))
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    apart = torch.nn.functional.scaled_dot_product_attention(q[2:], keys[2:, :, 4:], values[2:, :, 4:], scale=1.0)
    torch.testing.assert_close(expected[2:], apart)


def test_the_compiler_is_shown_the_librarys_products_only_meanwhile():
    fusion = pytest.importorskip("torch._inductor.fx_passes.mkldnn_fusion")
    if not hasattr(fusion, "mkldnn"):
        pytest.skip("this torch has no such products, or keeps them elsewhere")
    with pytest.raises(KeyError), decoder.LibrarysProducts():
        assert fusion.mkldnn._is_mkldnn_acl_supported() and fusion.mkldnn._linear_pointwise is torch.ops.mkldnn._linear_pointwise
        raise KeyError
    assert fusion.mkldnn is torch.ops.mkldnn


def test_without_a_compiler_steps_stay_as_they_are_with_a_word(tiny_model, monkeypatch):
    monkeypatch.setattr(decoder, "can_compile", lambda device: False)
    with pytest.warns(UserWarning, match="not compiled.*no C\\+\\+ compiler"):
        assert not decoder.compile_steps(tiny_model.generator)
    assert not decoder.is_compiled(tiny_model.generator)


@torch.inference_mode()
def test_groups_of_two_lengths_step_together_as_they_would_apart(tiny_model, ids):
    both = open_stream(tiny_model.generator, [ids[:, :9], ids[:, 30:32]], 60)
    apart = [open_stream(tiny_model.generator, [part], 60) for part in (ids[:, :9], ids[:, 30:32])]
    for t in range(10, 14):
        both.step(ids[:, t].repeat(2))
        for stream in apart:
            stream.step(ids[:, t])
        torch.testing.assert_close(both.logits(whole(tiny_model)), torch.cat([s.logits(whole(tiny_model)) for s in apart]), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_rows_that_are_kept_go_on_as_if_the_others_were_there(tiny_model, ids):
    stay, leave = (open_stream(tiny_model.generator, [ids[:, :5]], 40) for _ in range(2))
    leave.step(ids[:, 5])
    stay.step(ids[:, 5])
    leave.keep(torch.tensor([3, 1]))
    for t in range(6, 12):
        stay.step(ids[:, t])
        leave.step(ids[[3, 1], t])
    torch.testing.assert_close(leave.logits(whole(tiny_model)), stay.logits(whole(tiny_model))[[3, 1]], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_row_is_the_same_bits_in_every_number_of_rows_that_is_used(tiny_model):
    counts = row_counts(tiny_model.generator, [4])
    assert decoder.SAFE in counts and set(counts) <= set(decoder.ROWS)
    ids = torch.randint(tiny_model.vocabulary.size, (max(counts), 12), generator=torch.Generator().manual_seed(1))
    found = []
    for rows in counts:
        stream = open_stream(tiny_model.generator, [ids[:rows, :4]], 12)
        for t in range(4, 12):
            stream.step(ids[:rows, t])
        found.append(stream.logits(whole(tiny_model))[:2])
    assert all(torch.equal(logits, found[0]) for logits in found)


def test_weights_that_have_changed_are_read_again(tiny_model):
    generator = copy.deepcopy(tiny_model.generator)
    before = decoder_of(generator)
    assert decoder_of(generator) is before
    with torch.no_grad():
        generator.model.layers[0].mlp.down_proj.weight.add_(0.1)
    after = decoder_of(generator)
    assert after is not before
    decoder.forget(generator)
    assert decoder_of(generator) is not after


def test_another_architecture_samples_through_its_own_forward(tiny_model):
    """A Llama and a Qwen3 with an adapter in front of a matrix are none of ours; seeds keep their promise all the same."""
    v = tiny_model.vocabulary
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    llama = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=v.size, max_position_embeddings=128, **sizes)).eval()
    prompt = [*v.prefix(Tags("engraving", "", "plain", (4, 4))), v.id("<boi>")]
    assert isinstance(open_stream(llama, [torch.tensor([prompt])], 60), HubStreams)
    u = latents.uniform(latents.draw(3, range(3), tiny_model.slots.size))
    made = [
        sampling.generate(llama, v, torch.tensor([prompt] * len(rows)), u[rows], tiny_model.slots, forbid=(v.id("<boq>"),), guidance_scale=scale, unguided=torch.tensor([[v.id("<bos>"), v.id("<boi>")]] * len(rows)))
        for scale in (1.0, 2.0) for rows in ([0, 1, 2], [2])
    ]  # fmt: skip
    for many, one in (made[:2], made[2:]):
        assert v.unpack(many.ids[2].tolist()) == v.unpack(one.ids[0].tolist())
    wrapped = copy.deepcopy(tiny_model.generator)
    wrapped.model.layers[0].mlp.up_proj = torch.nn.Sequential(wrapped.model.layers[0].mlp.up_proj)
    assert decoder_of(wrapped) is None
