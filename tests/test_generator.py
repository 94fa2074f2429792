"""Promises of tokun/models/generator.py."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen3ForCausalLM

from tokun.config import GeneratorConfig
from tokun.models import losses
from tokun.models.generator import (
    add_dropout,
    count_parameters,
    flops_per_token,
    fuse_loss_into_forward,
    grown_layers,
    head_is_last,
    loss_chunk,
    make_generator,
    start_from,
    tune_for,
)

SMALL = dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)


def make(**changes):
    torch.manual_seed(0)
    options = dict(vocab_size=50, max_length=40, pad=1, bos=2, eos=3)
    return make_generator(GeneratorConfig(**{**SMALL, **changes}), **options)


def test_it_is_a_stock_qwen3_of_the_asked_size():
    model = make()
    assert type(model) is Qwen3ForCausalLM and model.dtype == torch.float32
    c = model.config
    assert (c.vocab_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.max_position_embeddings) == (50, 2, 4, 2, 40)
    assert (c.pad_token_id, c.bos_token_id, c.eos_token_id, c.intermediate_size) == (1, 2, 3, 128)
    assert model(input_ids=torch.zeros(2, 7, dtype=torch.long)).logits.shape == (2, 7, 50)


def test_the_same_seed_makes_the_same_weights():
    assert all(torch.equal(a, b) for a, b in zip(make().parameters(), make().parameters()))


@pytest.mark.parametrize("tied", [True, False])
def test_saved_then_loaded_by_transformers_gives_equal_logits(tmp_path, tied):
    model = make(tie_embeddings=tied).eval()
    add_dropout(model, 0.5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(20).view(2, 10)
    assert type(loaded) is Qwen3ForCausalLM
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_dropout_is_inactive_in_eval_and_active_in_training():
    model, plain, ids = make(), make(), torch.arange(20).view(2, 10)
    add_dropout(model, 0.3)
    assert torch.equal(model.eval()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)
    a, b = (model.train()(input_ids=ids).logits for _ in range(2))
    assert not torch.equal(a, b)
    assert torch.equal(model.eval()(input_ids=ids).logits, plain(input_ids=ids).logits)
    still = make().train()
    add_dropout(still, 0.0)
    assert torch.equal(still(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_dropout_drops_a_tenth_and_keeps_the_expectation_where_it_hangs():
    model = make(hidden_size=256, intermediate_size=64).train()
    add_dropout(model, 0.1)
    layer = model.model.layers[0]
    for module, x in (
        (model.get_input_embeddings(), torch.arange(2, 50).repeat(20)),  # row 1, <pad>, is zero
        (layer.self_attn.o_proj, torch.randn(1000, 32)), (layer.mlp.down_proj, torch.randn(1000, 64)),
    ):  # fmt: skip
        dropped, whole = module(x), module.eval()(x)
        assert abs((dropped == 0).float().mean() - 0.1) < 0.01
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], whole[kept] / 0.9)


@pytest.mark.parametrize("p", [-0.1, 1.0, 2])
def test_a_dropout_outside_its_range_is_refused(p):
    with pytest.raises(ValueError, match=r"dropout is .*\[0, 1\)"):
        add_dropout(make(), p)


def test_heads_that_do_not_group_are_refused():
    with pytest.raises(ValueError, match="num_heads 4 is not a multiple of num_kv_heads 3"):
        make(num_kv_heads=3)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_flops_are_the_hand_count(tied):
    model = make(tie_embeddings=tied)
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32  # q, k and v, o
    matrices = 2 * (attention + 3 * 32 * 128)
    norms = 2 * (2 * 32 + 2 * 8) + 32
    assert count_parameters(model) == 50 * 32 * (1 if tied else 2) + matrices + norms
    # a looked-up embedding costs nothing, the head does; causal attention meets half the positions
    assert flops_per_token(model, 100) == 6 * (matrices + 50 * 32) + 6 * 2 * 4 * 8 * 100


@pytest.fixture
def pretrained(tmp_path):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "lm")
    return model.eval(), str(tmp_path / "lm")


def test_a_pretrained_model_starts_with_its_weights_and_new_rows(pretrained):
    old, path = pretrained
    model = make(pretrained=path).eval()
    assert type(model) is type(old) and model.config.vocab_size == model.get_input_embeddings().num_embeddings == 50
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (1, 2, 3)
    ids = torch.arange(20).view(2, 10)
    torch.testing.assert_close(model(input_ids=ids).logits[..., :30], old(input_ids=ids).logits)
    new = model.get_input_embeddings().weight[30:]
    assert new.isfinite().all() and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model(input_ids=torch.full((1, 3), 49)).logits.shape == (1, 3, 50)


def test_a_pretrained_model_with_room_is_not_shrunk_and_one_too_short_is_refused(pretrained):
    _, path = pretrained
    options = dict(pad=1, bos=2, eos=3)
    model = make_generator(GeneratorConfig(pretrained=path), vocab_size=25, max_length=64, **options)
    assert model.get_input_embeddings().num_embeddings == 30
    with pytest.raises(ValueError, match=r"takes 64 positions, the sequences here need 65: use fewer codes"):
        make_generator(GeneratorConfig(pretrained=path), vocab_size=25, max_length=65, **options)


def test_a_generator_starts_from_another_whose_ids_have_other_places():
    old, model = make(), make_generator(GeneratorConfig(**SMALL), vocab_size=52, max_length=64, pad=1, bos=2, eos=3)
    kept = model.get_input_embeddings().weight[42].clone()
    others, added = [f"n{i}" for i in range(10)], ["n0", "n1", "new", *(f"n{i}" for i in range(9, 1, -1)), "newer"]
    assert start_from(model, old, others, added, text_size=40) == ["new", "newer"]
    mine, theirs = model.get_input_embeddings().weight, old.get_input_embeddings().weight
    assert torch.equal(mine[:42], theirs[:42]) and torch.equal(mine[43], theirs[49]) and torch.equal(mine[42], kept)
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(model.eval()(input_ids=ids).logits[..., :42], old.eval()(input_ids=ids).logits[..., :42])


def test_a_deeper_generator_starts_as_the_same_function_and_all_its_layers_learn():
    old, model = make(), make(num_layers=5)
    assert start_from(model, old, [], [], text_size=50) == []
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(model(input_ids=ids).logits, old(input_ids=ids).logits)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):  # an added layer's outputs move first, then what feeds them
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if "_proj.weight" in name)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (2, 2, "0 1"),
        (4, 6, "0 1 1+ 2 3 3+"),
        (8, 12, "0 1 1+ 2 3 3+ 4 5 5+ 6 7 7+"),
        (3, 4, "0 1 2 2+"),
        (2, 6, "0 0+ 0+ 1 1+ 1+"),
    ],
)
def test_added_layers_lie_evenly_behind_those_they_copy(before, after, expected):
    assert " ".join(f"{source}{'+' if added else ''}" for source, added in grown_layers(before, after)) == expected


def test_tuned_equals_stock():
    """Fused norm and plain attention are the same function: equal logits and gradients up to rounding."""
    ids = torch.randint(0, 90, (3, 20), generator=torch.Generator().manual_seed(0))
    results = []
    for tuned in (False, True):
        torch.manual_seed(0)
        model = make_generator(
            GeneratorConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16),
            vocab_size=90,
            max_length=64,
            pad=0,
            bos=1,
            eos=2,
        )
        if tuned:
            tune_for(model, torch.device("cpu"))
        logits = model(input_ids=ids, use_cache=False).logits
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    for stock, tuned in zip(*results):
        torch.testing.assert_close(tuned, stock, atol=1e-4, rtol=1e-3)


def test_a_tuned_model_takes_masks_and_caches_as_the_stock_one():
    tuned, stock, ids = make(), make(), torch.randint(0, 50, (2, 9))
    tune_for(tuned, torch.device("cpu"))
    assert tuned.config._attn_implementation == "tokun_causal"
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for model in (tuned, stock):
        model.train()
    seen = mask.bool()
    torch.testing.assert_close(
        tuned(input_ids=ids, attention_mask=mask).logits[seen], stock(input_ids=ids, attention_mask=mask).logits[seen], atol=1e-4, rtol=1e-3
    )
    start = tuned(input_ids=ids[:, :5], use_cache=True)
    rest = tuned(input_ids=ids[:, 5:], past_key_values=start.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat((start.logits, rest.logits), 1), stock(input_ids=ids).logits, atol=1e-4, rtol=1e-3)


def test_models_whose_attention_does_more_are_left_to_their_own():
    config = dict(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(Gemma2Config(**config))
    tune_for(model, torch.device("cpu"))
    assert model.config._attn_implementation == "eager"


def loss_and_gradients(model, ids, labels, *, chunk=None, compiled=False):
    is_image, weights, size = torch.arange(50) >= 30, torch.tensor([1.0, 2.0, 0.01]), 48
    model.zero_grad()
    if chunk is not None:
        token_losses = torch.compile(losses.next_token_losses, dynamic=True) if compiled else losses.next_token_losses
        fuse_loss_into_forward(model, size=size, chunk=chunk, token_losses=token_losses)
        positions = (labels.flatten() != losses.IGNORE).nonzero()[:, 0]
        targets = (positions, labels.flatten()[positions], is_image, weights)
        loss, parts = model(input_ids=ids, use_cache=False, targets=targets)
    else:
        parts = losses.next_token_losses(model(input_ids=ids, use_cache=False).logits[..., :size], labels, is_image)
        loss = losses.weighted_loss(parts, weights)
    loss.backward()
    return {"loss": loss.detach(), **{k: v.detach() for k, v in parts.items()}, **{n: p.grad for n, p in model.named_parameters()}}


@pytest.fixture
def labelled():
    g = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(0, 48, (3, 11), generator=g) for _ in range(2))
    labels[1, 4:] = losses.IGNORE
    return ids, labels


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_in_the_forward_pass_is_that_of_the_models_logits_with_all_gradients(labelled, tied, chunk):
    whole = loss_and_gradients(make(tie_embeddings=tied), *labelled)
    model = make(tie_embeddings=tied)
    names = model.state_dict().keys()
    for name, value in loss_and_gradients(model, *labelled, chunk=chunk).items():
        torch.testing.assert_close(value, whole[name], atol=1e-5, rtol=1e-4, msg=name)
    assert model.state_dict().keys() == names and model(input_ids=labelled[0]).logits.shape == (3, 11, 50)  # every other call is as before


def test_a_model_that_does_more_to_its_logits_is_told_from_one_that_does_not():
    small = dict(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=16
    )
    capped = Gemma2Config(**small, final_logit_softcapping=5.0)
    plain = GPT2Config(vocab_size=50, n_positions=40, n_embd=16, n_layer=1, n_head=2)
    assert head_is_last(make()) and head_is_last(make(tie_embeddings=False))
    assert head_is_last(AutoModelForCausalLM.from_config(plain)) and not head_is_last(AutoModelForCausalLM.from_config(capped))


def test_chunks_are_made_where_the_logits_would_pass_a_gibibyte_or_a_cpus_cache():
    assert loss_chunk(0, positions=8448, size=4136, device="cpu") == 2**25 // (4 * 4136)
    assert loss_chunk(0, positions=1024, size=4136, device="cpu") == 0
    assert loss_chunk(0, positions=64 * 336, size=1000) == 0
    assert loss_chunk(0, positions=64 * 336, size=32768) == 2**30 // (4 * 32768)
    assert loss_chunk(100, positions=64 * 336, size=1000) == 100 and loss_chunk(10**9, positions=64 * 336, size=32768) == 0


def test_codes_that_look_alike_begin_alike(tiny_model):
    """The embeddings of codes keep the distances of the codebook's vectors up to one factor, as near as a random turn does; others stay."""
    from tokun.models.generator import start_from_codebook

    v = tiny_model.vocabulary
    torch.manual_seed(0)
    model = make_generator(
        GeneratorConfig(hidden_size=256, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16),
        vocab_size=v.size,
        max_length=99,
        pad=0,
        bos=1,
        eos=2,
    )
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    vectors = tiny_model.image_tokenizer.vectors()
    start_from_codebook(model, vectors, v.code_offset)
    assert torch.equal(weight[: v.code_offset], before[: v.code_offset])
    codes = weight[v.code_offset : v.size].detach()
    assert codes.std().item() == pytest.approx(before[v.code_offset :].std().item(), rel=1e-3)
    a, b = torch.cdist(codes, codes).flatten(), torch.cdist(vectors, vectors).flatten()
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.9


def test_the_tokenizers_vectors_are_what_its_decoder_is_given(tiny_model):
    t = tiny_model.image_tokenizer
    codes = torch.arange(t.codebook_size)[: t.grid[0] * t.grid[1]][None]
    latents = t.vectors()[codes].transpose(1, 2).reshape(1, -1, *t.grid)
    assert torch.equal(t.decoder(latents).clamp(-1, 1), t.decode(codes))
