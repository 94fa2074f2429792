"""Adapters: what training with low rank writes, loads, merges and switches, and that the base is never changed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

import tokun
from tests.fixtures import random_generator
from tests.small_runs import needs, write_config
from tokun.config import GeneratorConfig, from_dict, load_config
from tokun.inference import adapters, decoder
from tokun.inference.description import describe, of_model, title
from tokun.inference.model import Tokun
from tokun.models.generator import make_generator
from tokun.tokenizers import sequences
from tokun.training import adapters as tuning
from tokun.training.generator import GeneratorStage, train_generator
from tokun.training.health import Preempted
from tokun.training.run import open_run
from tokun.training.stages import STAGES
from tokun.utils.errors import UserError

pytestmark = [
    needs("peft", reason="adapters are trained with the extra 'train'"),
    needs("accelerate", reason="training needs the extra 'train'"),
]


def pairs_of(model: Tokun, n: int = 3, **options) -> list[tuple]:
    return [(p.tags, p.codes, p.caption_ids) for p in model.sample(7, n, **options)]


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request, tiny_image_tokenizer, text_tokenizer, tiny_vocabulary, tmp_path_factory) -> Path:
    """A checkpoint of random weights whose head is its embeddings, or is not."""
    v = tiny_vocabulary
    generator = random_generator(v)
    if request.param == "tied":
        torch.manual_seed(2)
        sizes = GeneratorConfig(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, tie_embeddings=True)
        generator = make_generator(sizes, vocab_size=v.size, max_length=128, pad=v.id("<pad>"), bos=v.id("<bos>"), eos=v.id("<eos>"))
    folder = tmp_path_factory.mktemp(request.param) / "base"
    tags = [("engraving", "scenery", 3), ("etching", "", 1)]
    Tokun(tiny_image_tokenizer, text_tokenizer, v, generator, tag_counts=tags, tasks=("joint", "text_to_image")).save(folder)
    return folder


def made(
    base: Path, out: Path, *, seed: int = 0, words: dict[str, tuple[str, ...]] | None = None, most: int | None = None, **settings
) -> Path:
    """An adapter's folder with random weights, as training writes it; of at most so many kinds of pictures."""
    config = from_dict({"start": str(base), "out": str(out), "adapter": {"rank": 2, "alpha": 4.0, **settings}})
    model = tokun.load(base)
    vocabulary = model.vocabulary.extended(**(words or {}))
    torch.manual_seed(seed)
    tuned = tuning.attach(config, model, vocabulary)
    with torch.no_grad():
        for name, parameter in tuned.trained.items():
            parameter += torch.randn_like(parameter) * (0.3 if "lora_B" in name else 0.05)
    out.mkdir(parents=True)
    adapter = tuned.adapter(tuned.tensors(), tag_counts=model.tag_counts[:most], tasks=model.tasks)
    adapters.write(adapter, out)
    return out


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_in_use_computes_what_plain_peft_computes(base, tmp_path, dora):
    import peft

    folder = made(base, tmp_path / "mine", dora=dora, words={"styles": ("lithograph",)})
    model = tokun.load(base, adapter=folder)
    plain = tokun.load(base).generator
    plain.resize_token_embeddings(model.vocabulary.size, mean_resizing=False)
    plain = peft.PeftModel.from_pretrained(plain, folder).eval()
    v = model.vocabulary
    ids = torch.tensor(
        [[*sequences.prefix(v, v.bare()), v.id("<style:lithograph>"), v.id("<boi>"), *range(v.code_offset, v.code_offset + 9)]]
    )
    with torch.no_grad():
        ours, theirs = model.generator(input_ids=ids).logits, plain(input_ids=ids).logits
    assert ours.shape == theirs.shape == (1, ids.shape[1], v.size)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    known, alone = ids[:, 3:], tokun.load(base).generator.eval()
    assert int(known.max()) < tokun.load(base).vocabulary.size
    with torch.no_grad():
        changed, plain = model.generator(input_ids=known).logits, alone(input_ids=known).logits
    assert not torch.allclose(changed[..., : plain.shape[-1]], plain, atol=1e-2), "the adapter changes what the base says of its own ids"


