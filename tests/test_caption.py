"""Caption: shards in, shards with more captions out; whatever is killed, shared out or retried, the bytes are the same."""

import fcntl
import io
import json
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from data_tools import caption as tool
from data_tools import captioning as captioners
from data_tools.caption import main
from data_tools.captioning import caption_results, captioned_shards, journals, ranking, registers, rows, run, writers
from data_tools.captioning.run import caption, preview
from data_tools.captioning.settings import Settings, Work
from data_tools.readers.stored_pairs import read_pairs
from tests.kills import kills
from tests.test_captioners import Server, completion, git, llava, save
from tests.test_clip import tiny_clip

ENGRAVINGS = Path(__file__).parents[2] / "shared/data/engravings/val-00000.tar"
COMMAND = [sys.executable, "-m", "data_tools.caption"]
QUICK = dict(pause=0.001, concurrency=4)


def records(folder: Path) -> dict[str, dict]:
    """KEY.json of all pairs in a folder of shards, by key."""
    return {pair.key: json.loads(pair.members["json"]) for shard in sorted(folder.glob("*.tar")) for pair in read_pairs(shard, [])}


def everything(folder: Path) -> dict[str, bytes]:
    """What a run leaves for others: all files but its own state."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), "gray").save(buffer, "PNG")
    return buffer.getvalue()


def words_for(body: dict) -> str:
    """The answer of an honest server: a sentence for each register of the schema, which depends on the question alone."""
    names = body["response_format"]["json_schema"]["schema"]["required"]
    question = json.dumps(body["messages"], sort_keys=True)
    return json.dumps({name: f"{name.title()} words {registers.words_of(journals.sha256(question + name))[0][:12]}." for name in names})


@pytest.fixture
def server():
    server = Server(words_for)
    yield server
    server.close()


def asking(server: Server, *names: str, **more) -> Settings:
    return Settings(registers=names or ("plain", "alt"), endpoint=server.url, endpoint_model="tiny", **more)


# ---------------------------------------------------------------------------------------------------------------------
# what is written


def test_templates_caption_every_row_and_say_that_they_are_templates(toy_shards, tmp_path):
    report = caption([toy_shards], tmp_path / "out", Settings(registers=registers.REGISTERS), Work())
    assert (report.rows, report.captions, report.outcomes) == (24, 120, {"captioned": 24})
    before, after = records(toy_shards), records(tmp_path / "out")
    assert list(before) == list(after)
    for key, record in after.items():
        assert record["caption"] == before[key]["caption"]  # the source text
        assert set(record["captions"]) == set(registers.REGISTERS)
        for name, source in record["caption_sources"].items():
            assert (
                source["source"] == "template"
                and source["model"] == ""
                and source["prompt_sha256"] == journals.sha256(registers.TEMPLATES[name])
            )
        for name, text in before[key].get("captions", {}).items():  # what was there is kept beside
            kept = [record["captions"][name], record["caption"], *(one["text"] for one in record["earlier_captions"])]
            assert text in kept
    for shard in sorted(toy_shards.glob("*.tar")):  # pictures as they were
        pairs = zip(read_pairs(shard, []), read_pairs(tmp_path / "out" / shard.name, []))
        assert all(one.image == other.image for one, other in pairs)
    assert json.loads((tmp_path / "out/caption.json").read_text())["shards"] == {f"train-0000{i}.tar": n for i, n in enumerate((10, 10, 4))}


def test_captions_of_several_models_are_kept_side_by_side():
    record = {"caption": "Fig. 3", "captions": {"plain": "Fig. 3", "alt": "By hand"}}
    first = {"captions": {name: {"text": f"{name} A", "source": "model", "model": "A"} for name in ("plain", "alt")}, "failures": {}}
    second = {"captions": {"plain": {"text": "plain B", "source": "model", "model": "B"}}, "failures": {"alt": "loop"}}
    after = captioned_shards.new_record(record, first, ("plain", "alt"), {"plain": {"clip": 0.3}})
    again = captioned_shards.new_record(after, second, ("plain", "alt"), {})
    assert record == {"caption": "Fig. 3", "captions": {"plain": "Fig. 3", "alt": "By hand"}}
    assert again["caption"] == "Fig. 3" and again["captions"] == {"plain": "plain B", "alt": "alt A"}
    assert [(one["register"], one["text"]) for one in again["earlier_captions"]] == [("alt", "By hand"), ("plain", "plain A")]
    assert again["earlier_captions"][1]["source"] == {"source": "model", "model": "A", "scores": {"clip": 0.3}}
    assert again["caption_failures"] == {"alt": "loop"} and "caption_failures" not in after


def test_an_empty_source_text_is_filled_and_the_record_says_by_whom():
    row = {"captions": {"plain": {"text": "A ship.", "source": "model", "model": "A"}}, "failures": {}}
    record = captioned_shards.new_record({"caption": "", "style": "etching"}, row, ("plain",), {})
    assert record["caption"] == "A ship." and record["caption_source"] == {"register": "plain", "source": "model", "model": "A"}


def test_a_local_captioner_sees_and_templates_go_on_from_its_words(toy_shards, tmp_path):
    model = save(git, tmp_path / "git")
    settings = Settings(registers=("plain", "poetic", "era"), model=model, max_new_tokens=6)
    report = caption([toy_shards], tmp_path / "out", settings, Work(device="cpu", batch_size=4))
    assert report.registers["plain"]["model"] + sum(report.registers["plain"][name] for name in ("loop", "empty answer")) == 24
    written = [record for record in records(tmp_path / "out").values() if "plain" in record["caption_sources"]]
    assert written
    for record in written:
        source = record["caption_sources"]["plain"]
        assert source["model"] == "git" and source["revision"].startswith("sha256:") and isinstance(source["seed"], int)
        assert record["captions"]["plain"].lower() in record["captions"]["poetic"].lower()
        assert record["captions"]["era"].startswith(record["caption"].rstrip("."))  # the printed caption is of its time
        assert record["caption_sources"]["poetic"]["source"] == "template"
    assert str(tmp_path) not in (tmp_path / "out/caption.json").read_text()  # no path of this machine


def test_a_chat_model_writes_every_register_from_the_picture_with_metadata_as_hints(toy_shards, tmp_path, monkeypatch):
    asked = []
    write = captioners.ChatModel.write
    monkeypatch.setattr(
        captioners.ChatModel, "write", lambda self, images, prompts, **how: asked.extend(prompts) or write(self, images, prompts, **how)
    )
    settings = Settings(registers=("plain", "social"), hints=("subject",), model=save(llava, tmp_path / "llava"), max_new_tokens=6)
    report = caption([toy_shards / "train-00002.tar"], tmp_path / "out", settings, Work(device="cpu", batch_size=4))
    assert set(report.registers) == {"plain", "social"} and report.rows == 4 and len(asked) == 8
    assert all("- subject: " in prompt and "printed caption" not in prompt for prompt in asked)


def test_a_server_sees_the_pictures_and_its_answers_are_recorded_with_tokens_and_costs(toy_shards, tmp_path, server):
    report = caption([toy_shards], tmp_path / "out", asking(server), Work(prices=(1e6, 2e6), api_key="sk-secret", **QUICK))
    assert report.captions == 48 and report.tokens == [24 * 11, 24 * 3] and report.cost == 24 * 11 + 2 * 24 * 3
    source = next(iter(records(tmp_path / "out").values()))["caption_sources"]["alt"]
    assert (source["source"], source["model"], source["revision"]) == ("endpoint", "tiny", "tiny-2026")
    assert all(body["messages"][0]["content"][0]["type"] == "image_url" for body in server.requests)
    assert len({body["seed"] for body in server.requests}) == 24
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and b"sk-secret" in path.read_bytes()]


def test_transformers_serve_is_such_a_server(toy_shards, tmp_path):
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="transformers serve needs transformers[serving]")
    model, processor = llava()
    model.generation_config.do_sample = True  # so that random weights come to an end
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    serve = subprocess.Popen([sys.executable, "-c", code, "serve", "--port", str(port), "--device", "cpu"], stderr=subprocess.DEVNULL)
    try:
        url = f"http://localhost:{port}"
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.2)
        settings = Settings(endpoint=f"{url}/v1", endpoint_model=str(tmp_path / "llava"), max_new_tokens=96, temperature=1.0)
        report = caption([toy_shards / "train-00002.tar"], tmp_path / "out", settings, Work(concurrency=1))
        assert report.rows == 4 and report.tokens[0] > 0 and set(report.outcomes) <= {"captioned", "answer truncated", "loop"}
    finally:
        serve.kill()
        serve.wait()


def test_a_server_rewrites_what_a_local_captioner_saw(toy_shards, tmp_path, server):
    settings = asking(server, "plain", "poetic", model=save(git, tmp_path / "git"), max_new_tokens=6)
    report = caption([toy_shards], tmp_path / "out", settings, Work(device="cpu", batch_size=4, **QUICK))
    assert report.registers["poetic"]["endpoint"] == report.registers["plain"]["model"] == len(server.requests) > 0
    assert all("what it shows" in body["messages"][0]["content"] for body in server.requests)  # words alone, no picture


def test_words_alone_go_to_a_language_model_with_what_an_earlier_run_saw(tmp_path, server):
    record = {
        "caption": "Fig. 3",
        "captions": {"plain": "A ship in a storm."},
        "caption_sources": {"plain": {"source": "model"}},
        "style": "etching",
    }
    shard = write_tar(tmp_path / "s.tar", {"a.png": picture(), "a.json": json.dumps(record).encode(), "b.png": picture(), "b.json": b"{}"})
    report = caption([shard], tmp_path / "out", asking(server, "poetic", send_pictures=False, hints=("technique",)), Work(**QUICK))
    assert report.registers["poetic"] == {"endpoint": 1, "no metadata": 1} and len(server.requests) == 1
    prompt = server.requests[0]["messages"][0]["content"]
    assert "- what it shows: A ship in a storm.\n- technique: etching\n" in prompt and "Fig. 3" not in prompt


# ---------------------------------------------------------------------------------------------------------------------
# rows that fail


def test_every_row_that_fails_stays_with_a_counted_reason(tmp_path, server):
    shards = write_tar(
        tmp_path / "train-0.tar",
        {"a.png": picture(), "a.json": b'{"caption": "A"}', "b.png": b"broken", "b.json": b'{"caption": "B"}', "c.png": picture(),
         "c.json": b"{not json", "d.png": picture()},
    )  # fmt: skip
    report = caption([shards], tmp_path / "out", asking(server, "plain"), Work(**QUICK))
    assert report.outcomes == {"captioned": 2, "broken picture": 1, "damaged record": 1}
    pairs = {pair.key: pair.members for pair in read_pairs(tmp_path / "out/train-0.tar", [])}
    assert list(pairs) == ["a", "b", "c", "d"] and pairs["c"]["json"] == b"{not json"
    assert json.loads(pairs["b"]["json"])["caption_failures"] == {"plain": "broken picture"}
    assert json.loads(pairs["d"]["json"])["caption"].startswith("Plain words")  # there was no record


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("nothing to see", "answer is not a JSON object"),
        ('{"alt": "A ship."}', "missing from the answer"),
        ('{"plain": 3, "alt": "A."}', "answer is not text"),
        ('{"plain": "I\'m sorry, I cannot", "alt": "A."}', "refusal"),
        ('{"plain": "a ship a ship a ship a ship", "alt": "A."}', "loop"),
    ],
)
def test_bad_answers_are_counted_by_reason(toy_shards, tmp_path, server, answer, reason):
    server.plan = [(200, {}, completion(answer))]
    report = caption([toy_shards / "train-00002.tar"], tmp_path / "out", asking(server), Work(**QUICK))
    assert report.registers["plain"] == {reason: 4} and report.tokens == [44, 12]  # paid all the same


def test_retry_failed_tries_what_failed_and_only_that(toy_shards, tmp_path, server):
    shard, out, settings = [toy_shards / "train-00002.tar"], tmp_path / "out", asking(server)
    server.plan = [(200, {}, completion('{"plain": "A ship.", "alt": "..."}'))]
    assert caption(shard, out, settings, Work(**QUICK)).outcomes == {"empty answer": 4}
    server.plan, before = ["ok"], len(server.requests)
    assert caption(shard, out, settings, Work(**QUICK)).outcomes == {"empty answer": 4} and len(server.requests) == before
    report = caption(shard, out, settings, Work(retry_failed=True, **QUICK))
    assert report.outcomes == {"captioned": 4} and len(server.requests) == before + 4
    new = server.requests[before:]
    assert all(body["response_format"]["json_schema"]["schema"]["required"] == ["alt"] and body["temperature"] == 0.7 for body in new)
    assert {body["seed"] for body in new}.isdisjoint(body["seed"] for body in server.requests[:before])
    assert {record["captions"]["plain"] for record in records(out).values()} == {"A ship."}
    assert (
        caption(shard, out, settings, Work(retry_failed=True, **QUICK)).outcomes == {"captioned": 4} and len(server.requests) == before + 4
    )


def test_a_round_of_retries_that_is_killed_goes_on_and_tries_nothing_twice(toy_shards, tmp_path, server):
    server.plan = [(200, {}, completion("..."))]
    for out in ("whole", "cut"):
        caption([toy_shards], tmp_path / out, asking(server), Work(**QUICK))
    caption([toy_shards], tmp_path / "whole", asking(server), Work(retry_failed=True, **QUICK))
    folder = journals.Folder(tmp_path / "cut")
    assert folder.retry_attempt(sorted(toy_shards.glob("*.tar"))) == 1
    task = rows.Task(toy_shards / "train-00000.tar", asking(server), attempt=1)
    with journals.Journal(folder.journal(task.shard), json.loads(folder.journal(task.shard).read_text().splitlines()[0])) as kept:
        for block in writers.run_stages(writers.make_stages(asking(server), Work(**QUICK)), list(task.blocks(kept.rows))[:3]):
            kept.add([row.as_json() for row in block])  # three rows, and then it is killed
    before = len(server.requests)
    caption([toy_shards], tmp_path / "cut", asking(server), Work(retry_failed=True, **QUICK))
    assert len(server.requests) == before + 24 - 3 and everything(tmp_path / "cut") == everything(tmp_path / "whole")


def test_a_server_that_is_down_stops_the_run_which_then_goes_on(toy_shards, tmp_path, server, capsys):
    server.plan = [(503, {}, "full")]
    with pytest.raises(ValueError, match=r"16 consecutive rows without an answer \(endpoint answers 503; full\). Is it running\?"):
        caption([toy_shards], tmp_path / "out", asking(server), Work(tries=2, **QUICK))
    server.plan = ["ok"]
    assert caption([toy_shards], tmp_path / "out", asking(server), Work(retry_failed=True, **QUICK)).outcomes == {"captioned": 24}


def test_a_shard_that_breaks_off_is_captioned_as_far_as_it_goes_and_told(toy_shards, tmp_path):
    whole = (toy_shards / "train-00000.tar").read_bytes()
    (tmp_path / "train-00000.tar").write_bytes(whole[: len(whole) // 2 + 100])
    report = caption([tmp_path / "train-00000.tar"], tmp_path / "out", Settings(), Work())
    assert 0 < report.rows < 10 and "train-00000.tar" in report.damaged[0]
    assert len(records(tmp_path / "out")) == report.rows


def test_pairs_are_counted_as_they_are_read(tmp_path):
    write_tar(tmp_path / "a.tar", {"./a.png": b"", "a.json": b"", "b.png": b"", "./in/b.png": b"", "in/b.JSON": b"", ".json": b""})
    assert journals.count_pairs(tmp_path / "a.tar") == len(list(read_pairs(tmp_path / "a.tar", []))) == 4


def test_code_shards_among_others_are_refused_by_their_own_folder(toy_shards, tmp_path, capsys):
    (tmp_path / "codes").mkdir()
    write_tar(tmp_path / "codes" / "codes.tar", {"a.json": b"{}"})
    (tmp_path / "codes" / "codes.json").write_text("{}")
    assert main([str(toy_shards), str(tmp_path / "codes"), "--out", str(tmp_path / "out")]) == 2
    assert f"{tmp_path / 'codes'} holds code shards" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# killed, shared out, limited: the same bytes


def test_a_limit_is_raised_later_and_the_end_is_that_of_one_run(toy_shards, tmp_path):
    settings = Settings(registers=("plain", "alt"))
    caption([toy_shards], tmp_path / "whole", settings, Work(batch_size=4))
    report = caption([toy_shards], tmp_path / "out", settings, Work(limit=13, batch_size=4))
    assert report.rows == 13 and [path.name for path in sorted((tmp_path / "out").glob("*.tar"))] == ["train-00000.tar", "train-00001.tar"]
    assert list(records(tmp_path / "out")) == list(records(toy_shards))[:13]
    caption([toy_shards], tmp_path / "out", settings, Work(batch_size=4))
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_processes_that_share_the_shards_make_the_bytes_of_one(toy_shards, tmp_path, monkeypatch):
    settings = Settings(registers=("plain", "social"))
    caption([toy_shards], tmp_path / "one", settings, Work())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert caption([toy_shards], tmp_path / "two", settings, Work()) is None  # the other is still at work
    monkeypatch.setenv("RANK", "0")
    assert caption([toy_shards], tmp_path / "two", settings, Work()).rows == 24
    assert everything(tmp_path / "two") == everything(tmp_path / "one")


@pytest.mark.slow
def test_two_processes_of_accelerate_make_the_bytes_of_one(toy_shards, tmp_path):
    settings = [
        "--registers",
        "plain,poetic",
        "--model",
        save(git, tmp_path / "git"),
        "--max-new-tokens",
        "6",
        "--batch-size",
        "4",
        "--device",
        "cpu",
    ]
    assert main([str(toy_shards), "--out", str(tmp_path / "one"), *settings]) == 0
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--cpu",
        "--num_cpu_threads_per_process",
        "1",
        "-m",
    ]
    command = [*launch, "data_tools.caption", str(toy_shards), "--out", str(tmp_path / "two"), *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    assert everything(tmp_path / "two") == everything(tmp_path / "one")


def test_a_shard_whose_rows_change_and_change_back_is_what_its_rows_say_whatever_was_killed_between(toy_shards, tmp_path):
    shard, folder = toy_shards / "train-00000.tar", journals.Folder(tmp_path / "out")
    caption([shard], tmp_path / "out", Settings(), Work())
    rows, before = journals.read_journal(folder.journal(shard))[1], everything(tmp_path / "out")

    def publish(left_out: set[int]) -> None:
        captioned_shards.publish_shard(folder, shard, rows, ("plain",), {}, left_out)

    for _ in kills(lambda: publish({0}), tmp_path):
        publish(set())
        assert {name: data for name, data in everything(tmp_path / "out").items() if not name.endswith(".partial")} == before


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_bytes_of_one_that_was_not(toy_shards, tmp_path):
    """Killed behind 1, 3, 5, 2 and 4 more answers: the server holds the next one back."""
    turn, moved = SimpleNamespace(number=0, left=1000), threading.Condition()

    def answer(body: dict) -> str:
        with moved:
            mine = turn.number
            moved.wait_for(lambda: turn.left or turn.number != mine)
            turn.left -= turn.number == mine
            moved.notify_all()
        return words_for(body)

    server = Server(answer)
    options = ["--registers", "plain,alt", "--endpoint", server.url, "--endpoint-model", "tiny", "--concurrency", "2"]
    caption([toy_shards], tmp_path / "whole", asking(server), Work(**QUICK))
    command = [*COMMAND, str(toy_shards), "--out", str(tmp_path / "out"), *options]
    for answers, wait in ((1, 0.0), (3, 0.03), (5, 0.06), (2, 0.1), (4, 0.02)):  # seconds behind the last of them
        with moved:
            turn.number, turn.left = turn.number + 1, answers
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
        with moved:
            assert moved.wait_for(lambda: not turn.left, timeout=60)
        time.sleep(wait)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    with moved:
        turn.number, turn.left = turn.number + 1, 1000
        moved.notify_all()
    assert subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[1]).returncode == 0
    server.close()
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_a_journal_cut_anywhere_is_taken_up_at_its_last_whole_line(tmp_path):
    head, rows = {"shard": "a"}, [[{"row": 0, "failures": {}}, {"row": 1, "failures": {}}], [{"row": 2, "failures": {}}]]
    path = tmp_path / "a.jsonl"
    with journals.Journal(path, head) as kept:
        for block in rows:
            kept.add(block)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with journals.Journal(path, head) as kept:
            lines = sum(end <= cut for end in ends)
            assert sorted(kept.rows) == [0, 1, 2][: (0, 0, 2, 3)[lines]]  # a batch is there whole, or not
            for block in rows[max(0, lines - 1) :]:
                kept.add(block)
        assert path.read_bytes() == whole


def test_a_folder_of_other_settings_or_other_things_is_refused(toy_shards, tmp_path):
    out = tmp_path / "out"
    caption([toy_shards], out, Settings(), Work(limit=3))
    with pytest.raises(
        ValueError, match=r"was started with other settings \(seed: 0 then, 1 now\). Give the same ones to resume, or name another"
    ):
        caption([toy_shards], out, Settings(seed=1), Work())
    with pytest.raises(ValueError, match=r"is the folder of train-00000.tar itself"):
        caption([toy_shards], toy_shards, Settings(), Work())
    write_tar(tmp_path / "other.tar", {})
    with pytest.raises(ValueError, match="holds shards that this tool did not write"):
        caption([toy_shards], tmp_path, Settings(), Work())
    with open(journals.Folder(out).journal(toy_shards / "train-00000.tar")) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is in use by another run"):
            caption([toy_shards], out, Settings(), Work())


def test_a_damaged_journal_is_named_with_the_way_out(toy_shards, tmp_path):
    caption([toy_shards], tmp_path / "out", Settings(), Work())
    path = journals.Folder(tmp_path / "out").journal(toy_shards / "train-00001.tar")
    path.write_bytes(path.read_bytes().replace(b'"row"', b'"rou"', 1))
    with pytest.raises(ValueError, match=r"line 2 of .*train-00001.jsonl is damaged: delete the file"):
        caption([toy_shards], tmp_path / "out", Settings(), Work())


# ---------------------------------------------------------------------------------------------------------------------
# scores


def test_keep_best_leaves_out_the_worst_by_percentile_and_says_which(toy_shards, tmp_path):
    settings, out = Settings(registers=("plain", "alt")), tmp_path / "out"
    work = Work(clip=tiny_clip(tmp_path / "clip"), keep_best=0.9, device="cpu")
    report = caption([toy_shards], out, settings, work)
    assert (report.rows, report.left_out) == (24, 2)
    everyone = caption([toy_shards], tmp_path / "all", settings, Work(clip=work.clip, device="cpu"))
    scored, kept = records(tmp_path / "all"), records(out)
    assert everyone.left_out == 0 and not (tmp_path / "all/left-out.jsonl").exists() and len(scored) == 24

    def mean(record: dict) -> float:
        return sum(source["scores"]["clip_percentile"] for source in record["caption_sources"].values()) / 2

    worst = sorted(scored, key=lambda key: mean(scored[key]))[:2]
    assert set(scored) - set(kept) == set(worst)
    assert {json.loads(line)["key"] for line in (out / "left-out.jsonl").read_text().splitlines()} == set(worst)
    for name in ("plain", "alt"):  # the higher the score, the higher the percentile, within the set
        scores = sorted(
            (r["caption_sources"][name]["scores"]["clip"], r["caption_sources"][name]["scores"]["clip_percentile"]) for r in scored.values()
        )
        assert [p for _, p in scores] == sorted(p for _, p in scores) and 0 < scores[0][1] < scores[-1][1] < 100
    assert caption([toy_shards], out, settings, Work(clip=work.clip, keep_best=1.0, device="cpu")).left_out == 0  # and back again
    assert everything(out) == everything(tmp_path / "all")


def test_percentiles_count_ties_half():
    assert ranking.percentiles([0.1, 0.3, 0.3, 0.5]) == [12.5, 50.0, 50.0, 87.5]
    assert tool.parse_share("90%") == tool.parse_share("0.9") == 0.9


def test_a_broken_picture_has_no_score_and_is_left_out(tmp_path):
    members = {"b.png": b"broken", "b.json": b'{"caption": "A boat"}'}
    members |= {f"{key}.{ext}": data for key in "acd" for ext, data in (("png", picture()), ("json", b'{"caption": "A ship"}'))}
    work = Work(clip=tiny_clip(tmp_path / "clip"), keep_best=0.99, device="cpu")
    report = caption([write_tar(tmp_path / "s.tar", members)], tmp_path / "out", Settings(), work)
    assert report.left_out == 1 and json.loads((tmp_path / "out/left-out.jsonl").read_text())["reason"] == "no score"


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_templates_that_say_nothing_are_no_success_and_it_is_said_what_to_do(tmp_path, capsys):
    members = {}
    for k in range(24):
        members |= {f"{k:03d}.png": picture(), f"{k:03d}.json": json.dumps({"caption": "", "style": "engraving"}).encode()}
    shards = write_tar(tmp_path / "shards.tar", members)
    assert main([str(shards), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr()
    assert "All 24 plain captions are templates" in told.err and "24 captions are only 1 different text" in told.err
    assert "--model or --endpoint" in told.err and "Next:" not in told.out
    assert json.loads((tmp_path / "out" / caption_results.RECORD).read_text())["distinct"] == {"plain": 1}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([("A ship.", "model")] * 30, ["plain: The 30 captions are only 1 different text"]),
        ([(f"Ship {k}.", "model") for k in range(30)], []),
        ([(f"Ship {k}.", "template") for k in range(30)], ["All 30 plain captions are templates"]),
        ([*[(f"Ship {k}.", "endpoint") for k in range(10)], *[None] * 20], ["Only 10 of 30 pictures have a plain caption"]),
        ([None] * 3, []),
    ],
)
def test_a_report_doubts_captions_that_are_few_alike_or_templates(rows, told):
    report = caption_results.CaptionReport()
    for row in rows:
        captions = {"plain": {"text": row[0], "source": row[1]}} if row else {}
        report.add({"captions": captions, "failures": {} if row else {"plain": "loop"}})
    assert len(report.doubts()) == len(told) and all(words.startswith(start) for words, start in zip(report.doubts(), told))
    assert not report.is_useless()


def test_the_preview_is_a_sheet_and_nothing_else(toy_shards, tmp_path):
    path, counts = preview([toy_shards], tmp_path / "out", Settings(registers=("plain", "alt")), Work(), 5)
    assert counts == {"captioned": 5} and [file.name for file in (tmp_path / "out").iterdir()] == ["preview.png"]
    with Image.open(path) as sheet:
        assert sheet.height > sheet.width  # five rows of two
    row = rows.CaptionRow(
        "s", 0, "k", ("plain", "alt"), captions={"plain": {"text": "A ship.", "source": "template"}}, failures={"alt": "loop"}
    )
    assert [run.text_on_sheet(row, name) for name in row.wanted] == ["plain (template): A ship.", "alt: FAILED, loop"]


def test_the_command_tells_what_it_did_and_what_comes_next(toy_shards, tmp_path, capsys):
    assert main([str(toy_shards), "--out", str(tmp_path / "out"), "--registers", "plain,social", "--no-hashtags", "--limit", "5"]) == 0
    told = capsys.readouterr()
    assert "captioned" in told.out and "template 5" in told.out and "tokun inspect" in told.out
    assert "row/s" in told.err and "captioned 5" in told.err  # the bar: rate, time left, counts
    assert not any("#" in record["captions"]["social"] for record in records(tmp_path / "out").values())
    assert main([str(toy_shards), "--out", str(tmp_path / "out"), "--preview", "3"]) == 0
    assert "run the same command without --preview" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--registers", "plane"], "did you mean 'plain'"),
        (["--endpoint", "localhost:1", "--endpoint-model", "m"], "give one like http://localhost:8000/v1"),
        (["--endpoint", "http://localhost:1"], "needs --endpoint-model"),
        (["--endpoint", "http://h", "--endpoint-model", "m", "--rewriter", "r"], "give only one of them"),
        (["--hints", "colour"], "--hints names 'colour': give some of caption, title"),
        (["--shape", "round"], "--shape 'round' is unknown"),
        (["--keep-best", "90%"], "needs --clip"),
        (["--keep-best", "many"], "give 90%"),
        (["--price", "1"], "give one like 0.15,0.60"),
        (["--batch-size", "0"], "--batch-size 0 must be 1 or more"),
        (["--preview", "-1"], "must be 1 or more"),
        (["--temperature", "9"], "outside 0..5"),
        (["--limit", "-1"], "0 (all) or more"),
        (["--max-new-tokens", "0"], "must be 1 or more"),
    ],
)
def test_mistakes_are_told_with_the_way_out(toy_shards, tmp_path, capsys, options, message):
    assert main([str(toy_shards), "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_missing_shards_and_shards_that_cannot_be_told_apart_are_refused(toy_shards, tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2 and "does not exist: give shards (.tar)" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2 and "no shards (*.tar)" in capsys.readouterr().err
    assert main([str(toy_shards), str(toy_shards)]) == 2 and "two shards are named" in capsys.readouterr().err


def test_a_captioner_alone_needs_plain_and_the_key_is_asked_for(toy_shards, tmp_path, server, capsys, monkeypatch):
    out = ["--out", str(tmp_path / "out")]
    assert main([str(toy_shards), *out, "--model", save(git, tmp_path / "git"), "--registers", "poetic"]) == 2
    assert "add plain to --registers" in capsys.readouterr().err
    server.plan = [(401, {}, "who are you?")]
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main([str(toy_shards), *out, "--endpoint", server.url, "--endpoint-model", "tiny"]) == 2
    assert "No key was given: set the environment variable named by --api-key-env" in capsys.readouterr().err


def engraved() -> dict[str, bytes]:
    """Eight pictures with records as engravings out of books have them."""
    members = {}
    for number in range(8):
        record = {
            "caption": f"A ferry at mile {number}.", "title": "Down the River, Volume 2", "author": "Various", "gutenberg_id": 100 + number,
            "illustrator": ("", "A. Friend")[number % 2], "technique": ("wood engraving", "engraving (unspecified)")[number > 4],
            "category": "sea", "context": "They waited for it.", "source_file": f"1-h/images/{number}.jpg", "width": 24, "height": 16,
        }  # fmt: skip
        if number == 7:
            record = {key: record[key] for key in ("caption", "title", "author", "gutenberg_id", "technique")}
        members |= {f"val-{number:06d}.webp": picture(), f"val-{number:06d}.json": json.dumps(record).encode()}
    return members


@pytest.mark.parametrize(
    "kind",
    [
        "made",  # all that the real ones promise
        pytest.param("real", marks=pytest.mark.skipif(not ENGRAVINGS.exists(), reason="needs the engravings in ../shared")),
    ],
)
def test_engravings_are_captioned_from_their_metadata(kind, tmp_path):
    members = engraved() if kind == "made" else {}
    for pair, _ in zip(read_pairs(ENGRAVINGS, []) if kind == "real" else (), range(8)):
        members |= {f"{pair.key}.{extension}": data for extension, data in pair.members.items()}
    shard = write_tar(tmp_path / "val-00000.tar", members)
    report = caption([shard], tmp_path / "out", Settings(registers=registers.REGISTERS), Work())
    assert report.outcomes == {"captioned": 8}
    assert all(record["captions"]["alt"] and record["caption"] for record in records(tmp_path / "out").values())
