"""Promises of tokun/planner.py: the plan of a step's memory against real steps, exact parameters, and the ladder of configs."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tokun import planner
from tokun.config import Config, GeneratorConfig, from_dict, load_config, to_dict
from tokun.models.generator import add_dropout, count_parameters, flops_per_token, make_generator, tune_for
from tokun.planner import make_plan
from tokun.planner.duration import GPU_DAYS_PER_FAILURE, best_interval, communication_bytes, lost_share
from tokun.planner.gpus import GIB, USABLE
from tokun.planner.image_tokenizer import image_tokenizer_sizes, on_fake_gpu, traced, vgg16
from tokun.planner.measure import measure_memory, saved_bytes
from tokun.planner.memory import STAGES, activation_bytes, layer_bytes_per_token, planned_memory, state_bytes
from tokun.planner.sizes import count_samples, generator_sizes, mean_caption_tokens, plan_vocabulary
from tokun.tokenizers import sequences
from tokun.tokenizers.image import Encoder, ImageTokenizer
from tokun.tokenizers.vocabulary import Tags
from tokun.utils import checkpoint

ROOT = Path(__file__).parent.parent
LADDER = {"8m": 8e6, "45m": 45e6, "120m": 120e6, "350m": 350e6, "1.3b": 1.3e9, "7b": 7e9}
SMALL = dict(hidden_size=192, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32)
KINDS = [
    pytest.param(
        bf16,
        checkpointing,
        dropout,
        id=f"{'bf16' if bf16 else 'float32'}{'-checkpointed' if checkpointing else ''}{'-dropout' if dropout else ''}",
    )
    for bf16, checkpointing, dropout in [(False, False, 0.0), (False, True, 0.1), (True, False, 0.1), (True, False, 0.0), (True, True, 0.0)]
]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs name their DeepSpeed JSON from there


def rung(name: str, *overrides: str) -> Config:
    return load_config(f"configs/ladder/{name}.yaml", overrides)


def built(generator: GeneratorConfig, vocab_size: int):
    """A generator as the training stage makes it for a GPU, on whatever device is current."""
    model = make_generator(generator, vocab_size=vocab_size, max_length=2048, pad=0, bos=1, eos=2)
    add_dropout(model, generator.dropout)
    tune_for(model, torch.device("cuda"))
    return model.train()


# --- memory of the generator ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bf16", "checkpointing", "dropout"), KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_planned_memory_of_a_step_is_what_a_real_step_takes(bf16, checkpointing, dropout, optimizer):
    check_memory(small(bf16=bf16, checkpointing=checkpointing, dropout=dropout, optimizer=optimizer), micro=4)


@pytest.mark.slow
def test_the_planned_memory_of_a_rung_is_what_its_step_takes():
    check_memory(rung("8m"), micro=2)


@pytest.mark.parametrize(("bf16", "checkpointing"), [(False, False), (True, False), (True, True)])
def test_a_loss_in_chunks_takes_less_memory_and_as_much_as_planned(bf16, checkpointing):
    config = small(bf16=bf16, checkpointing=checkpointing)
    whole = measure_memory(config, micro=4)
    config.train.loss_chunk = 100
    chunked = check_memory(config, micro=4)
    logits = 4 * 4 * generator_sizes(config).width * plan_vocabulary(config).size
    assert whole["saved"] - chunked["saved"] > logits  # they and the head's input are not kept …
    assert whole["peak"] - chunked["peak"] > (1 if checkpointing else 2) * logits  # … and at the peak there were several of them


def small(*, bf16: bool = True, checkpointing: bool = False, dropout: float = 0.0, optimizer: str = "adamw", **generator) -> Config:
    return from_dict(
        {
            "generator": {**SMALL, "dropout": dropout, **generator},
            "train": {"precision": "bf16" if bf16 else "no", "gradient_checkpointing": checkpointing, "optimizer": optimizer},
            "text_tokenizer": {"vocab_size": 1000}, "image_tokenizer": {"codebook_size": 512},
        }
    )  # fmt: skip


def check_memory(config: Config, *, micro: int) -> dict[str, float]:
    """Each term within 3 %, the whole within 5 %. Returns what was measured."""
    real, planned = measure_memory(config, micro=micro), planned_memory(config, micro=micro, gpu=False)
    for term, size in real.items():
        assert planned[term] == pytest.approx(size, rel=0.05 if term == "peak" else 0.03), term
    return real


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_on_a_gpu_a_layer_keeps_what_the_formula_says(monkeypatch, dropout):
    """Fake tensors that say they are on a GPU, with the flash attention kernel that one would choose there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def flash(query, key, value, **_):
        return torch.ops.aten._scaled_dot_product_flash_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), 0.0, True)[0]

    monkeypatch.setattr(F, "scaled_dot_product_attention", flash)
    micro, width, saved = 3, 96, {}
    config = small(dropout=dropout, num_kv_heads=4)  # fake tensors make transformers repeat grouped heads
    shape = generator_sizes(config).shape
    for layers in (1, 2):
        with FakeTensorMode(), torch.device("cuda"), on_fake_gpu(bf16=True):
            model = built(dataclasses.replace(config.generator, num_layers=layers), shape.V)
            ids = torch.zeros(micro, width, dtype=torch.long)
            saved[layers] = saved_bytes(lambda: model(input_ids=ids, use_cache=False), exclude=model.parameters())  # noqa: B023
    layer = micro * width * layer_bytes_per_token(shape, bf16=True, dropout=dropout > 0) + 2 * shape.layer_matrices
    assert saved[2] - saved[1] == pytest.approx(layer, rel=0.01)
    one = activation_bytes(dataclasses.replace(shape, L=1), micro=micro, width=width, bf16=True, dropout=dropout > 0, checkpointing=False)
    assert one["activations"] + one["bf16_weights"] == pytest.approx(saved[1], rel=0.02)