def test_adapters_are_switched_and_the_base_stays_what_it_was(base, tmp_path):
    one, two = made(base, tmp_path / "one"), made(base, tmp_path / "two", seed=1, words={"subjects": ("moths",), "registers": ("studio",)})
    model = tokun.load(base)
    before = {name: p.clone() for name, p in model.generator.state_dict().items()}
    plain = pairs_of(model)
    assert model.add_adapter(one) == "one" and model.add_adapter(two, "second") == "second"
    assert model.adapter == "" and pairs_of(model) == plain
    first, second = pairs_of(model.use_adapter("one")), pairs_of(model.use_adapter("second"))
    assert first != plain != second != first
    assert pairs_of(model, subject="moths") and "studio" in model.vocabulary.registers
    assert pairs_of(model.use_adapter("one")) == first == pairs_of(tokun.load(base, adapter=[one, two]))
    assert pairs_of(model.use_adapter(None)) == plain and model.adapter == ""
    with pytest.raises(ValueError, match="<subject:moths> is not in this vocabulary"):
        model.sample(1, 1, subject="moths")
    after = model.generator.state_dict()
    assert all(torch.equal(after[name], p) for name, p in before.items())
    with pytest.raises(ValueError, match=r"no adapter 'third' \(one, second\)"):
        model.use_adapter("third")


def test_the_fast_decoders_draw_what_the_models_own_forward_draws(base, tmp_path, monkeypatch):
    model = tokun.load(base, adapter=made(base, tmp_path / "mine", words={"styles": ("lithograph",)}))
    assert decoder.TorchDecoder.fits(model.generator)
    fast = pairs_of(model, style="lithograph")
    plain = pairs_of(model.compile(False), style="lithograph")
    monkeypatch.setattr(decoder, "decoder_of", lambda _: None)
    assert pairs_of(model, style="lithograph") == plain == fast


def test_merged_it_is_an_ordinary_checkpoint_with_the_same_samples(base, tmp_path):
    from tokun.adapters import main

    folder = made(base, tmp_path / "mine", words={"styles": ("lithograph",)})
    main(["merge", str(base), str(folder), "--out", str(tmp_path / "merged")])
    merged, used = tokun.load(tmp_path / "merged"), tokun.load(base, adapter=folder)
    assert merged.vocabulary == used.vocabulary and merged.vocabulary.appended == ("<style:lithograph>",)
    assert pairs_of(merged) == pairs_of(used) and pairs_of(merged, style="lithograph") == pairs_of(used, style="lithograph")
    assert merged.score(merged.sample(1, 1)[0].image, "a ship").pmi == used.score(used.sample(1, 1)[0].image, "a ship").pmi
    assert "mine" in merged.card


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_knows_its_base_in_any_precision_and_no_other(base, tmp_path, dtype):
    folder = made(base, tmp_path / "mine")
    model = tokun.load(base, dtype=dtype, adapter=folder)
    assert model.generator.dtype == dtype
    shutil.copytree(base, tmp_path / "other")
    other = tokun.load(tmp_path / "other")
    with torch.no_grad():
        for p in other.generator.parameters():
            p += 0.01 * p.std() * torch.randn_like(p)
    with pytest.raises(
        ValueError,
        match=r"adapter mine was trained on another base, .*base \(\w{12}…\); this model is \w{12}….*"
        r"Load that base \(--checkpoint .*base\)",
    ):
        other.add_adapter(folder)


