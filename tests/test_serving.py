"""Promises of tokun/serving: an engine that masks with it draws what tokun draws. vLLM itself is not here: `Engine` stands for it,
with the changes of place in its batch that vLLM documents."""

from __future__ import annotations

import enum
import importlib
import json
import socket
import sys
import threading
import types
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fixtures import slow_next
from tokun.inference import picture_files, sampling
from tokun.inference.token_choice import Constraints, DecodingSettings
from tokun.serving import __main__ as example
from tokun.serving import backend
from tokun.serving.grammar import RequestGrammar
from tokun.tokenizers import sequences
from tokun.tokenizers.grammar import STATES
from tokun.tokenizers.vocabulary import Tags, Vocabulary

SMALL = Vocabulary(
    text_size=12, codebook_size=6, styles=("etching",), subjects=("sea", "sky"), grids=((2, 2), (1, 3)), max_text=3, illegal_text=(0, 5)
)  # fmt: skip
NO_REPEATS = DecodingSettings(text=sampling.Choice(no_repeats=True))
RULED_OUT, NO_START = (SMALL.id("<boq>"), 7), (3, 4)
GRAMMAR = RequestGrammar(SMALL, DecodingSettings(), Constraints(RULED_OUT, NO_START))


# --- the masks --------------------------------------------------------------------------------------------------------


@st.composite
def prefixes(draw) -> list[int]:
    """The beginning of a sequence of any task."""
    text = lambda: draw(st.lists(st.sampled_from([i for i in range(12) if i not in SMALL.illegal_text]), min_size=1, max_size=3))  # noqa: E731
    grid = draw(st.sampled_from([None, *SMALL.grids]))
    tags = Tags(
        draw(st.sampled_from(["", "etching"])), draw(st.sampled_from(["", "sea", "sky"])), draw(st.sampled_from(["", "poetic"])), grid
    )
    rows, columns = grid or SMALL.default_grid
    codes = draw(st.lists(st.integers(0, 5), min_size=rows * columns, max_size=rows * columns))
    packed = draw(
        st.sampled_from([
            sequences.pack_joint(SMALL, tags, codes, text()), sequences.pack_text_to_image(SMALL, tags, codes, text()),
            sequences.pack_question(SMALL, tags, codes, text(), text()),
            sequences.pack_rewrite(SMALL, tags, text(), "era", text()),
        ])
    ).input_ids  # fmt: skip
    return packed[: draw(st.integers(0, len(packed) - 1))]


def state_after(ids: list[int]) -> tuple[str, dict, dict]:
    """The slow twin: one id at a time."""
    state, spans, tags = "start", {}, {}
    for token in ids:
        following, kind = slow_next(SMALL, state, token, spans, tags), SMALL.class_of(token)
        assert following is not None
        if kind in ("text", "code"):
            spans.setdefault(state, []).append(token)
        if kind == "grid":
            tags["grid"] = next(grid for grid in SMALL.grids if SMALL.id(f"<grid:{grid[0]}x{grid[1]}>") == token)
        state = following
    return state, spans, tags


def may_follow(state: str, token: int, spans: dict, tags: dict) -> bool:
    if slow_next(SMALL, state, token, spans, tags) is None:
        return False
    starts_text = state in ("caption", "prompt", "asked", "answer") and not spans.get(state)
    return token not in RULED_OUT and not (starts_text and token in NO_START)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(prefixes(), st.data())
def test_what_may_come_next_is_what_unpack_would_read(ids, data):
    cut = data.draw(st.integers(0, len(ids)))
    row = GRAMMAR.row(ids[:cut], written := [])
    written += ids[cut:]
    state, spans, tags = state_after(ids)
    (legal,) = GRAMMAR.legal([row])
    assert not row.broken and STATES[row.state] == state
    assert legal.tolist() == [may_follow(state, token, spans, tags) for token in range(SMALL.size)]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(prefixes().filter(lambda ids: SMALL.id("<grid:1x3>") not in ids), min_size=1, max_size=5))
