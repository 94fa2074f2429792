"""Promises of the evaluation's picture side and of its command: a figure means what its name says, and nothing fails silently."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageFilter

import tokun
from tests.small_runs import needs
from tests.test_cropping import SIZES
from tests.test_cropping import write as write_shapes
from tests.test_losses import WEIGHTS, random_squeezenet
from tokun import data
from tokun.config import ImageTokenizerTrainConfig
from tokun.evaluate import __main__ as command
from tokun.evaluate import captions as caption_figures
from tokun.evaluate import distances, doctor, features, images, memorisation, recognition, stored_samples, style
from tokun.evaluate.figures import Figure, as_dict, share, skipped, table
from tokun.evaluate.held_out_pairs import described, framed_for, read_captions, read_pairs
from tokun.inference.candidates import OWN_SCORES
from tokun.models.losses import SQUEEZENET_URL
from tokun.render.grids import to_pil
from tokun.tokenizers import sequences
from tokun.training.reconstruction import gate
from tokun.utils import metrics
from tokun.utils.errors import UserError
from tokun.utils.metrics import code_figures, psnr

pytestmark = needs("torchmetrics", reason="the extra eval is not installed")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    return random_squeezenet(tmp_path_factory.mktemp("network") / "squeezenet.safetensors")


@pytest.fixture(scope="module")
def seen(network) -> features.Features:
    return features.open_features(str(network), CPU)


@pytest.fixture(scope="module")
def pairs(tiny_model, toy_shards):
    return read_pairs(tiny_model, str(toy_shards))


def vectors(n: int, d: int = 8, *, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def value(figures: list[Figure], name: str) -> float:
    (found,) = [figure.value for figure in figures if figure.name == name]
    return found


# --- distances of two sets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [20, 100])
def test_identical_sets_are_at_no_distance_and_have_precision_one(n):
    a = vectors(n, 48)
    assert distances.frechet(a, a) == pytest.approx(0, abs=1e-9 * float(a.square().sum()))
    found = distances.manifold(vectors(64), vectors(64), "x")
    assert [figure.value for figure in found if figure.name != "density"] == [1, 1, 1]
    assert value(found, "density") >= 1


def test_frechet_distance_and_kid_are_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import poly_mmd

    class AsTheyAre(torch.nn.Module):
        num_features = 8

        def forward(self, x):
            return x

    a, b = vectors(200), vectors(200, seed=1, shift=0.3) * 1.5
    theirs = FrechetInceptionDistance(AsTheyAre(), normalize=True).set_dtype(torch.float64)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    assert distances.frechet(a, b) == pytest.approx(float(theirs.compute()), rel=1e-6)
    assert distances.kid(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)


def test_frechet_distance_of_fewer_vectors_than_dimensions_is_that_of_their_own_subspace():
    a, b = vectors(12, 6), vectors(12, 6, seed=1)
    turn = torch.linalg.qr(vectors(40, 6, seed=2)).Q.T  # 6 dimensions laid into 40
    assert distances.frechet(a @ turn, b @ turn) == pytest.approx(distances.frechet(a, b), rel=1e-9)


def test_precision_and_recall_tell_few_modes_from_wrong_ones():
    real = torch.cat([vectors(40), vectors(40, seed=1, shift=50)])
    half = distances.manifold(real, vectors(40, seed=2), "x")  # one of two modes, drawn well
    assert value(half, "precision") > 0.8 and value(half, "recall") < 0.6 and value(half, "coverage") < 0.6
    wrong = distances.manifold(real, vectors(40, seed=2, shift=20), "x")
    assert value(wrong, "precision") == value(wrong, "density") == value(wrong, "coverage") == 0


def test_a_jackknife_interval_is_the_classical_one_where_there_is_one():
    a = vectors(500, 1)
    figure = distances.jackknife("mean", [a], lambda x: float(x.mean()))
    assert figure.value == pytest.approx(float(a.mean())) and figure.n == 500
    assert (figure.high - figure.low) / 2 == pytest.approx(distances.STUDENT * float(a.std()) / math.sqrt(500), rel=0.5)


def test_too_few_pictures_are_a_line_that_says_so():
    for figure in [distances.jackknife("KID", [vectors(5), vectors(90)], distances.kid), *distances.manifold(vectors(90), vectors(5), "x")]:
        assert math.isnan(figure.value) and figure.n == 5
        assert figure.note == "skipped: 5 pictures; at least 32 are needed"


# --- the image tokenizer --------------------------------------------------------------------------------------------


def test_a_spectrum_has_its_peak_where_the_lines_are():
    lines = torch.cos(2 * torch.pi * torch.arange(64) / 4).expand(1, 1, 64, 64)
    assert int(metrics.spectra(lines)[0].argmax()) == 16  # 64 / 4
    assert torch.allclose(metrics.spectra(lines), metrics.spectra(lines + 0.5), atol=1e-5)  # lightness is no line


def test_blurred_pictures_have_another_spectrum_and_other_gradients(toy_images):
    blurred = features.stack([to_pil(image).filter(ImageFilter.GaussianBlur(1)) for image in toy_images])
    noised = (toy_images + 0.02 * torch.randn(toy_images.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    assert metrics.spectrum_error(toy_images, toy_images).max() == 0
    assert metrics.spectrum_error(toy_images, blurred).mean() > 2 * metrics.spectrum_error(toy_images, noised).mean()
    gradients = [metrics.gradients(pictures) for pictures in (toy_images, blurred, noised)]
    assert metrics.ssim(gradients[0], gradients[0]).min() > 0.999
    assert metrics.ssim(gradients[0], gradients[1]).mean() < metrics.ssim(gradients[0], gradients[2]).mean()


def test_entropy_at_a_place_is_that_of_its_codes():
    codes = torch.tensor([[3, 0], [3, 1], [3, 2], [3, 3]])
    assert doctor.entropies(codes).tolist() == pytest.approx([0, math.log(4)])


def test_the_verdict_is_the_gate_of_training(pairs):
    codes, limits = torch.tensor([pair.codes for pair in pairs]), ImageTokenizerTrainConfig()
    assert doctor.verdict(torch.full((24,), 30.0), codes, 64).value == 1
    refused = doctor.verdict(torch.full((24,), 9.0), codes, 64)
    assert refused.value == 0 and refused.note == "0 = no go: PSNR is 9.0 dB (the gate asks for 12.0)"
    with pytest.raises(ValueError, match=r"PSNR is 9\.0 dB"):
        gate({"psnr": 9.0, **code_figures(codes, 64)}, limits, 64)


def test_the_sheet_shows_best_and_worst(tiny_model, pairs, tmp_path):
    found = doctor.measure(tiny_model, pairs, out=tmp_path)
    assert value(found, "PSNR") == pytest.approx(float(psnr(*_originals_and_copies(tiny_model, pairs)).mean()), rel=1e-3)
    assert {path.name for path in tmp_path.iterdir()} == {"doctor.png", "entropy.png"}
    assert f"skipped: {features.NEEDED}" in [figure.note for figure in found] and "squeezenet1_1-b8a52dc0.pth" in features.NEEDED


def _originals_and_copies(model, pairs):
    codes = torch.tensor([pair.codes for pair in pairs])
    return features.stack([pair.image for pair in pairs]), model.image_tokenizer.decode(codes)


# --- samples --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tiny_model):
    return tiny_model.sample(3, n=16)


def test_samples_that_are_the_held_out_pictures_are_at_no_distance(tiny_model, pairs, samples, seen, monkeypatch):
    monkeypatch.setattr(distances, "FEWEST", 10)
    copied = [replace(samples[0], image=pair.image) for pair in pairs]
    found = images.measure(tiny_model, pairs, copied, features=seen)
    assert value(found, "Fréchet distance") == pytest.approx(0, abs=1e-6) and value(found, "precision") == value(found, "coverage") == 1
    assert value(found, "diversity") == pytest.approx(1)
    assert value(found, "Fréchet distance, reference") > 0 and "(12, 12)" in found[1].note
    assert all("SqueezeNet 1.1 features" in figure.note for figure in found if not figure.name.startswith("style"))


def test_other_kinds_keep_size_and_mode_and_are_the_same_again(toy_images):
    pictures = [to_pil(image).convert("RGB") for image in toy_images[: 2 * len(style.KINDS)]]
    made, kinds = style.generated_others(pictures, 7)
    assert [(one.size, one.mode) for one in made] == [(one.size, "RGB") for one in pictures] and set(kinds) == set(style.KINDS)
    again, _ = style.generated_others(pictures, 7)
    assert all(a.tobytes() == b.tobytes() != c.tobytes() for a, b, c in zip(made, again, pictures))


def test_the_classifier_tells_two_clouds_and_weighs_both_alike():
    judge = style.fit(vectors(20, shift=1.0), vectors(200, seed=1, shift=-1.0))
    assert np.mean(judge(vectors(200, seed=2, shift=1.0))) > 0.95 and np.mean(judge(vectors(200, seed=3, shift=-1.0))) < 0.05


def test_the_classifier_knows_toy_prints_by_random_features(seen, toy_images):
    prints = [to_pil(image) for image in toy_images]
    judge = style.fit(seen(prints[:16]), seen(style.generated_others(prints[:16], 0)[0]))
    assert np.mean(judge(seen(prints[16:]))) > 0.8
    assert np.mean(judge(seen(style.generated_others(prints[16:], 1)[0]))) < 0.2


# with random weights and made prints: the test above; only trained weights tell whether they know engravings
@pytest.mark.skipif(not WEIGHTS.is_file(), reason="the trained SqueezeNet weights do not lie beside the project")
def test_the_classifier_knows_engravings(engravings):
    trained = features.open_features(str(WEIGHTS), CPU)
    real = [picture.convert("L").resize((64, 64), Image.Resampling.LANCZOS) for picture in engravings(64)]
    judge = style.fit(trained(real[:40]), trained(style.generated_others(real[:40], 0)[0]))
    assert np.mean(judge(trained(real[40:]))) > 0.8
    assert np.mean(judge(trained(style.generated_others(real[40:], 1)[0]))) < 0.2


def test_pictures_of_a_folder_join_the_others(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--others .* has no readable picture"):
        style.from_folder(str(tmp_path), 32, 1, 0)
    Image.new("RGB", (90, 40), "red").save(tmp_path / "plate.jpg")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.new("L", (40, 90), 80).save(tmp_path / "sheet.png")
    taught, examined = style.from_folder(str(tmp_path), 32, 1, 0)
    assert [(one.size, one.mode) for one in taught + examined] == [((32, 32), "L")] * 2 * style.CROPS
    assert {one.getpixel((5, 5)) for one in taught} == {80} and {one.getpixel((5, 5)) for one in examined} == {76}  # red is 76


# --- memorisation ---------------------------------------------------------------------------------------------------


def opened(folder: Path) -> data.ImageSamples:
    return data.ImageSamples.open(str(folder), image_size=32, channels=1, max_scale=1.0)


def test_the_nearest_picture_is_that_of_a_plain_search(tiny_model, pairs, samples, toy_shards, seen, monkeypatch):
    every = torch.tensor([pair.codes for pair in pairs])
    queries = torch.tensor([samples[0].codes, pairs[7].codes, samples[1].codes])
    own, known = seen(doctor.reconstruct(tiny_model, queries)), seen(doctor.reconstruct(tiny_model, every))
    plain = 1 - torch.cosine_similarity(own[:, None], known[None], dim=-1)
    monkeypatch.setattr(memorisation, "BATCH", 5)
    found = memorisation.nearest(
        tiny_model, [memorisation.Coded(row, (4, 4)) for row in queries.tolist()], opened(toy_shards), len(every), seen
    )
    torch.testing.assert_close(found["features"][0], plain.min(1).values, atol=1e-6, rtol=0)
    torch.testing.assert_close(found["codes"][0], (queries[:, None] != every).double().mean(-1).min(1).values)
    assert [float(found[way][0][1]) for way in memorisation.WAYS] == pytest.approx([0, 0, 0], abs=1e-6)  # a training picture itself
    assert opened(toy_shards).index.key(int(found["codes"][1][1])) == pairs[7].key


def test_a_copied_training_picture_is_a_near_copy_and_other_samples_are_none(tiny_model, pairs, samples, toy_shards, seen, tmp_path):
    copies = [replace(samples[0], codes=pair.codes) for pair in pairs[:8]]
    options = dict(train=pairs[:12], train_shards=str(toy_shards), limit=12, features=seen)
    found = memorisation.measure(tiny_model, pairs[12:], [*copies, *samples[:8]], out=tmp_path, **options)
    assert value(found, "near copies by codes, samples") == 0.5 and value(found, "near copies by codes, copies found") == 1
    assert value(found, "near copies by features, samples") >= 0.5 and value(found, "near copies by dHash, samples") >= 0.5
    none = memorisation.measure(tiny_model, pairs[12:], samples, **options)
    assert value(none, "near copies by codes, samples") == 0
    assert value(none, "near copies by features, samples") < 0.2
    assert (tmp_path / "nearest.png").is_file()


def test_nats_are_those_that_samples_carry(tiny_model, samples):
    for nats, own in ((memorisation.image_nats, "image_nll"), (memorisation.text_nats, "caption_nll")):
        np.testing.assert_allclose(nats(tiny_model, samples)[:, 0], [getattr(pair, own) for pair in samples], rtol=1e-4)


def test_the_gap_is_held_out_less_training(tiny_model, pairs):
    found = memorisation.likelihood_gap(tiny_model, pairs[:12], pairs[12:], 0)
    for kind in ("image", "text"):
        held, known, gap = (value(found, f"nats per {kind} token, {name}") for name in ("held-out", "training", "gap"))
        assert gap == pytest.approx(held - known)
    assert all(figure.low <= figure.value <= figure.high for figure in found)


# --- samples that are kept ------------------------------------------------------------------------------------------


def test_a_killed_drawing_goes_on_and_ends_in_the_same_samples(tiny_model, tmp_path, monkeypatch):
    whole = stored_samples.draw(tiny_model, tmp_path / "whole", 6, 1, batch_size=2)
    killed = tmp_path / "killed"
    stored_samples.draw(tiny_model, killed, 3, 1, batch_size=2)
    lines = (killed / "samples.jsonl").read_text(encoding="utf-8")
    (killed / "samples.jsonl").write_text(lines[:-20], encoding="utf-8")  # the kill came within the third line
    asked: list[int] = []
    sample = type(tiny_model).sample
    monkeypatch.setattr(type(tiny_model), "sample", lambda self, seed, **o: (asked.extend(o["indices"]), sample(self, seed, **o))[1])
    again = stored_samples.draw(tiny_model, killed, 6, 1, batch_size=2)
    assert asked == [2, 3, 4, 5]
    assert [pair.record() for pair in again] == [pair.record() for pair in whole]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(again, whole))
    direct = sample(tiny_model, 1, n=6)
    assert [(p.record(), p.image.tobytes(), p.tags) for p in direct] == [(p.record(), p.image.tobytes(), p.tags) for p in whole]


def test_choices_are_kept_as_best_of_draws_them_and_are_no_plain_samples(tiny_model, tmp_path):
    stored_samples.draw(tiny_model, tmp_path, 1, 1, best_of=3)
    kept = stored_samples.draw(tiny_model, tmp_path, 3, 1, best_of=3)  # goes on
    chosen = tiny_model.best_of(1, 3, 3)
    assert [(p.record(), p.image.tobytes()) for p in kept] == [(p.record(), p.image.tobytes()) for p in chosen]
    with pytest.raises(ValueError, match="best_of: 3 there"):
        stored_samples.draw(tiny_model, tmp_path, 3, 1)


def test_choices_by_likelihood_are_those_the_model_is_surest_of(tiny_model, tmp_path):
    kept = stored_samples.draw(tiny_model, tmp_path, 2, 1, best_of=4, reward="likelihood")
    candidates = tiny_model.sample(1, n=8)
    assert [p.index for p in kept] == [min(range(i, i + 4), key=lambda k: candidates[k].caption_nll) for i in (0, 4)]
    with pytest.raises(ValueError, match="reward"):
        stored_samples.draw(tiny_model, tmp_path, 2, 1, best_of=4)


def test_mutual_information_counts_half_of_how_usual_a_caption_is(tiny_model):
    pairs = tiny_model.sample(1, n=4)
    given, alone = [-p.caption_nll for p in pairs], [-p.caption_nll - p.pmi for p in pairs]
    assert OWN_SCORES["mmi"](tiny_model, pairs) == pytest.approx([a - b / 2 for a, b in zip(given, alone)])


def test_samples_of_another_seed_are_refused(tiny_model, tmp_path):
    stored_samples.draw(tiny_model, tmp_path, 1, 1)
    with pytest.raises(ValueError, match="seed: 1 there, 2 here"):
        stored_samples.draw(tiny_model, tmp_path, 1, 2)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ["pmi_both", "likelihood"])
def test_a_score_without_candidates_is_refused(tmp_path, capsys, reward):
    with pytest.raises(SystemExit):
        command.main(["--shards", "val.tar", "--out", str(tmp_path), "--reward", reward])
    assert "--reward chooses among several candidates: say how many with --best-of" in capsys.readouterr().err


def test_the_command_measures_choices_as_they_are_asked_for(checkpoint_folder, tiny_model, toy_shards, tmp_path):
    command.main(["--checkpoint", str(checkpoint_folder), "--shards", str(toy_shards), "--n-samples", "2", "--seed", "5",
                   "--only", "viewer", "--viewer-n", "1", "--best-of", "4", "--reward", "likelihood", "--out", str(tmp_path)])  # fmt: skip
    record = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert (record["best_of"], record["reward"]) == (4, "likelihood")
    lines = (tmp_path / "samples" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    candidates = tiny_model.sample(5, n=8)
    assert [json.loads(line)["index"] for line in lines] == [min(range(i, i + 4), key=lambda k: candidates[k].caption_nll) for i in (0, 4)]


def test_the_json_holds_what_the_table_shows(checkpoint_folder, toy_shards, network, tmp_path, capsys):
    arguments = ["--checkpoint", str(checkpoint_folder), "--shards", str(toy_shards), "--train-shards", str(toy_shards),
                 "--features", str(network), "--n-held-out", "16", "--n-samples", "4", "--seed", "5",
                 "--only", "doctor,images,memorisation", "--out", str(tmp_path)]  # fmt: skip
    command.main(arguments)
    shown = capsys.readouterr().out.strip()
    record = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert shown in (tmp_path / "table.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()[2:]]
    held = [(f"{room}: {figure['name']}", figure) for room, figures in record["figures"].items() for figure in figures]
    assert [row[0] for row in rows] == [name for name, _ in held] and set(record["figures"]) == {"doctor", "images", "memorisation"}
    assert [row[1] for row in rows] == ["–" if figure["value"] is None else f"{figure['value']:.4g}" for _, figure in held]
    assert [int(row[3]) for row in rows] == [figure["n"] for _, figure in held]
    assert (
        str(toy_shards) in record["command"]
        and record["split"]["pairs"] == len(read_pairs(tokun.load(checkpoint_folder), str(toy_shards), 16, 5)) >= 8
        and record["samples"] == 4
        and record["seed"] == 5
    )
    assert record["checkpoint"]["generator"] and record["versions"]["torch"] == torch.__version__.split("+")[0]
    made = {path.name for path in tmp_path.iterdir()}
    assert {"codes.png", "spectrum.png", "samples.png", "doctor.png", "entropy.png", "nearest.png", "table.md", "samples"} <= made


def under_another_key(shard: Path, target: Path, key: str) -> list[str]:
    """The shard with each plain caption under `key`, and a title in its place. Returns the captions."""
    index, captions = data.ShardIndex([shard], one_of=data.IMAGE_SUFFIXES), []
    samples = []
    for i in range(len(index)):
        tree = index.read_json(i)
        captions.append(tree.pop("caption"))
        tree |= {key: captions[-1], "caption": "Fig. 3", "captions": {"plain": "Fig. 3"}}
        kind = index.image_suffix(i)
        samples.append({"__key__": index.key(i), kind: index.read(i, kind), "json": json.dumps(tree).encode()})
    data.write_shard(target, samples)
    return captions


def begins_one(caption: str, captions: list[str]) -> bool:
    """Whether it is one of the captions, or the beginning of one that is too long for the model."""
    return bool(caption) and any(one.startswith(caption) for one in captions)


def test_captions_under_another_key_are_read_wherever_captions_are_read(tiny_model, toy_shards, tmp_path):
    captions = under_another_key(toy_shards / "train-00000.tar", tmp_path / "a.tar", "note")
    found, framed = str(tmp_path / "a.tar"), framed_for(tiny_model)
    assert all(begins_one(pair.caption, captions) for pair in read_pairs(tiny_model, found, caption_key="note"))
    assert {pair.caption for pair in read_pairs(tiny_model, found)} == {"Fig. 3"}
    assert read_captions(found, caption_key="note") == captions
    assert [text for _, _, text in described(found, framed, caption_key="note")] == captions
    with pytest.raises(UserError, match=r"no pair of .* can be used: .*; name the field of the captions with --caption-key, now remark$"):
        read_pairs(tiny_model, found, caption_key="remark")


def test_the_command_measures_captions_under_another_key_and_says_so(checkpoint_folder, toy_shards, network, tmp_path, monkeypatch):
    captions = under_another_key(toy_shards / "train-00000.tar", tmp_path / "a.tar", "note")
    arguments = ["--checkpoint", str(checkpoint_folder), "--shards", str(tmp_path / "a.tar"), "--train-shards", str(tmp_path / "a.tar"),
                 "--features", str(network), "--out", str(tmp_path / "out")]  # fmt: skip
    case = command.Case.open(command.parse([*arguments, "--caption-key", "note"]))
    taught: list[list[str]] = []

    def fit(vectors, texts, *, seed):
        taught.append(list(texts))
        return recognition.Judge({}, *[np.zeros(1)] * 3, len(texts), 1.0, 1.0)

    monkeypatch.setattr(recognition, "fit", fit)
    monkeypatch.setattr(caption_figures, "measure", lambda *_, training, **__: taught.append(list(training)) or [])
    assert case.train and all(begins_one(pair.caption, captions) for pair in [*case.held_out, *case.train])
    case.recogniser()
    command.words(case)
    assert taught == [captions, captions]
    command.Case.open(command.parse(arguments)).recogniser()
    assert taught[2:] == [["Fig. 3"] * len(captions)], "the judge of other captions is another"
    command.write(case.args, case, {}, 0.0)
    assert json.loads((tmp_path / "out" / "figures.json").read_text(encoding="utf-8"))["command"].endswith("--caption-key note")


def test_a_room_that_cannot_be_measured_is_a_line_and_the_others_go_on(checkpoint_folder, toy_shards, network, tmp_path):
    command.main(["--checkpoint", str(checkpoint_folder), "--shards", str(toy_shards), "--n-held-out", "4", "--only", "memorisation,doctor",
                  "--features", str(network), "--out", str(tmp_path)])  # fmt: skip
    found = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["figures"]
    assert found["memorisation"] == [as_dict(skipped("all", "needs --train-shards"))] and len(found["doctor"]) > 5


@pytest.mark.parametrize("wrong, error", [
    (["--shards", "none-*.tar"], r"--shards none-\*\.tar matches no shard"),
    (["--train-shards", "none-*.tar"], r"--train-shards none-\*\.tar matches no shard"),
    (["--features", "none.pth"], r"--features none\.pth is not a file; name the weights"),
    (["--others", "none"], "--others none is not a folder"),
    (["--checkpoint", "none"], "is neither a local folder nor a Hugging Face Hub id"),
    (["--recognition", "none.pth"],
     r"^--recognition none\.pth is not a file; name the weights of SqueezeNet 1\.1, or give efficientnet-lite0$"),
    (["--aesthetic", "none.pth"], r"^--aesthetic none\.pth is not a file; name an aesthetic head"),
    (["--clip", "ViT-B-32"], "^--clip ViT-B-32 names no weights: give .* or a folder$"),
    (["--judge", "runs/none"], "^--judge runs/none names no weights: give .* or a folder$"),
])  # fmt: skip
def test_what_is_named_and_not_there_ends_the_run_at_once(wrong, error, checkpoint_folder, toy_shards, network, tmp_path):
    right = ["--checkpoint", str(checkpoint_folder), "--shards", str(toy_shards), "--features", str(network), "--out", str(tmp_path)]
    with pytest.raises((FileNotFoundError, UserError), match=error):
        command.main([*right, *wrong])
    assert not (tmp_path / "samples").exists()


def test_without_a_network_each_figure_says_which_file_from_where_and_why_there_is_none(
    checkpoint_folder, toy_shards, tmp_path, monkeypatch, capsys
):
    """The table said "skipped: needs --features", and neither which file nor that a download had failed."""

    def unreachable(which, device):
        raise OSError("Inception's weights could not be downloaded (no route to host)")

    monkeypatch.setattr(features, "open_features", unreachable)
    few = ["--n-held-out", "8", "--n-samples", "4", "--only", "images", "--out", str(tmp_path)]
    command.main(["--checkpoint", str(checkpoint_folder), "--shards", str(toy_shards), *few])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| images: all")]
    assert f"skipped: needs --features FILE: the weights of SqueezeNet 1.1 ({SQUEEZENET_URL}, 5 MB)" in line
    assert "Inception's weights could not be downloaded (no route to host)" in line


def test_an_unknown_room_names_the_rooms(capsys):
    with pytest.raises(SystemExit):
        command.main(["--shards", "x", "--out", "y", "--only", "doktor"])
    assert "--only doktor: the rooms are doctor, images, words" in capsys.readouterr().err


def test_weights_of_another_network_are_refused(tmp_path):
    safetensors.torch.save_file({"layer.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"holds neither SqueezeNet 1\.1 nor Inception v3"):
        features.open_features(str(tmp_path / "other.safetensors"), CPU)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        features.open_features(str(tmp_path / "broken.safetensors"), CPU)


@pytest.mark.parametrize("hits", [[True] * 15, [False] * 15])
def test_the_interval_of_a_share_stays_inside(hits):
    figure = share("share", hits)
    assert 0 <= figure.low <= figure.value <= figure.high <= 1 and figure.high - figure.low == pytest.approx(0.204, abs=1e-3)


def test_a_share_and_a_dash_in_the_table():
    lines = table({"room": [share("share", [True, False], better="more"), skipped("none", "why | not")]}).splitlines()
    assert lines[2].split("|")[1:6] == [" room: share ", " 0.5   ", " 0.09453 to 0.9055 ", " 2 ", " more   "]
    assert [cell.strip() for cell in lines[3].split("|")][1:] == ["room: none", "–", "", "0", "", "skipped: why / not", ""]


# --- pictures of several shapes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shaped_shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shaped-shards")
    write_shapes(folder, "val", SIZES, shard_size=30)
    return folder


def test_pictures_are_measured_as_the_models_own_are_framed(shaped_model, shaped_shards):
    samples = data.ImageSamples.open(
        str(shaped_shards), image_size=32, channels=1, max_scale=1.0, grids=shaped_model.grids, downsample=8, fit=shaped_model.fit
    )
    pairs = {pair.key: pair for pair in read_pairs(shaped_model, str(shaped_shards))}
    assert len({pair.tags.grid for pair in pairs.values()}) >= 3
    for i in range(len(samples)):
        if pair := pairs.get(samples.index.key(i)):
            framed = samples.framed(i)
            shown = data.to_float(np.array(samples.cut(framed, framed.box)))
            assert pair.tags.grid == framed.grid and torch.equal(features.stack([pair.image])[0], shown)
            assert pair.codes == shaped_model.image_tokenizer.encode(shown[None], rows=16)[0].tolist()


def test_a_caption_too_long_for_the_model_is_measured_as_it_is_trained_by_its_first_pieces(tiny_model, tmp_path):
    """It was left out without a word, while training cut it: held-out figures were those of the short captions alone."""
    buffer = io.BytesIO()
    Image.effect_noise((32, 32), 60).save(buffer, "PNG")
    long = "a ship with three masts and a lighthouse " * 40
    records = {"long": {"caption": long}, "short": {"caption": "a ship"}, "wordless": {"caption": ""}}
    data.write_shard(
        tmp_path / "val-0.tar",
        [{"__key__": key, "png": buffer.getvalue(), "json": json.dumps(record).encode()} for key, record in records.items()],
    )
    pairs = {pair.key: pair for pair in read_pairs(tiny_model, str(tmp_path / "val-0.tar"))}
    most = tiny_model.vocabulary.max_text
    assert pairs.keys() == {"long", "short"} and len(pairs["short"].caption_ids) < most
    assert pairs["long"].caption_ids == tiny_model.text_tokenizer.encode(long)[:most] and len(pairs["long"].caption_ids) == most
    assert long.startswith(pairs["long"].caption), "judges and viewers read what was trained"
    sequences.caption_scored(tiny_model.vocabulary, pairs["long"].tags, pairs["long"].codes, pairs["long"].caption_ids)


def test_a_model_of_squares_is_measured_as_before(tiny_model, shaped_shards):
    old = replace(tiny_model, vocabulary=replace(tiny_model.vocabulary, grids=((4, 4),)), fit="")
    samples = data.ImageSamples.open(str(shaped_shards), image_size=32, channels=1, max_scale=1.0)
    places = {samples.index.key(i): i for i in range(len(samples))}
    for pair in read_pairs(old, str(shaped_shards)):
        picture = samples.framed(places[pair.key]).image
        square = data.crop(picture, data.centre_box(*picture.size), 32)
        assert np.array_equal(np.asarray(pair.image), square[0]) and pair.tags.grid == (4, 4)
        assert torch.equal(features.stack([memorisation.shown_of(samples, places[pair.key])]), features.stack([pair.image]))


def test_codes_of_other_grids_have_none_in_common():
    one, same, other = (
        memorisation.Coded([1, 2, 3, 4], (2, 2)),
        memorisation.Coded([1, 2, 3, 5], (2, 2)),
        memorisation.Coded([1, 2, 3, 4], (1, 4)),
    )
    assert memorisation.codes_apart([one, other], [same, other]).tolist() == [[0.25, 1], [1, 0]]


@pytest.mark.slow
def test_every_room_measures_a_model_of_several_shapes(shaped_folder, shaped_shards, network, tmp_path):
    (tmp_path / "others").mkdir()
    for name, size in (("a", (90, 40)), ("b", (40, 90))):
        Image.effect_noise(size, 90).save(tmp_path / "others" / f"{name}.png")
    arguments = ["--checkpoint", str(shaped_folder), "--shards", str(shaped_shards), "--train-shards", str(shaped_shards),
                 "--features", str(network), "--viewer-n", "4", "--n-samples", "6", "--viewer-of", "reconstructions",
                 "--others", str(tmp_path / "others"), "--only", "doctor,images,words,coherence,memorisation,viewer",
                 "--out", str(tmp_path)]  # fmt: skip
    command.main(arguments)
    record = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["figures"]
    missing = {figure["name"]: figure["note"] for figures in record.values() for figure in figures if figure["value"] is None}
    assert not {name: note for name, note in missing.items() if "at least" not in note and "LPIPS" not in name}, (
        "nothing but what is too few, or not here"
    )
    assert {"codes.png", "spectrum.png", "samples.png", "doctor.png", "entropy.png", "nearest.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