def test_what_is_no_adapter_is_refused_in_one_line(base, tmp_path):
    model, folder = tokun.load(base), made(base, tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="is a checkpoint, not an adapter"):
        model.add_adapter(base)
    with pytest.raises(FileNotFoundError, match="neither a local folder nor"):
        model.add_adapter("nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds an adapter.*adapter="):
        tokun.load(folder)
    for change, match in (
        ({"peft_type": "IA3"}, "kind 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"bias": "all"}, "trains biases"),
        ({"use_rslora": True}, "sets use_rslora"),
        ({"fan_in_fan_out": True}, "sets fan_in_fan_out"),
        ({"r": "two"}, "r is 'two'"),
        ({"trainable_token_indices": [3]}, "must name the ids of each module"),
    ):
        broken = tmp_path / f"broken-{match}"
        shutil.copytree(folder, broken)
        (broken / adapters.CONFIG).write_text(json.dumps(json.loads((folder / adapters.CONFIG).read_text()) | change))
        with pytest.raises(ValueError, match=match):
            model.add_adapter(broken)
    (folder / adapters.ABOUT).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter\.json is missing: it was not written by tokun"):
        model.add_adapter(folder)


def test_a_broken_adapter_is_refused_in_one_line_that_says_what_is_broken(base, tmp_path):
    model, folder = tokun.load(base), made(base, tmp_path / "mine", words={"styles": ("lithograph",)})
    tensors, first = load_file(folder / adapters.WEIGHTS), "base_model.model.model.layers.0.mlp.down_proj.lora_"
    about = json.loads((folder / adapters.ABOUT).read_text())
    (rows, *_) = [name for name in tensors if name.endswith("trainable_tokens_delta")]

    def file(change: dict) -> bytes:
        return save({name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None})

    whole = (folder / adapters.WEIGHTS).read_bytes()
    for part, content, match in (
        (adapters.WEIGHTS, whole[: len(whole) // 2], "cannot be read: SafetensorError"),
        (adapters.WEIGHTS, b"", "cannot be read: SafetensorError"),
        (adapters.WEIGHTS, file({first + "B.weight": None}), rf"lacks {first}B\.weight: it is incomplete"),
        (adapters.WEIGHTS, file({first + "A.weight": None}), rf"holds {first}B\.weight, which is not supported"),
        (adapters.WEIGHTS, file({first + "A.weight": torch.zeros(3, 5)}), r"lora_A\.weight has the shape \[3, 5\], not 2 x any"),
        (adapters.WEIGHTS, file({first + "embedding_A": torch.zeros(3, 5)}), "lora_embedding_A, which is not supported"),
        (adapters.WEIGHTS, file({rows: tensors[rows][:0]}), r"has the shape \[0, 64\], not 1 x any"),
        (adapters.CONFIG, b"\xff\xfe{", "cannot be read: UnicodeDecodeError"),
        (adapters.CONFIG, b"[]", "cannot be read: AttributeError"),
        (adapters.CONFIG, b"{", "cannot be read: JSONDecodeError"),
        (adapters.ABOUT, json.dumps(about | {"tag_counts": [["etching", "", "many"]]}).encode(), "cannot be read: "),
        (adapters.ABOUT, json.dumps(about | {"defaults": {"heat": 1}}).encode(), "cannot be read: TypeError"),
        (adapters.ABOUT, json.dumps(about | {"defaults": {"best_of": 0}}).encode(), "adapter.json: defaults.best_of is 0; it must be"),
    ):
        shutil.copytree(folder, tmp_path / "broken", dirs_exist_ok=True)
        (tmp_path / "broken" / part).write_bytes(content)
        with pytest.raises(UserError, match=match) as caught:
            model.add_adapter(tmp_path / "broken")
        assert "\n" not in str(caught.value)
    shutil.copytree(folder, tmp_path / "broken", dirs_exist_ok=True)
    (tmp_path / "broken" / adapters.WEIGHTS).write_bytes(file({first + "A.weight": torch.zeros(2, 5)}))
    with pytest.raises(UserError, match=r"changes model\.layers\.0\.mlp\.down_proj as \[64, 5\], this generator's is .* another base"):
        model.use_adapter(model.add_adapter(tmp_path / "broken"))


def test_an_adapter_that_names_its_new_tags_twice_as_earlier_ones_do_is_read(base, tmp_path):
    folder = made(base, tmp_path / "mine", words={"styles": ("lithograph",)})
    about = json.loads((folder / adapters.ABOUT).read_text())
    assert "new_tags" not in about
    (folder / adapters.ABOUT).write_text(json.dumps(about | {"new_tags": ["<style:lithograph>"]}))
    assert adapters.read(folder).new_tags == ("<style:lithograph>",)


BASE_CARD = (
    "---\nlicense: apache-2.0\ntags: [tokun, ships]\n---\n\n# Ships\n\nDraws ships.\n\n## Figures\n\n| figure | value |\n| --- | --- |\n"
    "| PSNR | 16.9 dB |\n"
)


def test_a_merged_model_has_a_card_of_its_own_and_its_bases_below_a_heading_that_says_so(base, tmp_path):
    """The base's card was handed on as the merged model's own, with its data, recipe and figures; one line far below named the adapter."""
    model = tokun.load(base, adapter=made(base, tmp_path / "mine"))
    model.base.card = BASE_CARD
    model.adapters["mine"] = dataclasses.replace(
        model.adapters["mine"],
        card="---\nlicense: cc-by-4.0\n---\n\n# mine\n\nTrained on 40 pictures. It changes the base **/home/anna/x** and no other.\n\n"
        "## Figures\n\n| figure | value |\n| - | - |\n| nats | 4.1 |\n",
    )
    model.save_pretrained(tmp_path / "merged")
    card, told = tokun.load(tmp_path / "merged").card, describe(tmp_path / "merged")
    assert told.name == title(card) == "Ships, with the adapter mine merged in" and (told.figures, told.license) == (
        {"nats": "4.1"},
        "cc-by-4.0",
    )
    assert "This is **Ships** with the adapter **mine** merged into its weights. Of the adapter: Trained on 40 pictures.\n" in card
    own, _, below = card.partition("\n## The base: Ships\n")
    assert "mine: LoRA of rank 2, alpha 4, on " in own and "16.9" not in own and "| PSNR | 16.9 dB |" in below and "anna" not in card
    assert "those of the base alone" in below and "apache-2.0" in below and "\n### Figures\n" in below
    model.use_adapter(None).save_pretrained(tmp_path / "plain")
    assert tokun.load(tmp_path / "plain").card == BASE_CARD


def test_a_merged_model_whose_adapter_was_not_measured_has_no_figures(base, tmp_path):
    model = tokun.load(base, adapter=made(base, tmp_path / "mine"))
    model.base.card = BASE_CARD
    model.save_pretrained(tmp_path / "merged")
    assert describe(tmp_path / "merged").figures == {} and "The adapter has no card" in (tmp_path / "merged" / "README.md").read_text()
    assert of_model(model).figures == {} and of_model(model).name == "Ships, with the adapter mine"


# --- training ---------------------------------------------------------------------------------------------------------

LORA = (
    "adapter.rank=2",
    "adapter.alpha=4.0",
    "train.lr=0.01",
    "data.style=lithograph",
    "data.style_key=none",
    "sampling.n=1",
    "codes.views=1",
)


def lora(folder: Path, shards: Path, base: Path, *overrides: str, **changes) -> tuple[str, Path]:
    """Overrides of a small run that trains an adapter, and its folder."""
    config = write_config(folder, shards, **changes)
    return config, [f"start={base}", *LORA, *overrides]


def run_of(config: Path, overrides) -> Path:
    run = open_run(load_config(config, overrides))
    for stage in STAGES:
        stage(run)
    run.close()
    return run.out


@pytest.fixture(scope="module")
def trained(checkpoint_folder, small_shards, tmp_path_factory) -> tuple[Path, list[str], Path]:
    """(config, overrides, out) of a run of eight steps that was never stopped."""
    config, overrides = lora(tmp_path_factory.mktemp("lora"), small_shards, checkpoint_folder, train__keep_best=1)
    return config, overrides, run_of(config, overrides)


def test_a_run_leaves_an_adapter_that_is_small_carded_and_better_on_its_pictures(trained, checkpoint_folder):
    _, _, out = trained
    assert not (out / "checkpoint").exists() and sorted(path.name for path in (out / "adapter").iterdir()) == [
        "README.md", "adapter.json", "adapter_config.json", "adapter_model.safetensors", "training.json", "vocabulary.json",
    ]  # fmt: skip
    record = json.loads((out / "adapter" / "training.json").read_text())
    assert record["trained"] < 0.1 * record["parameters"] and set(record["val"]) == {"image_loss", "text_loss"}
    model = tokun.load(checkpoint_folder, adapter=out)
    assert model.vocabulary.appended == ("<subject:geometry>",) and model.adapter == out.name
    assert any(pair.tags.subject == "geometry" for pair in model.sample(1, 8)), "as often as in its own training data"
    for said in (str(checkpoint_folder), "rank 2", "`<subject:geometry>`", "resize_token_embeddings", "48 pictures"):
        assert said in model.card
    (best,) = (out / "best").glob("step-*")
    assert tokun.load(checkpoint_folder, adapter=best).sample(1, 1)
    base, held = tokun.load(checkpoint_folder), json.loads((out / "adapter" / "training.json").read_text())["val"]
    assert base.vocabulary.appended == () and held["text_loss"] < 6.6, "6.8 at the start"
    weights = load_file(out / "adapter" / adapters.WEIGHTS)
    assert any(name.endswith("trainable_tokens_delta") for name in weights) and any(
        w.abs().max() > 0 for n, w in weights.items() if "lora_B" in n
    )


def test_sampling_settings_that_are_named_stand_above_the_bases_also_at_their_usual_values(base, tmp_path):
    own = tmp_path / "base"
    shutil.copytree(base, own)
    settings = json.loads((own / "sampling.json").read_text())
    settings["defaults"] |= {"guidance_scale": 4.0, "text_temperature": 0.4, "top_k": 9}
    (own / "sampling.json").write_text(json.dumps(settings))
    config = from_dict({"start": str(own), "adapter": {"rank": 2}, "sampling": {"guidance_scale": 1, "top_k": 5}})
    tuning.take_shape(config)
    tuning.take_shape(config)  # and again
    assert (config.sampling.guidance_scale, config.sampling.text_temperature, config.sampling.top_k) == (1.0, 0.4, 5)


def test_stopped_and_typed_again_it_ends_in_the_same_adapter(trained, checkpoint_folder, tmp_path):
    config, overrides, whole = trained
    for part in ("text_tokenizer", "image_tokenizer", "codes"):
        shutil.copytree(whole / part, tmp_path / "run" / part)
    overrides = [*overrides, f"out={tmp_path / 'run'}"]
    run = open_run(load_config(config, overrides))
    log = run.tracker.log

    def stop(figures, *, step):
        run.stop.asked = run.stop.asked or step == 5
        log(figures, step=step)

    run.tracker.log = stop
    with pytest.raises(Preempted):
        train_generator(run)
    run.close()
    (state,) = [path for path in (tmp_path / "run" / "state" / "generator").iterdir() if path.name == "step-00000005"]
    assert (state / "engine.pt").stat().st_size < 150_000, "the base is not in it"
    run = open_run(load_config(config, overrides))
    train_generator(run)
    run.close()
    one, other = (load_file(out / "adapter" / adapters.WEIGHTS) for out in (whole, tmp_path / "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_was_held_out_is_measured_before_the_first_step_and_told_beside_the_end(trained, tmp_path, capfd):
    """An adapter's training showed one held-out value and none of the base: nobody could tell whether it had helped."""
    config, overrides, whole = trained
    for part in ("text_tokenizer", "image_tokenizer", "codes"):
        shutil.copytree(whole / part, tmp_path / "run" / part)
    logged: list[tuple[int, set[str]]] = []

    def start(stop_at: int) -> str:
        run = open_run(load_config(config, [*overrides, f"out={tmp_path / 'run'}"]))

        def note(figures, *, step):
            run.stop.asked = run.stop.asked or step == stop_at
            logged.append((step, set(figures)))

        run.tracker.log = note
        with contextlib.suppress(Preempted):
            train_generator(run)
        run.close()
        return capfd.readouterr().out

    before = "generator: held out before training: image_loss "
    assert before in start(5) and logged[0] == (0, {"val/image_loss", "val/text_loss"})
    resumed = start(0)
    assert before not in resumed and [step for step, _ in logged].count(0) == 1
    records = [json.loads((out / "adapter" / "training.json").read_text()) for out in (whole, tmp_path / "run")]
    assert records[0]["val_before"] == records[1]["val_before"] and set(records[0]["val_before"]) == {"image_loss", "text_loss"}
    image, after = records[1]["val_before"]["image_loss"], records[1]["val"]["image_loss"]
    assert f"Held out: image_loss {image:.4g} before training, {after:.4g} after; text_loss " in resumed
    assert f"| held-out nats per image token, before training | {image:.3f} |" in (tmp_path / "run" / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("end", [99.0, 0.1])
def test_training_that_did_not_help_says_so_and_what_the_loss_is(trained, tmp_path, capfd, monkeypatch, end):
    config, overrides, whole = trained
    for part in ("text_tokenizer", "image_tokenizer", "codes"):
        shutil.copytree(whole / part, tmp_path / "run" / part)
    measured = []

    def of(self, held, real=GeneratorStage._loss_of):
        return end if measured and held is not self.held_before else real(self, held)

    monkeypatch.setattr(GeneratorStage, "_loss_of", of)
    monkeypatch.setattr(GeneratorStage, "finish", lambda self, target, real=GeneratorStage.finish: (measured.append(1), real(self, target)))
    run = open_run(
        load_config(config, [*overrides, f"out={tmp_path / 'run'}", "train.image_weight=0.5", "train.steps=4", "train.eval_every=2"])
    )
    train_generator(run)
    run.close()
    said = capfd.readouterr().out
    assert ("training has not helped" in said) == (end == 99.0)
    assert "(0.5 x image + 1 x text: compare it only with runs of these weights)" in said


def test_a_finished_adapter_is_left_alone_unless_its_base_is_another_now(trained, tmp_path):
    config, overrides, whole = trained
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "training.json"
    record = json.loads(path.read_text())

    def again() -> None:
        run = open_run(load_config(config, [*overrides, f"out={tmp_path / 'run'}"]))
        try:
            train_generator(run)
        finally:
            run.close()

    again()
    made_on = record["settings"].pop("start_fingerprint")
    path.write_text(json.dumps(record))
    again()  # of an older version, which did not keep it
    assert made_on == json.loads((whole / "adapter" / "adapter.json").read_text())["base_fingerprint"]
    path.write_text(json.dumps(record | {"settings": record["settings"] | {"start_fingerprint": "0" * 64}}))
    with pytest.raises(ValueError, match=r"started from other weights than start .* holds now .*put the old checkpoint back"):
        again()


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("start=", "needs a trained model"),
        ("adapter.bits=3", "8 or 4"),
        ("adapter.alpha=0.0", "alpha must be above 0"),
        ("adapter.targets=[q_proj,c_attn]", "names c_attn; the base's layers are down_proj"),
        ("data.grids=[8x8]", "an adapter keeps the base's shapes"),
    ],
)
def test_what_an_adapter_cannot_be_is_told_in_one_line(checkpoint_folder, small_shards, tmp_path, override, match):
    config, overrides = lora(tmp_path, small_shards, checkpoint_folder, override)
    with pytest.raises(ValueError, match=match):
        config = load_config(config, overrides)
        run = open_run(config)
        tuning.attach(config, tokun.load(checkpoint_folder), tokun.load(checkpoint_folder).vocabulary)
        run.close()


def test_without_bitsandbytes_a_base_in_few_bits_is_refused_and_the_way_out_named(tmp_path, small_shards, checkpoint_folder, monkeypatch):
    config, overrides = lora(tmp_path, small_shards, checkpoint_folder, "adapter.bits=4")
    monkeypatch.setattr(tuning.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'tokun\[bits\]', or adapter\.bits=0"):
        tuning.check(load_config(config, overrides))


@needs("bitsandbytes", reason="bases in few bits need the extra 'bits'")
@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_trained_over_a_base_in_few_bits_is_used_on_the_whole_one(tmp_path, small_shards, checkpoint_folder, bits):
    config, overrides = lora(tmp_path, small_shards, checkpoint_folder, f"adapter.bits={bits}")
    out = run_of(config, overrides)
    record = json.loads((out / "adapter" / "training.json").read_text())
    assert record["val"]["image_loss"] < record["val_before"]["image_loss"]
    assert len(tokun.load(checkpoint_folder, adapter=out).sample(1, 2)) == 2
    assert f"over a base in {bits} bits" in (out / "adapter" / "README.md").read_text()
    if bits == 8:
        return
    (tmp_path / "again").mkdir()
    config, overrides = lora(tmp_path / "again", small_shards, checkpoint_folder, f"adapter.bits={bits}", "train.eval_every=1")
    weights = [load_file(place / "adapter" / "adapter_model.safetensors") for place in (out, run_of(config, overrides))]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]), "held-out losses change what is learned"


def test_the_commands_take_an_adapter_and_tell_what_it_is(base, tmp_path, capsys):
    from tokun.adapters import main
    from tokun.app.page import parse
    from tokun.cli import sample

    folder = made(base, tmp_path / "mine", words={"styles": ("lithograph",)})
    sample.main(
        [
            "--checkpoint",
            str(base),
            "--adapter",
            str(folder),
            "--style",
            "lithograph",
            "--seed",
            "7",
            "--n",
            "2",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    drawn = [json.loads(line)["codes"] for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert drawn == [codes for _, codes, _ in pairs_of(tokun.load(base, adapter=folder), 2, style="lithograph")]
    main(["show", str(folder)])
    assert "LoRA of rank 2, alpha 4" in capsys.readouterr().out
    assert parse(["--adapter", "mine"]).adapter == ["mine"], "it may be repeated"


def test_an_adapter_is_in_use_within_a_second_and_takes_two_megabytes_at_most_beside_the_bundled_model(tmp_path):
    import time

    from tokun.inference.folders import BUNDLED

    if not BUNDLED.is_dir():
        pytest.skip("no checkpoint is bundled in this checkout")
    folder = made(
        BUNDLED, tmp_path / "mine", most=100, rank=load_config("configs/lora.yaml").adapter.rank
    )  # a hundred pictures are a hundred kinds at most
    model = tokun.load()
    began = time.process_time()
    model.use_adapter(model.add_adapter(folder))
    assert time.process_time() - began < 1
    if sum(p.numel() for p in model.generator.parameters()) < 10e6:
        assert sum(path.stat().st_size for path in folder.iterdir()) < 2e6


def test_a_plan_of_an_adapter_is_refused():
    from tokun.cli.train import main

    with pytest.raises(ValueError, match="covers only the training of a whole model"):
        main(["--config", "configs/lora.yaml", "--plan"])


def test_an_adapter_keeps_its_bases_tasks(base, tmp_path):
    """One that was trained on pairs alone could not be asked questions any more."""
    folder = made(base, tmp_path / "mine")
    about = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps(about | {"tasks": ["joint"]}))
    assert tokun.load(base, adapter=folder).tasks == ("joint", "text_to_image")
    older = tokun.load(base)
    older.tasks = ()  # not recorded: nothing is refused
    assert older.use_adapter(older.add_adapter(folder)).tasks == ()


def test_an_adapter_knows_its_bases_questions_and_its_own(base, tmp_path):
    folder = made(base, tmp_path / "mine")
    about, model = json.loads((folder / "adapter.json").read_text()), tokun.load(base)
    model.tasks, model.question_wordings = ("joint", "question"), ("what is shown",)
    for own, known in ((None, ("what is shown",)), (["is this a …"], ("what is shown", "is this a …")), ([], ())):
        (folder / "adapter.json").write_text(json.dumps(about | {"question_wordings": own}))
        assert model.use_adapter(model.add_adapter(folder)).question_wordings == known
        model.use_adapter(None)
        assert model.question_wordings == ("what is shown",)