def test_the_masks_are_those_of_the_sampler_for_any_batch(prompts):
    """`sampling.generate` masks with these lines, whose rows share a picture size."""
    states, lengths = torch.full((len(prompts),), STATES.index("start")), torch.zeros(len(prompts), dtype=torch.long)
    for number, ids in enumerate(prompts):
        for token in ids:
            one, two = SMALL.grammar.advance(states[number : number + 1], lengths[number : number + 1], torch.tensor([token]))
            states[number], lengths[number] = one[0], two[0]
    ours = SMALL.grammar.legal_mask(states, lengths, torch.full((len(prompts),), 4))
    ours[:, list(RULED_OUT)] = False
    opens_text = torch.isin(states, torch.tensor([STATES.index(s) for s in ("caption", "prompt", "asked", "answer")])) & (lengths == 0)
    ours[:, list(NO_START)] &= ~opens_text[:, None]
    assert torch.equal(GRAMMAR.legal([GRAMMAR.row(ids, []) for ids in prompts]), ours)


def test_only_legal_ids_keep_their_logits_and_a_seed_leaves_one():
    prompt, logits = [SMALL.id("<bos>"), SMALL.id("<boi>")], torch.randn(3, SMALL.size + 5)  # five rows of padding, as some models have
    rows = [GRAMMAR.row(prompt, []), GRAMMAR.row(prompt, [], seed=3, index=1), GRAMMAR.row([1, 2], [])]
    masked = GRAMMAR.apply(logits, rows)
    kept = [row.isfinite().nonzero()[:, 0].tolist() for row in masked]
    assert kept[0] == list(range(SMALL.code_offset, SMALL.size)) and torch.equal(masked[0][kept[0]], logits[0][kept[0]])
    chosen = sampling.choose(logits[1:2, : SMALL.size], GRAMMAR.legal(rows[1:2]), rows[1].u[4:5], sampling.Choice())
    assert kept[1] == chosen.tolist() and kept[2] == [SMALL.id("<eos>")], "of a prompt that is none, nothing but the end follows"


def test_ids_that_the_engine_has_not_got_yet_are_an_error_not_a_guess():
    row = GRAMMAR.row([SMALL.id("<bos>"), SMALL.id("<boi>")], written := [])
    written.append(-1)
    with pytest.raises(RuntimeError, match="id -1 was generated in a image span: turn off the engine's asynchronous scheduling"):
        GRAMMAR.legal([row])


@pytest.mark.parametrize(
    "prompt",
    [
        ["<bos>", "<boc>", 1, 2, 3, 4],  # max_text is 3
        ["<bos>", "<boc>", 1, 2, 3, 4, "<eoc>", "<boi>"],
        ["<bos>", "<boc>", "<eoc>", "<boi>"],  # no text at all
        ["<bos>", "<boi>", *[SMALL.code_offset] * 5],  # the grid has four codes
        ["<bos>", "<boi>", *[SMALL.code_offset] * 3, "<eoi>"],
        ["<bos>", "<grid:1x3>", "<boi>", *[SMALL.code_offset] * 4],
    ],
)
def test_a_prompt_whose_spans_are_too_long_or_too_short_is_answered_with_the_end_token_alone(prompt):
    row = GRAMMAR.row([part if isinstance(part, int) else SMALL.id(part) for part in prompt], written := [], seed=3)
    (masked,) = GRAMMAR.apply(torch.zeros(1, SMALL.size), [row])
    assert masked.isfinite().nonzero()[:, 0].tolist() == [SMALL.id("<eos>")]
    written.append(SMALL.id("<eos>"))
    assert GRAMMAR.legal([row]).sum() == 1, "and the engine goes on"


