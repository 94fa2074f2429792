"""Captioners: tiny models of every shape, made here and loaded as any other; a real server on this machine; a tiny CLIP."""

from __future__ import annotations

import json
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from data_tools import captioning as captioners
from data_tools.captioning import (
    Endpoint,
    EndpointError,
    EndpointRefusal,
    Generation,
    HalvingBatches,
    endpoints,
    load_captioner,
    load_rewriter,
)
from tokun.inference.folders import BUNDLED

needs_bundle = pytest.mark.skipif(not BUNDLED.is_dir(), reason="no checkpoint is bundled in this checkout")
WORDS = ["write", "one", "plain", "sentence", "that", "says", "what", "the", "picture", "shows", "and", "nothing", "else", "a", "ship"]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }} {% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %} {% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16, projection_dim=32
)
TEXT = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
SMALL = {"height": 32, "width": 32}
PROMPTS = ["Write one sentence", "Write one plain sentence that says what the picture shows and nothing else", "what shows"]


def tokenizer(specials: list[str], **names) -> tf.PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate([*specials, "<unk>", *WORDS, *(f"w{i}" for i in range(40))])}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    more = [name for name in specials if name not in names.values()]
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", additional_special_tokens=more, **names)


def blip():
    t = tokenizer(["[PAD]", "[CLS]", "[SEP]", "[DEC]"], pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    text = dict(vocab_size=len(t), encoder_hidden_size=32, bos_token_id=3, sep_token_id=2, eos_token_id=2, pad_token_id=0, **TEXT)
    config = tf.BlipConfig(text_config=text, vision_config=VISION, projection_dim=32)
    return tf.BlipForConditionalGeneration(config), tf.BlipProcessor(tf.BlipImageProcessor(size=SMALL), t)


def git():
    t = tokenizer(["[PAD]", "[CLS]", "[SEP]"], pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = tf.GitConfig(vision_config=VISION, vocab_size=len(t), max_position_embeddings=64, **ids, **TEXT)
    return tf.GitForCausalLM(config), tf.GitProcessor(tf.CLIPImageProcessor(size=SMALL, do_center_crop=False), t)


def blip2():
    t = tokenizer(["<pad>", "<s>", "</s>", "<image>"], pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    text = dict(model_type="opt", vocab_size=len(t), hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
                word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    config = tf.Blip2Config(
        text_config=text, vision_config=VISION, qformer_config=dict(vocab_size=8, encoder_hidden_size=32, **TEXT),
        num_query_tokens=4, image_token_index=3,
    )  # fmt: skip
    return tf.Blip2ForConditionalGeneration(config), tf.Blip2Processor(tf.BlipImageProcessor(size=SMALL), t, num_query_tokens=4)


def florence2():
    t = tokenizer(["<s>", "<pad>", "</s>", "<image>", "<loc_0>"], pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                  extra_special_tokens={"image_token": "<image>"})  # fmt: skip
    text = dict(vocab_size=len(t), d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
                encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64)  # fmt: skip
    vision = dict(embed_dim=[8, 16], depths=[1, 1], patch_size=[7, 3], patch_stride=[4, 2], patch_padding=[3, 1],
                  patch_prenorm=[False, True], num_heads=[2, 2], num_groups=[2, 2], window_size=4, projection_dim=32,
                  max_temporal_embeddings=4, max_position_embeddings=16)  # fmt: skip
    config = tf.Florence2Config(text_config=text, vision_config=vision, image_token_id=3, is_encoder_decoder=True)
    pictures = tf.CLIPImageProcessor(size=SMALL, do_center_crop=False, image_seq_length=17)
    return tf.Florence2ForConditionalGeneration(config), tf.Florence2Processor(pictures, t, num_additional_image_tokens=0)


def paligemma():
    t = tokenizer(["<pad>", "<eos>", "<bos>", "<image>"], pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    pictures = tf.SiglipImageProcessor(size=SMALL)
    pictures.image_seq_length = 4
    processor = tf.PaliGemmaProcessor(pictures, t)
    text = dict(
        model_type="gemma", vocab_size=len(t), num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=1, bos_token_id=2, **TEXT
    )
    vision = dict(model_type="siglip_vision_model", **VISION)
    config = tf.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32, image_token_index=3)
    return tf.PaliGemmaForConditionalGeneration(config), processor


def llava():
    t = tokenizer(["<pad>", "<s>", "</s>", "<image>"], pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    text = dict(model_type="llama", vocab_size=len(t), num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **TEXT)
    config = tf.LlavaConfig(vision_config=dict(model_type="clip_vision_model", **VISION), text_config=text, image_token_index=3)
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessor(size=SMALL, do_center_crop=False), t, patch_size=16, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT.replace("IMAGE", "<image>"),
    )  # fmt: skip
    return tf.LlavaForConditionalGeneration(config), processor


def qwen2_vl():
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    t = tokenizer(["<pad>", "<eos>", *marks], pad_token="<pad>", eos_token="<eos>")
    ids = dict(image_token_id=2, video_token_id=3, vision_start_token_id=4, vision_end_token_id=5)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = dict(vocab_size=len(t), num_key_value_heads=2, max_position_embeddings=512, rope_parameters=rope, rope_scaling=dict(rope),
                pad_token_id=0, eos_token_id=1, bos_token_id=None, **TEXT)  # fmt: skip
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=1, patch_size=8, in_channels=3)
    pictures = tf.Qwen2VLImageProcessor(patch_size=8, size={"shortest_edge": 256, "longest_edge": 4096})
    template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = tf.Qwen2VLProcessor(pictures, t, tf.Qwen2VLVideoProcessor(patch_size=8), chat_template=template)
    return tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(vision_config=vision, text_config=text, **ids)), processor


def language_model():
    t = tokenizer(["<pad>", "<s>", "</s>"], pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    t.chat_template = CHAT
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=len(t), num_key_value_heads=2, **ids, **TEXT)), t


def save(make, folder: Path) -> str:
    """A model with random weights, wide enough that pictures and prompts matter, in a folder."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, processor = make()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1 and "embed_positions" not in name:
                    weight.normal_(std=0.3)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {
        make.__name__: save(make, root / make.__name__)
        for make in (blip, git, blip2, florence2, paligemma, llava, qwen2_vl, language_model)
    }


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 255, (40, 30 + 8 * i, 3), dtype=np.uint8)) for i in range(3)]


def load(folder: str, shape: str = "auto", task: str = "") -> captioners.LocalModel:
    return load_captioner(folder, revision=None, shape=shape, task=task, generation=Generation(device="cpu", max_new_tokens=8))


# ---------------------------------------------------------------------------------------------------------------------
# local models


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blip", "caption"),
        ("git", "caption"),
        ("blip2", "caption"),
        ("florence2", "task"),
        ("paligemma", "task"),
        ("llava", "chat"),
        ("qwen2_vl", "chat"),
    ],
)
def test_each_shape_is_known_by_its_type_and_writes_in_batches_what_it_writes_one_by_one(folders, pictures, name, shape):
    model = load(folders[name])
    assert model.shape == shape and model.name == name and model.revision.startswith("sha256:")
    prompts = PROMPTS if model.fixed_prompt is None else [model.fixed_prompt] * 3
    together = model.write(pictures, prompts)
    assert together == [model.write([picture], [prompt])[0] for picture, prompt in zip(pictures, prompts)]
    assert len(set(together)) > 1 and all(len(text.split()) <= 8 for text in together)  # no prompt among them
    known = set(model.tokenizer.get_vocab()) - set(model.tokenizer.all_special_tokens)
    assert all(word in known for text in together for word in text.split())


def test_a_checkpoint_of_tokun_writes_what_its_caption_method_writes(checkpoint_folder, tiny_model, pictures):
    model = load(str(checkpoint_folder))
    assert (model.shape, model.fixed_prompt, model.name) == ("caption", "", checkpoint_folder.name) and model.revision.startswith("sha256:")
    assert model.write(pictures, [""] * 3) == [tiny_model.caption(one, temperature=0.0)[0].text for one in pictures]
    assert model.write(pictures[:1], [""], seed=7, temperature=1.0) == [tiny_model.caption(pictures[0], seed=7, temperature=1.0)[0].text]


@needs_bundle
def test_the_bundled_model_is_a_captioner_by_its_name(pictures):
    model = load("bundled")
    assert model.name == "tokun bundled" and len(model.write(pictures[:1], [""])[0].split()) > 3


def test_chat_answers_are_cut_at_the_padded_length(folders, pictures):
    model = load(folders["llava"])
    inputs = model.inputs(pictures, PROMPTS)
    widths = inputs["attention_mask"].sum(1).tolist()
    assert widths[0] < widths[1] and (inputs["attention_mask"][:, -1] == 1).all()  # padded on the left
    for text, prompt in zip(model.write(pictures, PROMPTS), PROMPTS):
        assert "assistant" not in text and prompt not in text


def test_words_are_drawn_from_the_seed_alone(folders, pictures):
    model = load(folders["qwen2_vl"])
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = model.write(pictures, PROMPTS, seed=5, temperature=1.0)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's draws are moved
    torch.manual_seed(2)
    assert model.write(pictures, PROMPTS, seed=5, temperature=1.0) == first
    assert model.write(pictures, PROMPTS, seed=6, temperature=1.0) != first


def test_a_rewriter_answers_prompts_of_different_length_in_one_batch_as_one_by_one(folders):
    model = load_rewriter(folders["language_model"], generation=Generation(device="cpu", max_new_tokens=8))
    together = model.write([], PROMPTS)
    assert together == [model.write([], [prompt])[0] for prompt in PROMPTS] and len(set(together)) > 1


def test_the_revision_of_a_folder_is_a_digest_of_its_weights(folders, tmp_path):
    other = save(git, tmp_path / "git")
    assert load(other).revision == load(folders["git"]).revision
    with open(Path(other) / "generation_config.json", "a") as file:
        file.write(" ")
    assert load(other).revision != load(folders["git"]).revision


def test_models_that_do_not_fit_are_refused_with_the_way_out(folders, tmp_path):
    with pytest.raises(ValueError, match=r"is a llama, not an image-to-text model: use one like Salesforce"):
        load(folders["language_model"])
    with pytest.raises(ValueError, match=r"--model .*nowhere cannot be loaded as AutoConfig.*Check the name"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="--shape chat needs a chat template"):
        load(folders["git"], shape="chat")
    with pytest.raises(ValueError, match="--shape task with a git needs --task"):
        load(folders["git"], shape="task")
    plain = save(language_model, tmp_path / "no-template")
    (Path(plain) / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"--rewriter .* has no chat template"):
        load_rewriter(plain, generation=Generation(device="cpu"))


def test_an_incomplete_folder_is_named_and_never_filled_with_random_weights(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(save(git, tmp_path / "git"))
    weights = load_file(folder / "model.safetensors")
    del weights["git.encoder.layer.0.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is incomplete: 1 of its weights are missing \(git.encoder.layer.0.output.dense.weight"):
        load(str(folder))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cannot be loaded as AutoModelForImageTextToText: .*header.*Check the folder"):
        load(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded as AutoModelForImageTextToText: .*Check the folder"):
        load(str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# memory


def test_the_batch_is_halved_on_out_of_memory_and_nothing_is_lost(folders, pictures):
    model = load(folders["git"])
    sizes = []

    def write(items):
        sizes.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return model.write(items, [""] * len(items))

    many = [pictures[i % 3] for i in range(8)]
    batched = HalvingBatches(write, 8)
    assert batched(many) == [model.write([picture], [""])[0] for picture in many]
    assert sizes == [8, 4, 2, 2, 2, 2]
    batched(many[:4])
    assert sizes[6:] == [2, 2]  # what fitted is remembered


def test_one_item_too_many_and_other_errors_are_told():
    def fails(error):
        def function(items):
            raise error

        return HalvingBatches(function, 4)

    with pytest.raises(MemoryError, match="a single picture does not fit"):
        fails(RuntimeError("DefaultCPUAllocator: can't allocate memory"))([1, 2, 3])
    with pytest.raises(RuntimeError, match="shapes"):
        fails(RuntimeError("shapes do not match"))([1, 2])


# ---------------------------------------------------------------------------------------------------------------------
# endpoints


class Server:
    """A real OpenAI-compatible server on this machine. `plan` says how each request is answered; the last entry holds on.

    An entry is a status with headers and body, or "ok" (with `words(body)`), "slow", "garbage", "hangup".
    """

    def __init__(self, words=lambda body: "a disc", delay=0.0):
        self.plan, self.requests, self.headers = ["ok"], [], []
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append(body)
                    server.headers.append({**self.headers, "path": self.path})
                    step = server.plan.pop(0) if len(server.plan) > 1 else server.plan[0]
                time.sleep(delay)
                self.answer(step, body)

            def answer(self, step, body):
                if step == "hangup":
                    self.connection.close()
                    return
                if step == "slow":
                    server.free.wait(5)
                status, headers, text = step if isinstance(step, tuple) else (200, {}, completion(words(body)))
                text = "not json" if step == "garbage" else text
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(text.encode())
                except OSError:
                    pass  # the client did not wait

            def log_message(self, *_):
                pass

        self.free = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.free.set()
        self.http.shutdown()
        self.http.server_close()


def completion(text: str, **more) -> str:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}, **more}
    return json.dumps({"model": "tiny-2026", "choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 3}})


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def endpoint(server: Server, **options) -> Endpoint:
    return Endpoint(server.url, "tiny", **{"pause": 0.001, "timeout": 5.0, **options})


def test_a_question_carries_picture_schema_seed_and_key_and_its_tokens_are_counted(server, pictures):
    reply = endpoint(server, key="sk-secret").ask("What?", image=pictures[0], schema={"type": "object"}, seed=7, max_tokens=9)
    assert (reply.text, reply.model, reply.prompt_tokens, reply.completion_tokens, reply.fault) == ("a disc", "tiny-2026", 11, 3, "")
    sent, headers = server.requests[0], server.headers[0]
    assert headers["path"] == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-secret"
    assert (sent["model"], sent["seed"], sent["max_tokens"], sent["temperature"]) == ("tiny", 7, 9, 0.0)
    assert sent["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "captions", "strict": True, "schema": {"type": "object"}},
    }
    image, text = sent["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,") and text == {"type": "text", "text": "What?"}


def test_what_passes_is_tried_again_and_the_wait_doubles(server):
    server.plan = [(429, {}, ""), (500, {}, ""), "garbage", "hangup", "ok"]
    asking = endpoint(server)
    assert asking.ask("What?").text == "a disc" and asking.counts == {"requests": 5, "retries": 4}

    class Half:
        def random(self):
            return 0.0

    assert [asking._pause(tried, None, Half()) for tried in (1, 2, 3)] == [0.001, 0.002, 0.004]
    assert asking._pause(1, "7", Half()) == 7.0 and asking._pause(1, "9999", Half()) == endpoints.LONGEST_WAIT
    assert asking._pause(1, "Wed, 21 Oct 2026 07:28:00 GMT", Half()) == 0.001


def test_a_server_that_never_answers_is_given_up_after_all_tries(server):
    for step, reason in [((503, {}, "full"), "endpoint answers 503"), ("garbage", "endpoint sent no chat completion")]:
        server.plan, server.requests = [step], []
        with pytest.raises(EndpointError, match=reason):
            endpoint(server, tries=3).ask("What?")
        assert len(server.requests) == 3
    server.plan = ["slow"]
    with pytest.raises(EndpointError, match="endpoint timed out"):
        endpoint(server, tries=1, timeout=0.1).ask("What?")
    with pytest.raises(EndpointError, match="endpoint unreachable"):
        Endpoint("http://127.0.0.1:9", "tiny", tries=2, pause=0.001).ask("What?")


def test_what_no_row_can_mend_stops_everything_without_showing_the_key(server):
    server.plan = [(401, {}, '{"error": "Incorrect API key provided: sk-secret"}')]
    asking = endpoint(server, key="sk-secret")
    with pytest.raises(EndpointRefusal, match="answers 401, the key is not accepted") as refused:
        asking.ask("What?")
    assert "sk-secret" not in str(refused.value) and "***" in str(refused.value) and "sk-secret" not in repr(asking)
    with pytest.raises(EndpointRefusal, match="No key was given: set the environment variable named by --api-key-env"):
        endpoint(server).ask("What?")
    server.plan = [(404, {}, "no model tiny")]
    with pytest.raises(EndpointRefusal, match=r"no such model or address \(model tiny\): no model tiny"):
        endpoint(server).ask("What?")
    assert len(server.requests) == 3


def test_a_bad_request_fails_its_row_at_once(server):
    server.plan = [(413, {}, "too large")]
    with pytest.raises(EndpointError, match="endpoint answers 413"):
        endpoint(server).ask("What?")
    server.plan = [(302, {"Location": "http://127.0.0.1:9/"}, "")]  # never followed: the key would go along
    with pytest.raises(EndpointError, match="endpoint answers 302"):
        endpoint(server, key="sk-secret").ask("What?")
    assert len(server.requests) == 2


def test_options_that_a_server_does_not_know_are_left_out_from_then_on(server):
    server.plan = [(400, {}, "json_schema is not supported"), (422, {}, "Use max_completion_tokens instead of max_tokens"), "ok"]
    asking = endpoint(server)
    assert asking.ask("What?", schema={"type": "object"}).text == "a disc"
    assert asking.without == {"response_format", "max_tokens"} and asking.counts["retries"] == 0
    assert server.requests[-1]["max_completion_tokens"] > 0 and "max_tokens" not in server.requests[-1]
    asking.ask("What?", schema={"type": "object"})
    assert len(server.requests) == 4 and "response_format" not in server.requests[-1]


def test_refusals_and_answers_cut_off_are_told_with_their_tokens(server):
    server.plan = [
        (200, {}, completion("", message={"content": None, "refusal": "No."})),
        (200, {}, completion("a", finish_reason="length")),
    ]
    replies = [endpoint(server).ask("What?") for _ in range(2)]
    assert [(reply.fault, reply.completion_tokens) for reply in replies] == [("refusal", 3), ("answer truncated", 3)]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "", "http://"])
def test_bad_addresses_are_refused(url):
    with pytest.raises(ValueError, match="is not a web address: give one like http://localhost:8000/v1"):
        Endpoint(url, "tiny")


def test_addresses_with_secrets_are_refused_unread():
    with pytest.raises(ValueError, match="--api-key-env") as refused:
        Endpoint("https://me:sk-secret@host/v1", "tiny")
    assert "sk-secret" not in str(refused.value)
    assert captioners.public_url("https://me:sk-secret@host:1/v1?key=sk-secret") == "https://host:1/v1"
