"""Promises of the matching head: trained beside a generator, it says how well captions fit pictures, and chooses the best."""

import json
import shlex
import shutil
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tokun
from data_tools import toy
from tests.small_runs import needs
from tests.test_adapters import made
from tokun.align import matching as training
from tokun.align import policy, rewards
from tokun.align.matching import Recipe, add_head
from tokun.cli import sample
from tokun.config import RewardConfig, from_dict
from tokun.evaluate import coherence, stored_samples
from tokun.inference import candidates, hub
from tokun.inference.description import describe
from tokun.inference.matching import layers_of, picture_states
from tokun.models.matching import MatchingConfig, MatchingHead
from tokun.tokenizers.text import TextTokenizer
from tokun.tokenizers.vocabulary import Tags
from tokun.training.fine_tuning import TuningStage
from tokun.training.generator import matching_command
from tokun.utils.errors import UserError

RECIPE = Recipe(epochs=40, batch_size=40, dropout=0.1, weight_decay=0.1)


@pytest.fixture(scope="module", autouse=True)
def _few_pictures_are_enough():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LEAST", 32)
        yield


@pytest.fixture(scope="module")
def shards(small_shards):
    return str(small_shards / "train-*.tar")


@pytest.fixture(scope="module")
def matched(checkpoint_folder, shards, tmp_path_factory):
    """The tiny checkpoint with a head that was trained on toy pictures."""
    return add_head(checkpoint_folder, shards, tmp_path_factory.mktemp("head") / "matched", RECIPE, device="cpu")


@pytest.fixture
def model(matched):
    return tokun.load(matched, device="cpu")