def test_a_full_prompt_is_none_too_long():
    row = GRAMMAR.row([SMALL.id("<bos>"), SMALL.id("<boc>"), 1, 2, 3], [])
    assert GRAMMAR.legal([row])[0].nonzero()[:, 0].tolist() == [SMALL.id("<eoc>")]


def test_a_code_too_many_is_an_error_of_the_engine():
    row = GRAMMAR.row([SMALL.id("<bos>"), SMALL.id("<boi>")], [SMALL.code_offset] * 4)
    row.written.append(SMALL.code_offset)
    with pytest.raises(RuntimeError, match="was generated in a image span"):
        GRAMMAR.legal([row])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(6, 9), max_size=13))
def test_a_phrase_twice_in_a_row_is_ruled_out_by_its_last_id(said):
    grammar = RequestGrammar(SMALL, NO_REPEATS, Constraints(word_starts=(6, 7), marks=(9,)))
    words = [i for i in said if i != 9]
    twice = lambda text, n: len(text) >= 2 * n and text[-2 * n : -n] == text[-n:] and text[-n] in (6, 7)  # noqa: E731
    ruled_out = lambda text: set(grammar.repeats([text])[0].nonzero()[:, 0].tolist())  # noqa: E731
    assert {i for i in (6, 7, 8) if any(twice([*words, i], n) for n in range(1, 7))} == ruled_out(words)
    row = grammar.row([SMALL.id("<bos>"), SMALL.id("<boc>")], said[:3])
    assert row.words == [i for i in said[:3] if i != 9]
    assert not ruled_out(row.words) & set(grammar.legal([row])[0].nonzero()[:, 0].tolist())


def test_an_unrepeated_word_is_ruled_out_once_it_is_said():
    grammar = RequestGrammar(SMALL, NO_REPEATS, Constraints(word_starts=(6, 7), unrepeated=[(6, 8), (9,)]))
    ruled_out = [set(row.nonzero()[:, 0].tolist()) for row in grammar.repeats([[8, 7], [7, 9, 6], [7, 9, 8, 8]])]
    assert ruled_out == [{6, 8, 7}, {6, 8, 9}, {6, 8}], "in the last, 8 goes on with the word that 9 began"


# --- an engine like vLLM's ----------------------------------------------------------------------------------------------


class Move(enum.Enum):
    UNIDIRECTIONAL = 1
    SWAP = 2


@dataclass
class Update:
    batch_size: int
    removed: list = field(default_factory=list)
    added: list = field(default_factory=list)
    moved: list = field(default_factory=list)


@dataclass
class Params:
    temperature: float = 1.0
    max_tokens: int = 16
    detokenize: bool = True
    extra_args: dict | None = None


@dataclass
class Request:
    number: int
    prompt: list[int]
    params: Params
    token_ids: list[int] = field(default_factory=list)