def test_zero_cuts_what_it_promises_to_cut():
    sizes = generator_sizes(rung("120m"))
    P, N = 4.0 * sizes.parameters, 8
    state = {stage: state_bytes(sizes, stage=stage, gpus=N, optimizer="adamw") for stage in STAGES}
    assert state["ddp"]["optimizer"] == state["zero0"]["optimizer"] == 2 * P
    assert state["zero1"]["optimizer"] == 2 * P / N and state["zero1"]["master"] == P / N and state["zero1"]["gradients"] == P
    assert state["zero2"]["gradients"] == P / N and state["zero2"]["weights"] == P
    assert state["zero3"]["weights"] == P / N
    assert all(state[stage]["ema"] == P for stage in STAGES[:4]) and state["zero3"]["ema"] == P / N  # whole on every GPU below stage 3


def test_a_larger_micro_batch_fits_until_the_largest_and_not_beyond():
    config = rung("350m")
    most = make_plan(config, gpus=8).memory["zero1"]["largest_micro_batch"]
    for micro, fits in ((most, True), (most + 1, False)):
        batch = [f"train.batch_size={8 * micro}", f"train.micro_batch_size={micro}"]
        assert make_plan(rung("350m", *batch), gpus=8).memory["zero1"]["fits"] is fits


def test_where_not_even_one_sample_fits_the_largest_micro_batch_is_none():
    memory = make_plan(rung("7b"), gpu="L4", gpus=64).memory
    assert memory["zero1"]["largest_micro_batch"] == 0 and not memory["zero1"]["fits"]


# --- counts, FLOPs, time --------------------------------------------------------------------------------------------


def test_parameters_and_flops_are_those_of_a_model_that_is_really_built():
    config = from_dict({"generator": {**SMALL, "tie_embeddings": False}, "image_tokenizer": {"channels": [16, 32], "codebook_size": 256}})
    vocabulary, sizes = plan_vocabulary(config), generator_sizes(config)
    model = make_generator(config.generator, vocab_size=vocabulary.size, max_length=512, pad=0, bos=1, eos=2)
    assert sizes.parameters == count_parameters(model)
    assert sizes.embedding == 2 * model.get_input_embeddings().weight.numel()
    assert sizes.flops_per_token == flops_per_token(model, sizes.width)
    assert image_tokenizer_sizes(config).parameters == count_parameters(ImageTokenizer(config.image_tokenizer))


def test_the_longest_sequence_is_as_long_as_the_vocabulary_packs_it():
    config = from_dict({"data": {"max_caption_tokens": 20}})
    vocabulary = dataclasses.replace(plan_vocabulary(config), styles=("etching",), subjects=("ships",))
    tags = Tags("etching", "ships", "plain", vocabulary.default_grid)
    packed = sequences.pack_joint(vocabulary, tags, [0] * 64, [5] * 20)
    assert generator_sizes(config).width == len(packed.input_ids) - 1


def test_with_several_shapes_and_things_the_longest_sequence_is_the_largest_grids():
    config = from_dict({"data": {"max_caption_tokens": 20}})
    vocabulary = dataclasses.replace(
        plan_vocabulary(config), styles=("etching",), subjects=("ships",), things=("brig",), grids=((8, 8), (6, 11), (5, 12))
    )
    packed = sequences.pack_joint(vocabulary, Tags("etching", "ships", "plain", (6, 11), "brig"), [0] * 66, [5] * 20)
    assert sequences.joint_length(vocabulary, 20) == len(packed.input_ids)


