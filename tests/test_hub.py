"""Promises of tokun/inference/hub.py: what is saved or pushed is the model, whole, and nothing else is lost for it."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tokun
from tokun.inference import adapters, image_to_codes
from tokun.inference.load import load
from tokun.inference.model import Tokun
from tokun.inference.model_card import OWN_ID
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import Tags


def tokens(pairs):
    return [(p.tags, p.codes, p.caption_ids, p.image.tobytes()) for p in pairs]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_saved_then_loaded_is_the_original(checkpoint_folder, tmp_path):
    model = Tokun.from_pretrained(checkpoint_folder, device="cpu")
    path = model.save_pretrained(tmp_path / "mine")
    again = tokun.load(path, device="cpu")
    assert tokens(again.sample(3, n=2)) == tokens(model.sample(3, n=2))
    assert (again.card, again.defaults, again.tag_counts, again.tasks) == ("# tiny\n", model.defaults, model.tag_counts, model.tasks)
    assert contents(path) == contents(checkpoint_folder) and [p.name for p in tmp_path.iterdir()] == ["mine"]
    generator = AutoModelForCausalLM.from_pretrained(path / "generator")
    assert all(torch.equal(a, b) for a, b in zip(generator.parameters(), model.generator.parameters(), strict=True))
    assert len(AutoTokenizer.from_pretrained(path / "generator")) == model.vocabulary.size


def test_a_checkpoint_is_replaced_and_nothing_else_is(tiny_model, checkpoint_folder, tmp_path):
    path = tiny_model.save_pretrained(tmp_path / "a")
    assert not (path / "README.md").exists()
    load(checkpoint_folder, device="cpu").save_pretrained(path)
    assert contents(path) == contents(checkpoint_folder)
    (path / "thesis.txt").write_text("years of work")
    before = contents(path)
    with pytest.raises(ValueError, match=r"holds thesis\.txt, which is not part of a checkpoint"):
        tiny_model.save_pretrained(path)
    with pytest.raises(ValueError, match=r"thesis\.txt is a file"):
        tiny_model.save_pretrained(path / "thesis.txt")
    assert contents(path) == before
    for name, text in (
        ("b/generator/thesis.txt", "years of work"),
        ("c/README.md", "# My own"),
        ("d/generator/config.json", "{}"),
        ("e/.env", "secret"),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=r"is not a checkpoint \(vocabulary\.json is missing\)"):
            tiny_model.save_pretrained(tmp_path / name[0])
        assert (tmp_path / name).read_text() == text
    (path / "thesis.txt").rename(path / "generator" / "thesis.txt")
    with pytest.raises(ValueError, match=r"holds generator/thesis\.txt, which is not part"):
        tiny_model.save_pretrained(path)
    (tmp_path / "empty").mkdir()
    for dtype in ("bfloat16", torch.float16):
        assert load(tiny_model.save_pretrained(tmp_path / "empty", dtype=dtype), device="cpu")
    for dtype in (torch.int8, "int8", "nonsense"):
        with pytest.raises(ValueError, match="floating-point"):
            tiny_model.save_pretrained(tmp_path / "empty", dtype=dtype)


def test_without_a_network_the_hub_is_named(tiny_model, monkeypatch):
    httpx = pytest.importorskip("httpx", reason="the Hub's client before version 1 has no httpx")
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda *a, **k: (_ for _ in ()).throw(httpx.ConnectError("Name or service not known"))
    )
    with pytest.raises(OSError, match=r"the Hub cannot be reached to upload 'me/mine'.*Name or service"):
        tiny_model.push_to_hub("me/mine")
    with pytest.raises(ValueError, match="None is not a valid name"):
        tiny_model.push_to_hub(None)


def test_a_save_that_fails_leaves_what_was_there(checkpoint_folder, tmp_path, monkeypatch):
    model = load(checkpoint_folder, device="cpu")
    path = model.save_pretrained(tmp_path / "a")
    monkeypatch.setattr(type(model.vocabulary), "save", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(path)
    assert contents(path) == contents(checkpoint_folder)


class Refused(huggingface_hub.errors.HfHubHTTPError):
    """Without the response that it came in."""

    def __init__(self, told: str):
        OSError.__init__(self, told)


class FakeHub:
    """huggingface_hub.HfApi whose repositories are folders."""

    def __init__(self, root: Path):
        self.root, self.private = root, {}

    def __call__(self, token: str | None = None):
        self.token = token
        return self

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> huggingface_hub.RepoUrl:
        if self.token != "right":
            raise Refused("401 Client Error")
        full = name if "/" in name else f"me/{name}"
        (self.root / full).mkdir(parents=True, exist_ok=exist_ok)
        self.private.setdefault(full, private)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{full}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str, revision: str | None, create_pr: bool) -> None:
        assert commit_message and revision is None and not create_pr
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def snapshot_download(self, name: str) -> str:
        return str(self.root / name)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_pushed_then_loaded_by_name_is_the_original(checkpoint_folder, fake_hub):
    model = load(checkpoint_folder, device="cpu")
    model.card = f'# ships\ntokun.load("{OWN_ID}")\n'
    assert model.push_to_hub("ships", private=True, token="right") == "https://huggingface.co/me/ships"
    again = load("me/ships", device="cpu")
    assert tokens(again.sample(3, n=2)) == tokens(model.sample(3, n=2))
    assert again.card == '# ships\ntokun.load("me/ships")\n' and OWN_ID in model.card and fake_hub.private == {"me/ships": True}
    model.push_to_hub("me/ships", token="right")  # again, into what is there
    assert not [name for name in contents(fake_hub.root) if name.endswith((".bin", ".pt", ".pkl"))]


def test_pushed_with_an_adapter_in_use_it_has_a_card_of_its_own_with_its_own_name(checkpoint_folder, fake_hub):
    model = load(checkpoint_folder, device="cpu")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    made_on = adapters.fingerprint(model.generator, model.vocabulary)
    adapters.add(model, adapters.Adapter("mine", "ships", made_on, settings, {}, model.vocabulary, card="# for peft"))
    model.card = f'# ships\ntokun.load("{OWN_ID}")\n'
    model.use_adapter("mine").push_to_hub("merged", token="right")
    card = load("me/merged", device="cpu").card
    assert "\n# ships, with the adapter mine merged in\n" in card and "mine: LoRA of rank 2" in card and "for peft" not in card
    own, _, below = card.partition("## The base: ships")
    assert 'tokun.load("me/merged")' in own and 'tokun.load("ships")' in below


def test_what_the_hub_refuses_is_told_with_the_way_out(checkpoint_folder, fake_hub):
    with pytest.raises(OSError, match=r"the Hub refuses 'ships'.*401.*hf auth login"):
        load(checkpoint_folder, device="cpu").push_to_hub("ships")


def test_a_pair_is_scored_as_its_own_tokens_are(tiny_model):
    """Against the log-probabilities of the whole sequence, each code over all codes."""
    v, pair = tiny_model.vocabulary, tiny_model.sample(5, n=1)[0]
    assert tiny_model.image_nll([pair.tags], [pair.codes]) == pytest.approx([pair.image_nll], abs=1e-3)
    score = tiny_model.score(pair.image, "a ship", style=pair.tags.style, subject=pair.tags.subject)
    seen, words = (
        image_to_codes.see(tiny_model, [pair.image], tiny_model.vocabulary.default_grid)[0].codes,
        tiny_model.encode_text("a ship"),
    )
    ids = torch.tensor([sequences.pack_joint(v, pair.tags, seen, words).input_ids])
    logits, start = tiny_model.generator(input_ids=ids).logits[0].detach(), ids[0].tolist().index(v.id("<boi>"))
    over_codes = logits[start : start + 16, v.code_offset : v.size].log_softmax(-1)
    assert score.image_nll == pytest.approx(-sum(float(over_codes[i, code]) for i, code in enumerate(seen)), abs=1e-3)
    given, alone = (tiny_model.caption_nll([pair.tags], [words], codes)[0] for codes in ([seen], None))
    assert (score.caption_nll, score.pmi) == pytest.approx((given, alone - given), abs=1e-6)


def test_rows_of_any_length_and_number_are_scored_alike(tiny_model):
    pairs = tiny_model.sample(6, n=3)
    tags = [pairs[0].tags, Tags(), pairs[2].tags]
    whole = tiny_model.image_nll(tags, [p.codes for p in pairs])
    assert whole == pytest.approx([tiny_model.image_nll([t], [p.codes])[0] for t, p in zip(tags, pairs)], abs=1e-3)


def test_a_score_needs_a_picture_and_words(tiny_model):
    image = tiny_model(1)[0]
    with pytest.raises(ValueError, match="holds no text"):
        tiny_model.score(image, " ")
    with pytest.raises(ValueError, match="not a picture"):
        tiny_model.score(b"no picture", "a ship")
    with pytest.raises(ValueError, match="register can be"):
        tiny_model.score(image, "a ship", register="slang")