class Engine:
    """Three places, filled as requests come and go; each step asks the model for one id of each."""

    PLACES = 3

    def __init__(self, model: str, dtype: str, logits_processors: list[str], async_scheduling: bool):
        assert not async_scheduling and dtype == "auto"
        module, name = logits_processors[0].split(":")
        self.kind = getattr(importlib.import_module(module), name)
        config = types.SimpleNamespace(model_config=types.SimpleNamespace(model=model))
        self.processor = self.kind(config, torch.device("cpu"), False)
        self.model, self.noise = AutoModelForCausalLM.from_pretrained(model), torch.Generator().manual_seed(0)
        self.end, self.steps = self.model.generation_config.eos_token_id, 0

    def generate(self, prompts: list[dict], params: list[Params]) -> list[types.SimpleNamespace]:
        for each in params:
            self.kind.validate_params(each)
        waiting = [Request(i, prompt["prompt_token_ids"], each) for i, (prompt, each) in enumerate(zip(prompts, params))]
        done, places = {}, []
        while waiting or places:
            places = self.change(places, waiting, done)
            for request, token in zip(places, self.step(places)):
                request.token_ids.append(token)
            done |= {r.number: r for r in places if r.token_ids[-1] == self.end or len(r.token_ids) == r.params.max_tokens}
            if len(done) == len(prompts):
                self.change(places, waiting, done)
                break
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=done[i].token_ids)]) for i in sorted(done)]

    def change(self, places: list[Request], waiting: list[Request], done: dict) -> list[Request]:
        """Finished requests are replaced, or removed and their places closed from the end; then, now and then, two change places."""
        update, places = Update(0), list(places)
        empty = [i for i, request in enumerate(places) if request.number in done]
        while waiting and (empty or len(places) < self.PLACES):
            place = empty.pop(0) if empty else len(places)
            places[place : place + 1] = [waiting.pop(0)]
            update.added.append((place, places[place].params, places[place].prompt, places[place].token_ids))
        update.removed = empty
        for place in empty:
            while len(places) - 1 > place and len(places) - 1 in empty:
                places.pop()
            if place < len(places) - 1:
                update.moved.append((len(places) - 1, place, Move.UNIDIRECTIONAL))
                places[place] = places[-1]
            if place < len(places):
                places.pop()
        self.steps += 1
        if len(places) > 1 and self.steps % 5 == 0:
            update.moved.append((0, 1, Move.SWAP))
            places[:2] = places[1::-1]
        update.batch_size = len(places)
        changed = update.removed or update.added or update.moved
        self.processor.update_state(update if changed else None)
        return places

    @torch.inference_mode()
    def step(self, places: list[Request]) -> list[int]:
        logits = [self.model(input_ids=torch.tensor([[*r.prompt, *r.token_ids]])).logits[0, -1] for r in places]
        masked = self.processor.apply(torch.stack(logits))
        return torch.multinomial(masked.softmax(-1), 1, generator=self.noise)[:, 0].tolist()


@pytest.fixture
def vllm(monkeypatch):
    """The names that tokun.serving takes from vLLM."""
    processors = types.ModuleType("vllm.v1.sample.logits_processor")
    processors.BatchUpdate, processors.LogitsProcessor, processors.MoveDirectionality = Update, object, Move
    package = types.ModuleType("vllm")
    package.LLM, package.SamplingParams = Engine, Params
    for name in ("vllm.v1", "vllm.v1.sample"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, processors.__name__, processors)
    monkeypatch.setattr(example.os, "environ", dict(example.os.environ))
    yield package
    sys.modules.pop("tokun.serving.processor", None)


def test_an_engine_with_the_processor_draws_the_pairs_that_tokun_draws(tiny_model, checkpoint_folder, vllm, tmp_path, capsys):
    example.main(["--checkpoint", str(checkpoint_folder), "--seed", "3", "--n", "7", "--style", "etching", "--out", str(tmp_path)])
    found = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = tiny_model.sample(3, n=7, style="etching")
    for pair, record in zip(expected, found, strict=True):
        own = json.loads(json.dumps(pair.record()))
        assert record.pop("file_name") == f"000003-{pair.index:02d}.png"
        assert {name: own[name] for name in record} == record and record.keys() == own.keys() - {"image_nll", "caption_nll", "pmi"}
        with Image.open(tmp_path / f"000003-{pair.index:02d}.png") as image:
            assert image.tobytes() == pair.image.tobytes()
    assert example.os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0" and "7 pairs" in capsys.readouterr().out


def test_pictures_of_an_earlier_longer_run_do_not_stay_beside_a_shorter_list(checkpoint_folder, vllm, tmp_path, capsys):
    """The default folder is that of `tokun sample`: its pictures stayed among the new ones, as did those of a run that was killed."""
    command = ["--checkpoint", str(checkpoint_folder), "--seed", "3", "--out", str(tmp_path)]
    example.main([*command, "--n", "4"])
    example.main([*command, "--n", "2"])
    assert f"are now in {tmp_path / 'earlier' / '1'}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["000003-00.png", "000003-01.png", "grid.png"]
    with picture_files.announced(tmp_path / "killed", ['{"seed": 3, "index": 5}']):
        (tmp_path / "killed" / "000003-05.png").write_bytes(b"")
        example.main([*command[:-1], str(tmp_path / "killed"), "--n", "1"])
    assert sorted(path.name for path in (tmp_path / "killed").glob("*.png")) == ["000003-00.png", "grid.png"]