def test_the_image_tokenizer_is_traced_as_a_real_one_computes():
    from torch.utils.flop_counter import FlopCounterMode

    config = from_dict({"image_tokenizer": {"channels": [16, 32], "attention": True}}).image_tokenizer
    module, images = Encoder(config), torch.zeros(1, 1, 64, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        saved = saved_bytes(lambda: module(images), exclude=module.parameters())
    flops, kept = traced(lambda: Encoder(config), (1, 1, 64, 64), bf16=False)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert kept == pytest.approx(saved, rel=0.10)
    assert not torch.is_autocast_enabled("cuda")


def test_vgg_has_the_known_multiplications():
    flops, _ = traced(vgg16, (1, 3, 224, 224), bf16=False)
    assert flops / 2 == pytest.approx(15.35e9, rel=0.01)  # convolutions of VGG-16 at 224 px


def test_communication_by_stage():
    def sent(stage: str, gpus: int = 8, accumulation: int = 4) -> float:
        return communication_bytes(1000, stage=stage, gpus=gpus, accumulation=accumulation)

    assert sent("ddp") == sent("zero1") == 2 * 4000 * 7 / 8
    assert sent("zero2") == 5 * 4000 * 7 / 8 and sent("zero2", accumulation=1) == sent("ddp")
    assert sent("zero3") == 12 * 4000 * 7 / 8
    assert all(sent(stage, gpus=1) == 0 for stage in STAGES)


def test_twice_the_gpus_halve_the_computing_and_samples_give_epochs():
    one, two = (make_plan(rung("350m"), gpus=gpus, samples=1_000_000) for gpus in (4, 8))
    assert one.times["compute_seconds"] == pytest.approx(2 * two.times["compute_seconds"])
    assert one.times["epochs"] == pytest.approx(48000 * 512 / 1e6)
    assert one.times["tokens_per_epoch"] == 1e6 * one.sizes.tokens_per_sample
    by_hand = 512 * one.sizes.width * one.sizes.flops_per_token / (4 * 989e12 * 0.4)
    assert one.times["compute_seconds"] == pytest.approx(by_hand)


def test_passes_over_the_pictures_end_the_planned_training_too():
    config = rung("350m")
    config.train.passes = 2.0
    assert make_plan(config, gpus=4, samples=10_000_000).times["epochs"] == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize(("samples", "told"), [(127, True), (1_000_000, False)])
def test_a_plan_that_would_memorise_the_pictures_says_so(samples, told):
    """16,126 epochs of 127 samples were reported like any other number."""
    said = str(make_plan(rung("350m"), gpus=4, samples=samples))
    assert (
        f"WARNING: that many passes would memorise {samples} pictures; about 30 are sensible (train.passes=30, or train.steps=8)" in said
    ) == told
    assert ("WARNING" in said) == told


def test_no_interval_loses_less_than_the_best():
    best = best_interval(54.0, 1.8e5)
    lost = [lost_share(best * f, 54.0, 1.8e5, 600.0) for f in (0.5, 0.9, 1.0, 1.1, 2.0)]
    assert min(lost) == pytest.approx(lost[2], rel=1e-3)
    assert 2.1 < GPU_DAYS_PER_FAILURE / 1000 < 2.12


def test_code_shards_are_as_large_as_planned(tmp_path):
    import io

    import numpy as np

    from tokun.data import CODES_SUFFIX, write_shard

    config = rung("8m")
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((config.codes.views, 256), np.uint16))
    text = json.dumps({"caption": "x" * 788}).encode()
    write_shard(tmp_path / "a.tar", ({"__key__": f"{i:06d}", CODES_SUFFIX: buffer.getvalue(), "json": text} for i in range(200)))
    planned = make_plan(config, samples=200).storage["code_shards"]
    assert planned == pytest.approx((tmp_path / "a.tar").stat().st_size, rel=0.05)


# --- samples and captions -------------------------------------------------------------------------------------------


def test_samples_are_counted_where_they_are(tmp_path):
    config = dataclasses.replace(Config(), out=str(tmp_path))
    assert count_samples(config) == 0
    config.data.toy = 77
    assert count_samples(config) == 77
    (tmp_path / "codes").mkdir()
    record = {"counts": {"train": 123}, "tag_counts": [["etching", "ships", 123]], "codebook_size": 64, "grid": [4, 4]}
    checkpoint.write_record(tmp_path / "codes" / "codes.json", record)
    assert count_samples(config) == 123
    assert plan_vocabulary(config).styles == ("etching",) and generator_sizes(config).codes == 16
    assert mean_caption_tokens(config) == 0.0


