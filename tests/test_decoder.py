"""Promises of tokun/inference/decoder.py: the model's own function, by another way."""

import copy
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tokun.inference import decoder, latents, native, sampling, streams
from tokun.inference.decoder import GraphStream, HubStreams, Stream, TorchDecoder, decoder_of, open_stream, row_counts
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import Tags


@pytest.fixture
def ids(tiny_model):
    return torch.randint(tiny_model.vocabulary.size, (4, 40), generator=torch.Generator().manual_seed(0))


def whole(model):
    return slice(0, model.vocabulary.size)


@pytest.fixture(params=["native", "plain"])
def stream_of(request, tiny_model):
    """open_stream, by the C++ program and without."""
    if request.param == "native" and not native.is_there():
        pytest.skip("there is no C++ compiler")
    decoder.compile_steps(tiny_model.generator, request.param == "native")
    yield open_stream
    decoder.compile_steps(tiny_model.generator, native.is_there())


@torch.inference_mode()
@pytest.mark.parametrize("prompt", [3, 25])
def test_steps_are_the_models_own_forward(tiny_model, ids, prompt, stream_of):
    expected = tiny_model.generator(input_ids=ids).logits[:, :, whole(tiny_model)]
    stream = stream_of(tiny_model.generator, [ids[:, :prompt]], 40)
    for t in range(prompt, 40):
        torch.testing.assert_close(stream.logits(whole(tiny_model)), expected[:, t - 1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stream.logits(slice(5, 20)), expected[:, t - 1, 5:20], rtol=1e-4, atol=1e-4)
        stream.step(ids[:, t])


@torch.inference_mode()
def test_fixed_shapes_give_what_growing_ones_give(tiny_model, ids):
    """What a GPU replays as a graph, here run as it is."""
    prompts, plain = [ids[:, :3], ids[:, :1]], TorchDecoder(tiny_model.generator, pack=False)  # as on a GPU
    growing, fixed = Stream(TorchDecoder(tiny_model.generator), prompts, 40), GraphStream(plain, prompts, 40)
    for t in range(3, 20):
        for stream in (growing, fixed):
            stream.step(ids[:, t].repeat(2))
        torch.testing.assert_close(fixed.logits(whole(tiny_model)), growing.logits(whole(tiny_model)), rtol=1e-4, atol=1e-4)
    for stream in (growing, fixed):
        stream.only_first(4)
        stream.step(ids[:, 20])
    torch.testing.assert_close(fixed.logits(whole(tiny_model)), growing.logits(whole(tiny_model)), rtol=1e-4, atol=1e-4)


def test_without_a_compiler_steps_stay_as_they_are_with_a_word(tiny_model, monkeypatch):
    generator = copy.deepcopy(tiny_model.generator)

    def none():
        raise RuntimeError("there is no C++ compiler (g++, clang++) on this machine")

    monkeypatch.setattr(native, "program", none)
    native.is_there.cache_clear()
    try:
        with pytest.warns(UserWarning, match="not compiled.*no C\\+\\+ compiler"):
            assert not decoder.compile_steps(generator)
        assert not decoder.is_compiled(generator)
        assert type(open_stream(generator, [torch.zeros(2, 3, dtype=torch.long)], 8)) is Stream
    finally:
        native.is_there.cache_clear()


def test_a_cuda_graph_is_captured_and_replayed_on_the_models_gpu(monkeypatch):
    current, ran = [torch.device("cuda:0")], []

    class On:  # torch.cuda.device
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    cuda = mock.MagicMock(device=On)
    cuda.CUDAGraph.return_value.replay.side_effect = lambda: ran.append(("replayed", current[-1]))
    monkeypatch.setattr(streams.torch, "cuda", cuda)
    replay = streams.capture(lambda: ran.append(("ran", current[-1])), torch.device("cuda:1"))
    cuda.graph.assert_called_once_with(cuda.CUDAGraph.return_value, stream=cuda.Stream.return_value)
    replay()
    assert ran == 3 * [("ran", torch.device("cuda:1"))] + [("replayed", torch.device("cuda:1"))]
    assert current == [torch.device("cuda:0")]


@torch.inference_mode()
def test_groups_of_two_lengths_step_together_as_they_would_apart(tiny_model, ids, stream_of):
    both = stream_of(tiny_model.generator, [ids[:, :9], ids[:, 30:32]], 60)
    apart = [stream_of(tiny_model.generator, [part], 60) for part in (ids[:, :9], ids[:, 30:32])]
    for t in range(10, 14):
        both.step(ids[:, t].repeat(2))
        for stream in apart:
            stream.step(ids[:, t])
        torch.testing.assert_close(
            both.logits(whole(tiny_model)), torch.cat([s.logits(whole(tiny_model)) for s in apart]), rtol=1e-4, atol=1e-4
        )


@torch.inference_mode()
def test_rows_that_are_kept_go_on_as_if_the_others_were_there(tiny_model, ids, stream_of):
    stay, leave = (stream_of(tiny_model.generator, [ids[:, :5]], 40) for _ in range(2))
    leave.step(ids[:, 5])
    stay.step(ids[:, 5])
    leave.keep(torch.tensor([3, 1]))
    for t in range(6, 12):
        stay.step(ids[:, t])
        leave.step(ids[[3, 1], t])
    torch.testing.assert_close(leave.logits(whole(tiny_model)), stay.logits(whole(tiny_model))[[3, 1]], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_row_is_the_same_bits_in_every_number_of_rows_that_is_used(tiny_model, stream_of):
    counts = row_counts(tiny_model.generator, [4])
    assert decoder.SAFE in counts and set(counts) <= {*decoder.ROWS, *decoder.NATIVE_ROWS}
    ids = torch.randint(tiny_model.vocabulary.size, (max(counts), 12), generator=torch.Generator().manual_seed(1))
    found = []
    for rows in counts:
        stream = stream_of(tiny_model.generator, [ids[:rows, :4]], 12)
        for t in range(4, 12):
            stream.step(ids[:rows, t])
        found.append(stream.logits(whole(tiny_model))[:1])
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
    prompt = [*sequences.prefix(v, Tags("engraving", "", "plain", (4, 4))), v.id("<boi>")]
    assert isinstance(open_stream(llama, [torch.tensor([prompt])], 60), HubStreams)
    u = latents.uniform(latents.draw(3, range(3), tiny_model.slots.size))
    made = [
        sampling.generate(llama, v, torch.tensor([prompt] * len(rows)), u[rows], tiny_model.slots, forbid=(v.id("<boq>"),),
            guidance_scale=scale, unconditional_image=torch.tensor([[v.id("<bos>"), v.id("<boi>")]] * len(rows)))
        for scale in (1.0, 2.0) for rows in ([0, 1, 2], [2])
    ]  # fmt: skip
    for many, one in (made[:2], made[2:]):
        assert sequences.unpack(v, many.ids[2].tolist()) == sequences.unpack(v, one.ids[0].tolist())
    wrapped = copy.deepcopy(tiny_model.generator)
    wrapped.model.layers[0].mlp.up_proj = torch.nn.Sequential(wrapped.model.layers[0].mlp.up_proj)
    assert decoder_of(wrapped) is None