def test_a_killed_run_goes_on_after_its_last_batch(checkpoint_folder, vllm, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "BATCH", 2)
    command, asked, generate = ["--checkpoint", str(checkpoint_folder), "--seed", "3", "--n", "5"], [], Engine.generate

    def counted(engine, prompts, params, *, most=99):
        asked.append([each.extra_args["tokun_index"] for each in params])
        if len(asked) > most:
            raise KeyboardInterrupt
        return generate(engine, prompts, params)

    monkeypatch.setattr(Engine, "generate", lambda *args: counted(*args, most=2))
    with pytest.raises(KeyboardInterrupt):
        example.main([*command, "--out", str(tmp_path / "killed")])
    assert len(list((tmp_path / "killed").glob("*.png"))) == 4
    asked.clear()
    monkeypatch.setattr(Engine, "generate", counted)
    example.main([*command, "--out", str(tmp_path / "killed")])
    assert asked == [[4]], "only what was missing"
    example.main([*command, "--out", str(tmp_path / "whole")])
    for name in ("samples.jsonl", "000003-01.png", "000003-04.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_without_a_seed_the_engine_draws_and_every_sequence_is_whole(tiny_model, checkpoint_folder, vllm):
    v, engine = tiny_model.vocabulary, example.open_engine(checkpoint_folder / "generator", "auto")
    prompts = [[*sequences.prefix(v, Tags("etching", grid=grid)), v.id("<boi>")] for grid in ((4, 4), (2, 6), None)]
    prompts += [[v.id("<bos>"), v.id("<boc>"), *tiny_model.encode_text("a ship"), v.id("<eoc>")], tiny_model.encode_text("tell me a story")]
    made = engine.generate([{"prompt_token_ids": ids} for ids in prompts], [Params(max_tokens=60) for _ in prompts])
    parts = [sequences.unpack(v, [*ids, *out.outputs[0].token_ids]) for ids, out in zip(prompts[:4], made)]
    assert [len(part.codes or []) for part in parts[:3]] == [16, 12, 16] and all(
        part.task == "joint" and part.caption for part in parts[:3]
    )
    assert parts[3].task in ("text_to_image", "rewrite")
    assert made[4].outputs[0].token_ids == [v.id("<eos>")], "a stranger's prompt ends at once, and the engine goes on"
    assert not engine.processor.rows


BAD_EXTRAS = [
    ({"tokun_seed": "x"}, "seed is"),
    ({"tokun_seed": -1}, "seed is"),
    ({"tokun_seed": 1, "tokun_index": -2}, "indices are"),
    ({"tokun_uniforms": "not base64!"}, "tokun_uniforms"),
    ({"tokun_uniforms": ""}, "tokun_uniforms"),
    ({"tokun_uniforms": backend.pack(torch.tensor([0.5, 1.5]))}, "tokun_uniforms"),
    ({"tokun_temperature": -1}, "temperature is"),
    ({"tokun_top_p": 0}, "top_p is"),
]


@pytest.mark.parametrize(("extra", "told"), BAD_EXTRAS)
def test_a_request_with_a_seed_that_is_none_is_refused_at_the_door(checkpoint_folder, vllm, extra, told):
    engine = example.open_engine(checkpoint_folder / "generator", "auto")
    with pytest.raises(ValueError, match=told):
        engine.generate([{"prompt_token_ids": [1]}], [Params(extra_args=extra)])


def test_a_latent_of_another_checkpoint_is_answered_with_the_end_token_alone(checkpoint_folder, tiny_model, vllm):
    engine = example.open_engine(checkpoint_folder / "generator", "auto")
    prompt = sequences.image_prompt(tiny_model.vocabulary, Tags("etching"))
    (made,) = engine.generate([{"prompt_token_ids": prompt}], [Params(extra_args={"tokun_uniforms": backend.pack(torch.full((9,), 0.5))})])
    assert made.outputs[0].token_ids == [tiny_model.vocabulary.id("<eos>")]


# --- a server like vLLM's -----------------------------------------------------------------------------------------------


class Door(BaseHTTPRequestHandler):
    """The two addresses of vLLM's HTTP interface that are used, in front of the engine above."""

    engine: Any
    seen: list[dict]
    lock = threading.Lock()

    def do_GET(self):
        self.send({"data": [{"id": "the-generator"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        try:
            with self.lock:
                asked = Params(body["temperature"], body["max_tokens"], extra_args=body["vllm_xargs"])
                (made,) = self.engine.generate([{"prompt_token_ids": body["prompt"]}], [asked])
        except ValueError as error:
            return self.send({"error": {"message": str(error)}}, 400)
        ids = made.outputs[0].token_ids
        if not body["stream"]:
            return self.send({"choices": [{"token_ids": ids}]})
        lines = [f"data: {json.dumps({'choices': [{'token_ids': ids[i : i + 3]}]})}\n\n" for i in range(0, len(ids), 3)]
        self.send("".join([*lines, "data: [DONE]\n\n"]))

    def send(self, content, status=200):
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(checkpoint_folder, vllm):
    handler = type("OneDoor", (Door,), {"engine": example.open_engine(checkpoint_folder / "generator", "auto"), "seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as opened:
        threading.Thread(target=opened.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{opened.server_port}", handler
        opened.shutdown()


def ids_of(pairs):
    return [(pair.index, pair.tags, pair.codes, pair.caption_ids, pair.caption, pair.image.tobytes()) for pair in pairs]


def test_a_server_draws_the_pairs_that_tokun_draws_also_with_other_settings_and_on_the_way_between_seeds(tiny_model, server):
    far = backend.served(tiny_model, server[0])
    here, there = tiny_model.sample(3, n=4, style="etching", guidance_scale=1), far.sample(3, n=4, style="etching")
    assert ids_of(there) == ids_of(here)
    for pair, own in zip(there, here):
        assert [pair.image_nll, pair.caption_nll, pair.pmi] == pytest.approx([own.image_nll, own.caption_nll, own.pmi], abs=1e-3)
    wish = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "no_repeats": True, "text_guidance_scale": 2.5}
    assert ids_of(far.sample(4, n=3, **wish)) == ids_of(tiny_model.sample(4, n=3, guidance_scale=1, **wish))
    words = {"text_guidance_scale": 1, "no_repeats": True, "text_temperature": 2.0}
    assert ids_of(far.sample(5, n=3, **words)) == ids_of(tiny_model.sample(5, n=3, guidance_scale=1, **words))
    assert ids_of(far.interpolate(1, 2, 3)) == ids_of(tiny_model.interpolate(1, 2, 3, guidance_scale=1))


def test_of_a_prompted_pair_the_picture_alone_costs_nats_as_where_tokun_draws_it(tiny_model, server):
    u, caption = tiny_model.uniforms(3, range(2)), tiny_model.encode_text("a ship on a dark ground")
    tags = tiny_model.choose_tags(u, tiny_model.wanted_tags("etching"))
    models = tiny_model, backend.served(tiny_model, server[0])
    for (ids, *nats), (others, *far) in zip(*(model.sequences_from(u, tags, DecodingSettings(), caption=caption) for model in models)):
        assert others == ids and far == pytest.approx(nats, abs=1e-3) and nats[1:] == [0.0, 0.0, None]


def test_a_pair_from_a_server_can_be_watched_as_it_is_drawn(tiny_model, server):
    seen: list[tuple[int, int]] = []
    (pair,) = backend.served(tiny_model, server[0]).sample(
        3, n=1, text_guidance_scale=1, watch=lambda codes, ids: seen.append((len(codes), len(ids)))
    )
    assert server[1].seen[-1]["stream"] and seen == sorted(seen) and len(seen) > 3 and seen[-1] == (len(pair.codes), len(pair.caption_ids))


def test_the_demo_draws_through_a_server(tiny_model, checkpoint_folder, server, monkeypatch):
    pytest.importorskip("gradio", reason="the demo needs the extra 'app'")
    from tokun.app import demo, page

    shown = []
    monkeypatch.setattr(page, "build", shown.append)
    monkeypatch.setattr(page, "serve", lambda *_, **__: None)
    page.main(["--checkpoint", str(checkpoint_folder), "--device", "cpu", "--backend", server[0]])
    *_, pairs = demo.Studio(shown[0]).draw(3, 2, guidance=1.0)
    assert server[1].seen and ids_of(pairs) == ids_of(tiny_model.sample(3, n=2, guidance_scale=1))


def test_what_a_server_cannot_draw_is_refused_and_what_needs_no_server_is_done_here(tiny_model, server):
    far = backend.served(replace(tiny_model, defaults=replace(tiny_model.defaults, best_of=3)), server[0])
    assert far.defaults.guidance_scale == far.defaults.best_of == 1
    with pytest.raises(ValueError, match="guidance_scale is 3, but a vLLM server draws pictures without guidance: leave it at 1"):
        far.sample(3, n=1, guidance_scale=3)
    asked = len(server[1].seen)
    picture = tiny_model.sample(3, n=1, guidance_scale=1)[0].image
    assert far.caption(picture, seed=2) == tiny_model.caption(picture, seed=2)
    assert ids_of(far.complete(picture, "top", n=1)) == ids_of(tiny_model.complete(picture, "top", n=1)) and len(server[1].seen) == asked


def test_a_server_that_is_not_there_is_none_or_lacks_the_processor_is_told_in_one_line(tiny_model, server):
    with pytest.raises(ValueError, match="--backend 'localhost:8000' is not a web address: give one like http://localhost:8000"):
        backend.served(tiny_model, "localhost:8000")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ValueError, match=rf"--backend http://127.0.0.1:{port} cannot be reached .*: start it with `vllm serve"):
        backend.served(tiny_model, f"http://127.0.0.1:{port}")
    far = backend.served(tiny_model, server[0])
    server[1].engine = types.SimpleNamespace(
        generate=lambda *_: [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[1, 2, 3])])]
    )
    with pytest.raises(
        ValueError, match="which are no picture and words of this model: it serves another checkpoint, or was not started with"
    ):
        far.sample(3, n=1)

    def refuses(*_):
        raise ValueError("This model's maximum context length is 8 tokens")

    server[1].engine = types.SimpleNamespace(generate=refuses)
    with pytest.raises(ValueError, match=r"answers 400: .*maximum context length is 8"):
        far.sample(3, n=1)


def test_the_exported_generator_says_all_that_an_engine_asks(tiny_model, checkpoint_folder):
    v, folder = tiny_model.vocabulary, checkpoint_folder / "generator"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["model_type"] == "qwen3"
    longest = len(sequences.prefix(v, Tags("etching", "shapes", "poetic", (4, 4)))) + tiny_model.slots.size
    assert config["max_position_embeddings"] >= longest and config["vocab_size"] >= v.size
    ends = json.loads((folder / "generation_config.json").read_text())
    assert ends["eos_token_id"] == v.id("<eos>") == AutoTokenizer.from_pretrained(folder).eos_token_id


def test_want_of_vllm_is_told(checkpoint_folder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"extra 'serve': in tokun's own folder, pip install -e '.\[serve\]'"):
        example.main(["--checkpoint", str(checkpoint_folder), "--out", str(tmp_path)])