# --- the ladder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LADDER)
def test_a_rung_loads_has_its_size_and_states_it(name):
    config = rung(name)
    assert from_dict(to_dict(config)) == config
    sizes = generator_sizes(config)
    assert sizes.parameters == pytest.approx(LADDER[name], rel=0.10)
    header = Path(f"configs/ladder/{name}.yaml").read_text().split("\nout:")[0]
    number, unit = re.search(r"a generator of ([\d.]+)([MB]) parameters", header).groups()
    assert float(number) * {"M": 1e6, "B": 1e9}[unit] == pytest.approx(sizes.parameters, rel=0.01)
    assert "NOT RUN" in header and "Hardware:" in header


@pytest.mark.parametrize("name", LADDER)
def test_a_rung_fits_the_hardware_it_names_and_the_header_says_what_the_plan_says(name):
    header = Path(f"configs/ladder/{name}.yaml").read_text()
    gpu, gpus = re.search(rf"{re.escape(name)}\.yaml --gpu (\S+) --gpus (\d+)", header).groups()
    plan = make_plan(rung(name), gpu=gpu, gpus=int(gpus))
    memory = plan.memory[plan.stage]
    assert memory["fits"] and plan.image_memory < USABLE * plan.gpu.memory
    assert f"{memory['peak'] / GIB:.1f} GiB a GPU" in header
    assert 15 < plan.times["tokens_per_parameter"] < 60


# --- what is said ---------------------------------------------------------------------------------------------------


def test_the_plan_is_text_for_people_and_json_for_programs(capsys):
    planner.main(
        ["--config", "configs/ladder/350m.yaml", "--gpu", "a100-80", "--gpus", "8", "--samples", "1000000", "train.micro_batch_size=32"]
    )
    text = capsys.readouterr().out
    for words in ("8 x A100-80", "358 M parameters", "zero1*", "largest micro", "epochs", "FLOP a training token", "failures"):
        assert words in text
    plan = make_plan(rung("350m"), gpus=8)
    tree = json.loads(json.dumps(plan.as_dict()))
    assert tree["sizes"]["parameters"] == plan.sizes.parameters and math.isfinite(tree["memory"]["zero1"]["peak"])


@pytest.mark.parametrize(
    ("overrides", "options", "words"),
    [
        ([], {"gpu": "H1000"}, "the nearest is H100"),
        ([], {"gpu": "A10"}, "the nearest is A100-80"),
        ([], {"gpu": "4090"}, "the nearest is RTX4090"),
        ([], {"gpus": 0}, "at least one GPU"),
        ([], {"gpus": 3}, "multiple of 3"),
        (["train.micro_batch_size=100"], {}, "micro_batch_size"),
        (["generator.pretrained=gpt2"], {}, "trained from scratch"),
    ],
)
def test_what_cannot_be_planned_is_named(overrides, options, words):
    with pytest.raises(ValueError, match=words):
        make_plan(rung("8m", *overrides), **options)


@pytest.mark.parametrize("name", ["A100-40", "a100 40GB", "NVIDIA A100-40GB", "a100_40"])
def test_a_gpu_may_be_named_as_it_is_elsewhere(name):
    assert make_plan(rung("8m"), gpu=name).gpu.name == "A100-40"


def test_a_gpu_of_two_memory_sizes_is_the_larger_one_and_the_plan_says_so(capsys):
    planner.main(["--config", "configs/ladder/8m.yaml", "--gpu", "A100"])
    text = capsys.readouterr().out
    assert "--gpu A100 is taken as A100-80; name A100-40 for the other memory size" in text and "1 x A100-80" in text


def test_a_missing_deepspeed_file_is_named():
    with pytest.raises(FileNotFoundError, match="zero9"):
        make_plan(rung("8m", "train.deepspeed=configs/deepspeed/zero9.json"))


def test_an_image_tokenizer_of_several_shapes_is_planned_for_the_largest():
    square, shapes = (
        from_dict({"image_tokenizer": {"image_size": 64}}),
        from_dict({"image_tokenizer": {"image_size": 64}, "data": {"grids": ["8x8", "8x12"]}}),
    )
    one, two = image_tokenizer_sizes(square), image_tokenizer_sizes(shapes)
    assert two.encode_flops == pytest.approx(1.5 * one.encode_flops, rel=0.02) and two.parameters == one.parameters
    assert plan_vocabulary(shapes).grids == ((8, 8), (8, 12))