def test_two_towers_learn_which_of_many_belong_together():
    torch.manual_seed(0)
    states, v = torch.randn(200, 16), 30
    # a caption says which two numbers of the first twelve are the largest
    captions = [sorted(row[:12].topk(2).indices.tolist()) for row in states]
    head = MatchingHead(MatchingConfig((1,), 8, v, hidden_size=64, size=32), dropout=0.1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(60):
        some = torch.randperm(150)[:50]
        loss = head.loss(states[some], head.bags([captions[i] for i in some.tolist()]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    with torch.inference_mode():
        fit = head.fit(states[150:], captions[150:])
    others = torch.tensor([[a != b for b in captions[150:]] for a in captions[150:]])
    beaten = (fit.diagonal()[:, None] > fit)[others].float().mean()
    assert beaten > 0.9, f"of pictures it has not seen it ranks the own caption above {beaten:.0%} of others (chance 50 %)"


def test_bags_hold_each_piece_once_by_its_rarity():
    head = MatchingHead(MatchingConfig((1,), 4, 6))
    head.rarity.copy_(torch.tensor([1.0, 2.0, 0, 0, 0, 2.0]))
    assert torch.allclose(head.bags([[1, 5, 1], [0]]), torch.tensor([[0, 0.5**0.5, 0, 0, 0, 0.5**0.5], [1.0, 0, 0, 0, 0, 0]]))


def test_rare_pieces_count_for_more():
    rarity = training.rarity_of([[1, 2], [1], [1, 1]], 4)
    assert rarity.tolist() == pytest.approx([0, 0, np.log(3), 0])


def test_a_picture_is_read_alone_and_without_its_kind(shaped_model):
    pairs = shaped_model.sample(2, 6)
    codes, tags = [p.codes for p in pairs], [p.tags for p in pairs]
    layers = layers_of(shaped_model.generator.config.num_hidden_layers)
    states = picture_states(shaped_model.generator, shaped_model.vocabulary, layers, codes, tags, batch_size=2)
    width = shaped_model.generator.config.hidden_size
    assert states.shape == (6, 2 * len(layers) * width)
    bare = [Tags(grid=one.grid, register="era") for one in tags]
    for i in (0, 5):
        one = picture_states(shaped_model.generator, shaped_model.vocabulary, layers, [codes[i]], [bare[i]])
        assert torch.allclose(one[0], states[i], atol=1e-4)


def test_the_new_checkpoint_is_the_old_one_and_its_head(checkpoint_folder, matched, model):
    assert sorted(p.name for p in matched.iterdir()) == sorted([*(p.name for p in checkpoint_folder.iterdir()), "matching"])
    assert not matched.with_name("matched-state").exists()
    before = tokun.load(checkpoint_folder, device="cpu")
    assert before.matching is None and model.matching is not None
    for a, b in zip(before.sample(5, 3), model.sample(5, 3)):
        assert (a.codes, a.caption, a.image.tobytes()) == (b.codes, b.caption, b.image.tobytes())


def test_it_has_learned_its_pictures(model, shards, tmp_path):
    seen = training.read(model, shards, tmp_path)
    with torch.inference_mode():
        fit = model.matching.fit(seen.states, seen.captions).numpy()
    better = np.mean([fit[i, i] > fit[i, j] for i in range(len(fit)) for j in range(len(fit)) if seen.captions[i] != seen.captions[j]])
    assert better > 0.8, f"a training picture's own caption is above {better:.0%} of the others (chance 50 %)"


def test_killed_and_typed_again_it_reads_no_shard_twice_and_ends_in_the_same_weights(
    checkpoint_folder, shards, matched, tmp_path, monkeypatch
):
    read_shard, opened = training._read_shard, []

    def dies(model, path, caption_key):
        if len(opened) == 1:
            raise KeyboardInterrupt
        opened.append(path)
        return read_shard(model, path, caption_key)

    monkeypatch.setattr(training, "_read_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        add_head(checkpoint_folder, shards, tmp_path / "new", RECIPE, device="cpu")
    assert len(opened) == 1 and not (tmp_path / "new").exists()
    monkeypatch.setattr(training, "_read_shard", lambda *a: opened.append(a[1]) or read_shard(*a))
    with pytest.raises(UserError, match="caption_key"):
        add_head(checkpoint_folder, shards, tmp_path / "new", RECIPE, caption_key="words", device="cpu")
    again = add_head(checkpoint_folder, shards, tmp_path / "new", RECIPE, device="cpu")
    assert len(opened) == len(set(opened)) > 1
    one, two = (load_file(folder / "matching" / "model.safetensors") for folder in (matched, again))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_head_goes_on_from_that_of_the_start(checkpoint_folder, matched, shards, tmp_path):
    """A generator that went on from another one needs few steps to make its head fit."""
    few = replace(RECIPE, epochs=1, lr=1e-6)
    again = add_head(checkpoint_folder, shards, tmp_path / "again", few, start=matched, device="cpu")
    one, two = (load_file(folder / "matching" / "model.safetensors") for folder in (matched, again))
    assert torch.allclose(one["text.weight"].float(), two["text.weight"].float(), atol=1e-3)
    assert torch.equal(one["rarity"], two["rarity"])


def test_a_training_that_goes_on_from_a_head_ends_with_the_command_for_its_own(checkpoint_folder, matched, tmp_path):
    given = {"out": "my runs/mine/", "start": str(matched), "data": {"train": "shards/train-*.tar", "val": "", "caption_key": "words"}}
    said = matching_command(checkpoint_folder, from_dict(given))
    name, command, *options = shlex.split(said, comments=True)
    args = training.make_parser().parse_args(options)
    assert (name, command, args.checkpoint, args.start) == ("tokun", "match", str(checkpoint_folder), str(matched))
    assert (args.train, args.val, args.caption_key, str(args.out)) == ("shards/train-*.tar", "", "words", "my runs/mine-matched")
    deeper = shutil.copytree(checkpoint_folder, tmp_path / "deeper")
    config = json.loads((deeper / "generator" / "config.json").read_text())
    (deeper / "generator" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
    assert matching_command(deeper, from_dict(given)) == "", "the head reads other layers"
    for start in (str(checkpoint_folder), "", str(tmp_path / "moved")):
        assert matching_command(checkpoint_folder, from_dict({**given, "start": start})) == ""
    assert matching_command(checkpoint_folder, from_dict({**given, "adapter": {"rank": 4}})) == ""


def test_a_start_that_does_not_fit_is_refused(checkpoint_folder, matched, shards, tmp_path):
    def begin(start):
        add_head(checkpoint_folder, shards, tmp_path / "new", RECIPE, start=start, device="cpu")

    with pytest.raises(UserError, match=r"--start .* has no matching head: leave --start out"):
        begin(checkpoint_folder)
    other = shutil.copytree(matched, tmp_path / "other")
    MatchingHead(MatchingConfig((1, 2), 99, 10)).save(other / "matching")
    with pytest.raises(UserError, match=r"its head reads MatchingConfig\(layers=\(1, 2\), width=99"):
        begin(other)
    pieces = shutil.copytree(matched, tmp_path / "pieces")
    TextTokenizer.train(["another text", "of other pieces"], vocab_size=300).save(pieces / "text_tokenizer.model")
    with pytest.raises(UserError, match="cuts captions into other pieces"):
        begin(pieces)
    assert not (tmp_path / "new").exists()


def test_layers_of_several_widths_are_refused_at_the_first_shard(tiny_model, toy_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "picture_states", lambda *a: torch.zeros(10, 7))
    with pytest.raises(UserError, match=r"give 7 numbers, not .*layers of one width"):
        training.read(tiny_model, str(toy_shards / "train-00000.tar"), tmp_path)


def test_how_often_held_out_pairs_are_found_is_told(checkpoint_folder, shards, small_shards, tmp_path, capsys):
    held = str(small_shards / "val-*.tar")
    add_head(checkpoint_folder, shards, tmp_path / "new", replace(RECIPE, epochs=1), val=held, device="cpu")
    assert "the own caption is the first of 16 for" in capsys.readouterr().out


def test_shards_of_one_name_in_two_folders_are_both_read(tiny_model, tmp_path):
    for name, seed in (("a", 5), ("b", 6)):
        (tmp_path / name).mkdir()
        toy.write_shards(tmp_path / name, 10, seed, 32)
    one, two, both = (
        training.read(tiny_model, ",".join(str(tmp_path / name / "train-*.tar") for name in names), tmp_path) for names in ("a", "b", "ab")
    )
    assert not torch.equal(one.states, two.states) and torch.equal(both.states, torch.cat([one.states, two.states]))
    assert both.captions == one.captions + two.captions and one.captions != two.captions


def test_a_shard_without_a_usable_pair_is_passed_over(tiny_model, toy_shards, tmp_path):
    tarfile.open(tmp_path / "train-00009.tar", "w").close()
    shutil.copy(toy_shards / "train-00000.tar", tmp_path)
    assert len(training.read(tiny_model, str(tmp_path / "train-*.tar"), tmp_path).captions) == 10


def test_states_that_are_no_numbers_are_refused(tiny_model, toy_shards, tmp_path, monkeypatch):
    width = training.config_for(tiny_model).width * 2 * len(training.config_for(tiny_model).layers)
    monkeypatch.setattr(training, "picture_states", lambda *a: torch.full((10, width), torch.inf))
    with pytest.raises(UserError, match=r"train-00000\.tar: the generator's hidden states are not finite"):
        training.read(tiny_model, str(toy_shards / "train-00000.tar"), tmp_path)


def test_weights_that_were_trained_further_have_no_head(model):
    """GRPO's result, and that of preferences and words."""
    config = from_dict({"start": "x"})
    trained = policy.Policy(config, model)
    trained.engine = SimpleNamespace(whole_model=lambda: trained.model)
    assert model.matching is not None and trained.whole().matching is None
    engine = SimpleNamespace(whole_model=lambda: model.generator)
    stage = SimpleNamespace(base=model, tasks=(), tuned=None, engine=engine, vocabulary=model.vocabulary, config=config)
    assert TuningStage.whole(stage).matching is None


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_the_head_chooses_by_default_whatever_the_number_of_choices(model):
    assert candidates.default_score(model) == "match"
    pairs = model.draw(3, range(12), model.plan())
    scores = model.match(pairs)
    best = [max(range(i, i + 4), key=lambda j: scores[j]) for i in (0, 4, 8)]
    chosen = model.best_of(3, 3, 4)
    assert [pair.index for pair in chosen] == best
    assert [pair.index for pair in model.best_of(3, 1, 4, first=2)] == best[2:]
    assert [pair.index for pair in model.best_of(3, 3, 4, "match")] == best
    assert model.best_of(3, 3, 4, "pmi_both") == model.best_of(3, 3, 4, candidates.own_score(model, "pmi_both"))


def test_captions_of_other_registers_are_not_judged_by_it(model):
    assert candidates.default_score(model, "plain") == "match" and candidates.default_score(model, "era") == "pmi_both"
    assert model.best_of(3, 2, 4, register="era") == model.best_of(3, 2, 4, "pmi_both", register="era")


def test_a_choice_is_recorded_with_its_head(model, tiny_model, tmp_path):
    own = {"matching": model.matching.fingerprint()}
    assert candidates.chosen_by(model, "") == candidates.chosen_by(model, "match") == own
    assert candidates.chosen_by(model, "pmi") == candidates.chosen_by(model, "", "era") == candidates.chosen_by(tiny_model, "") == {}
    stored_samples.draw(model, tmp_path, 1, 1, best_of=2, reward="match")
    with torch.no_grad():
        model.matching.text.weight.mul_(2)
    with pytest.raises(UserError, match="matching"):
        stored_samples.draw(model, tmp_path, 2, 1, best_of=2, reward="match")


def test_without_a_head_pmi_in_both_directions_chooses(tiny_model):
    assert candidates.default_score(tiny_model) == "pmi_both"
    assert tiny_model.best_of(3, 2, 4) == tiny_model.best_of(3, 2, 4, "pmi_both")
    with pytest.raises(UserError, match="tokun match"):
        tiny_model.best_of(3, 2, 4, "match")
    with pytest.raises(UserError, match="tokun match"):
        stored_samples.chosen(tiny_model, 4, "match")
    with pytest.raises(UserError, match="score is 'mtach'"):
        tiny_model.best_of(3, 2, 4, "mtach")


def test_its_score_does_not_depend_on_the_other_pairs(model):
    pairs = model.sample(4, 5)
    assert model.match(pairs[2:3]) == pytest.approx(model.match(pairs)[2:3], abs=1e-4)
    assert model.match([]) == []


def test_sample_py_asks_for_a_head_before_it_draws(checkpoint_folder, matched, tmp_path, monkeypatch):
    drawn = ["--n", "1", "--best-of", "2", "--reward", "match", "--device", "cpu"]
    sample.main([*drawn, "--checkpoint", str(matched), "--out", str(tmp_path / "a")])
    assert (tmp_path / "a" / "samples.jsonl").is_file()
    monkeypatch.setattr(tokun.inference.model.Tokun, "draw", None)
    with pytest.raises(UserError, match="no matching head"):
        sample.main([*drawn, "--checkpoint", str(checkpoint_folder), "--out", str(tmp_path / "b")])


def test_it_is_a_reward(model, tiny_model):
    pairs = model.sample(4, 3)
    (reward,) = rewards.make([RewardConfig(kind="match")], model)
    assert reward(pairs) == model.match(pairs)
    with pytest.raises(UserError, match=r"grpo\.rewards\[0\] \(match\).*no matching head"):
        rewards.make([RewardConfig(kind="match")], tiny_model)


def test_the_evaluation_tells_how_often_it_is_right(model, tiny_model):
    pairs = model.sample(4, 20)
    (figure,) = coherence.by_head(model, pairs, "generated", 0)
    assert figure.name == "the matching head ranks the own caption first of 16, generated" and 0 <= figure.value <= 1
    assert coherence.by_head(tiny_model, pairs, "generated", 0) == []


@needs("peft", reason="adapters are trained with the extra 'train'")
def test_an_adapters_pairs_are_judged_by_the_head_of_its_base_as_the_base_reads_them(matched, tmp_path, monkeypatch):
    model = tokun.load(matched, device="cpu", adapter=made(matched, tmp_path / "mine", words={"styles": ("lithograph",)}))
    pairs = model.sample(4, 2, style="lithograph")
    assert candidates.default_score(model) == "match" and model.base is not None
    assert not torch.equal(model.generator.model.layers[0].mlp.up_proj.weight, model.base.generator.model.layers[0].mlp.up_proj.weight)
    by_adapter, many = model.match(pairs), model.sample(4, 20)
    (figure,) = coherence.by_head(model, many, "generated", 0)
    assert candidates.chosen_by(model, "") == {"matching": model.matching.fingerprint()}
    said = "a matching head chooses among candidates"
    assert said in repr(model) and said in "\n".join(describe(tmp_path / "mine").lines())
    assert by_adapter == model.use_adapter(None).match(pairs) and figure == coherence.by_head(model, many, "generated", 0)[0]
    model.use_adapter("mine").save(tmp_path / "merged")
    monkeypatch.setattr(hub, "_upload", lambda write, name, **_: write(tmp_path / "uploaded", "me/mine"))
    model.push_to_hub("mine")
    for folder in ("merged", "uploaded"):
        assert (tmp_path / folder / "vocabulary.json").is_file()
        assert not (tmp_path / folder / "matching").exists(), "it reads other weights than the merged ones"


def test_what_chooses_is_told(checkpoint_folder, matched, model):
    said = "a matching head chooses among candidates"
    assert said in "\n".join(describe(matched).lines()) and said in repr(model) and describe(matched).record()["matching"] is True
    assert said not in "\n".join(describe(checkpoint_folder).lines())


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_saved_checkpoint_keeps_its_head(model, tmp_path):
    pairs = model.sample(4, 3)
    hub.save_pretrained(model, tmp_path / "saved")
    hub.save_pretrained(model, tmp_path / "saved")  # a checkpoint with a head is still a checkpoint, and can be replaced
    assert tokun.load(tmp_path / "saved", device="cpu").match(pairs) == pytest.approx(model.match(pairs), abs=2e-2)


def test_a_head_that_is_broken_or_of_another_model_is_refused(matched, tmp_path):
    for name, spoil, message in (
        ("a", lambda f: (f / "model.safetensors").unlink(), "incomplete"),
        ("b", lambda f: (f / "config.json").write_text("{}"), "not a matching head's config"),
        ("c", lambda f: (f / "model.safetensors").write_bytes(b"no"), "does not hold these weights"),
        ("d", lambda f: MatchingHead(MatchingConfig((1, 2), 99, 10)).save(f), "generator of width 99"),
    ):
        folder = tmp_path / name
        shutil.copytree(matched, folder)
        spoil(folder / "matching")
        with pytest.raises((UserError, FileNotFoundError), match=message):
            tokun.load(folder, device="cpu")


def test_mistakes_are_told(checkpoint_folder, matched, shards, toy_shards, tmp_path):
    with pytest.raises(UserError, match="already exists"):
        add_head(checkpoint_folder, shards, matched, RECIPE)
    few = str(toy_shards / "train-00000.tar")
    with pytest.raises(UserError, match="holds 10 usable pairs; a matching head needs at least 32"):
        add_head(checkpoint_folder, few, tmp_path / "new", RECIPE, device="cpu")
    with pytest.raises(UserError, match=r"of 10 pictures has .* different captions; 16 are needed"):
        add_head(checkpoint_folder, shards, tmp_path / "other", RECIPE, val=few, device="cpu")
    for option, value in (("epochs", "0"), ("dropout", "1"), ("weight-decay", "-1"), ("lr", "inf")):
        with pytest.raises(UserError, match=f"--{option} is {value}"):
            training.main(["--train", shards, "--out", str(tmp_path / "new"), f"--{option}={value}"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        add_head(checkpoint_folder, shards, tmp_path / "new", RECIPE, val=str(tmp_path / "nowhere-*.tar"), device="cpu")
