"""Local models, run through transformers, that turn a picture and a prompt into text, or text into other text.

Three shapes differ in their inputs and in what is cut from their outputs:

    caption   BLIP, BLIP-2, GIT: a picture in, text out, no prompt
    task      Florence-2, PaliGemma: a picture and a fixed task prompt
    chat      Qwen-VL, SmolVLM, LLaVA, Gemma …: a picture and any question, through the chat template

`TextModel` rewrites text. Knows pictures and prompts, not shards or registers. Torch and transformers are imported when a
model is loaded.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from PIL import Image
from safetensors import SafetensorError

from tokun.inference.clip import choose_device
from tokun.inference.folders import checkpoint_at, is_bundled
from tokun.utils import network_access
from tokun.utils.errors import UserError, require_positive

if TYPE_CHECKING:
    from data_tools.captioning.tokun_captioner import TokunCaptioner

T = TypeVar("T")
R = TypeVar("R")
SHAPES = ("caption", "task", "chat")
TASKS = {"florence2": "<MORE_DETAILED_CAPTION>", "paligemma": "caption en"}  # default task by model type
EXAMPLES = "Salesforce/blip2-opt-2.7b, florence-community/Florence-2-large, Qwen/Qwen2.5-VL-7B-Instruct"


class OutOfMemory(UserError, MemoryError):
    """A single item does not fit into memory."""


class HalvingBatches(Generic[T, R]):
    """Calls a batched function on a list, and halves the batch size whenever memory runs out.

    The size that fitted is kept for later calls. Raises OutOfMemory if a single item does not fit.
    """

    def __init__(self, function: Callable[[list[T]], list[R]], size: int):
        self.function, self.size = function, size

    def __call__(self, items: Sequence[T]) -> list[R]:
        done: list[R] = []
        while len(done) < len(items):
            batch = list(items[len(done) : len(done) + self.size])
            try:
                done += self.function(batch)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise OutOfMemory("a single picture does not fit into memory: use a smaller model, or --dtype bfloat16") from error
            free_memory()  # outside the handler: the error holds the tensors of the failed batch
            self.size = max(1, len(batch) // 2)
        return done


def is_out_of_memory(error: BaseException) -> bool:
    import torch

    text = str(error).lower()  # older CUDA calls and the CPU allocator raise a plain RuntimeError
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in text or "can't allocate memory" in text


def free_memory() -> None:
    import torch

    torch.cuda.empty_cache()  # does nothing where CUDA is not in use


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How a local model is run. Seed and temperature are arguments of each call."""

    device: str = "auto"
    """cpu, cuda, cuda:1; auto: the process's own GPU, if any."""
    dtype: str = "auto"
    """float32, bfloat16, float16; auto: bfloat16 on a GPU, float32 elsewhere."""
    max_new_tokens: int = 96
    """Most tokens of an answer."""

    def __post_init__(self) -> None:
        require_positive(self, "max_new_tokens")


class LocalModel:
    """A transformers model with its processor. Base class of the shapes."""

    shape = ""
    fixed_prompt: str | None = None  # of models that only take their own prompt

    def __init__(self, *, model: Any, processor: Any, name: str, revision: str, generation: Generation, device: str, dtype: Any):
        self.model, self.processor, self.name, self.revision = model, processor, name, revision
        self.generation, self.device, self.dtype = generation, device, dtype
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        # decoder-only models continue from the last position, which must hold the prompt's last token
        self.tokenizer.padding_side = "right" if self.encoder_decoder else "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.takes_types = "token_type_ids" in inspect.signature(model.forward).parameters

    def inputs(self, images: Sequence[Image.Image | None], prompts: list[str]) -> Any:
        """The processor's output for pictures and prompts: named tensors, one row each."""
        raise NotImplementedError

    def texts(self, ids: Any, width: int) -> list[str]:
        """Generated ids (B, T) -> texts. The first `width` columns are the padded prompt, if the model returns it."""
        if not self.encoder_decoder:
            ids = ids[:, width:]
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def write(self, images: Sequence[Image.Image | None], prompts: list[str], *, seed: int = 0, temperature: float = 0.0) -> list[str]:
        """One text for each picture and its prompt. Temperature 0 is greedy; above 0, `seed` decides the sampling."""
        import torch

        inputs = dict(self.inputs(images, prompts))
        if not self.takes_types:
            inputs.pop("token_type_ids", None)
        inputs = {k: v.to(self.device, self.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items() if hasattr(v, "to")}
        with torch.inference_mode(), torch.random.fork_rng([self.device] if self.device.startswith("cuda") else []):
            torch.manual_seed(seed)
            ids = self.model.generate(**inputs, generation_config=self.how(temperature))
        return self.texts(ids, inputs["input_ids"].shape[1] if "input_ids" in inputs else 0)

    def how(self, temperature: float) -> Any:
        """The checkpoint's generation settings (end and padding ids) with ours; its sampling settings are reset."""
        how = copy.deepcopy(self.model.generation_config)
        how.update(max_length=None, max_new_tokens=self.generation.max_new_tokens, num_beams=1)
        how.update(do_sample=temperature > 0, temperature=temperature or None, top_p=None, top_k=None, min_p=None, typical_p=None)
        if how.pad_token_id is None:
            how.pad_token_id = self.tokenizer.pad_token_id
        return how


class CaptionModel(LocalModel):
    """A picture in, text out. Prompts are ignored."""

    shape = "caption"
    fixed_prompt = ""

    def inputs(self, images: Sequence[Image.Image | None], prompts: list[str]) -> Any:
        return self.processor(images=images, return_tensors="pt")

    def texts(self, ids: Any, width: int) -> list[str]:
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)  # these models do not return the prompt


class TaskModel(LocalModel):
    """A picture and one of the model's own tasks, the same for all. Prompts are ignored."""

    shape = "task"

    def inputs(self, images: Sequence[Image.Image | None], prompts: list[str]) -> Any:
        mark = "" if self.encoder_decoder else "<image>"  # Florence-2 places the picture itself
        return self.processor(images=images, text=[mark + prompt for prompt in prompts], padding=True, return_tensors="pt")


class ChatModel(LocalModel):
    """A picture and a question. Prompts differ in length: they are padded on the left, and answers start at the padded length."""

    shape = "chat"

    def inputs(self, images: Sequence[Image.Image | None], prompts: list[str]) -> Any:
        turns = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
            for image, prompt in zip(images, prompts)
        ]
        return self.processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **self.padded()
        )

    def padded(self) -> dict[str, Any]:
        """The keyword for padding: in transformers 5 the processor's options are passed apart from the template's."""
        own = inspect.signature(self.processor.apply_chat_template).parameters
        return {"processor_kwargs": {"padding": True}} if "processor_kwargs" in own else {"padding": True}


class TextModel(LocalModel):
    """A language model with a chat template: text in, text out."""

    shape = "text"

    def inputs(self, images: Sequence[Image.Image | None], prompts: list[str]) -> Any:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True, enable_thinking=False
        )


KINDS: dict[str, type[LocalModel]] = {kind.shape: kind for kind in (CaptionModel, TaskModel, ChatModel)}


def load_captioner(model: str, *, revision: str | None, shape: str, task: str, generation: Generation) -> LocalModel | TokunCaptioner:
    """The captioner of a Hub id or folder, in the given shape, or by its type ("auto").

    `bundled` and tokun's checkpoints are captioners too. Raises UserError, with the way out, if it cannot be found or is not an
    image-to-text model.
    """
    import transformers

    if is_bundled(model) or checkpoint_at(model):
        from data_tools.captioning.tokun_captioner import TokunCaptioner

        return TokunCaptioner(model, generation)

    from transformers.models.auto import modeling_auto

    config = from_pretrained(transformers.AutoConfig, model, revision, flag="--model")
    if config.model_type not in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise UserError(f"--model {model} is a {config.model_type}, not an image-to-text model: use one like {EXAMPLES}")
    processor = from_pretrained(transformers.AutoProcessor, model, revision, flag="--model")
    if shape == "auto":
        has_template = bool(getattr(processor, "chat_template", None))
        shape = "task" if config.model_type in TASKS else "chat" if has_template else "caption"
    if shape == "chat" and not getattr(processor, "chat_template", None):
        raise UserError(f"--shape chat needs a chat template, and {model} has none: use an instruction-tuned model, or --shape caption")
    device, dtype = device_and_dtype(generation)
    network = load_network(transformers.AutoModelForImageTextToText, model, revision, flag="--model", dtype=dtype)
    captioner = KINDS[shape](
        model=network.to(device).eval(), processor=processor, name=short_name(model), revision=revision_of(model, config),
        generation=generation, device=device, dtype=dtype,
    )  # fmt: skip
    if isinstance(captioner, TaskModel):
        captioner.fixed_prompt = task or TASKS.get(config.model_type, "")
        if not captioner.fixed_prompt:
            raise UserError(f"--shape task with a {config.model_type} needs --task, the prompt that the model was trained on")
    return captioner


def load_rewriter(model: str, *, generation: Generation) -> TextModel:
    """The language model of a Hub id or folder. Raises UserError if it is not one, or has no chat template."""
    import transformers

    config = from_pretrained(transformers.AutoConfig, model, None, flag="--rewriter")
    tokenizer = from_pretrained(transformers.AutoTokenizer, model, None, flag="--rewriter")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"--rewriter {model} has no chat template: use an instruction-tuned model like Qwen/Qwen3-4B-Instruct-2507")
    device, dtype = device_and_dtype(generation)
    network = load_network(transformers.AutoModelForCausalLM, model, None, flag="--rewriter", dtype=dtype)
    return TextModel(
        model=network.to(device).eval(), processor=tokenizer, name=short_name(model), revision=revision_of(model, config),
        generation=generation, device=device, dtype=dtype,
    )  # fmt: skip


def from_pretrained(kind: Any, model: str, revision: str | None, *, flag: str, **options: Any) -> Any:
    """`kind.from_pretrained`, with its many errors turned into one that names the flag."""
    try:
        with network_access.fetched(model, flag):
            return kind.from_pretrained(model, revision=revision, **options)
    except network_access.NotFetched:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        what = "folder" if Path(model).is_dir() else "name"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
        fault = f"{flag} {model} cannot be loaded as {kind.__name__}: {reason}"
        raise UserError(f"{fault}. Check the {what}, or the connection to the Hub") from error


def load_network(kind: Any, model: str, revision: str | None, *, flag: str, dtype: Any) -> Any:
    """Load the model and check that no weights are missing: transformers initialises those at random, which gives gibberish."""
    network, info = from_pretrained(kind, model, revision, flag=flag, dtype=dtype, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{flag} {model} is incomplete: {len(missing)} of its weights are missing ({missing[0]}, …). Download it again")
    return network


def device_and_dtype(generation: Generation) -> tuple[str, Any]:
    """The model's device and dtype."""
    import torch

    device = choose_device(generation.device)
    name = generation.dtype if generation.dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
    return device, getattr(torch, name)


def short_name(model: str) -> str:
    """A Hub id unchanged; a folder's name without its path on this machine."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def revision_of(model: str, config: Any) -> str:
    """The commit of a Hub id; for a folder, 'sha256:' and a digest of its weights and settings."""
    if Path(model).is_dir():
        return folder_digest(sorted(Path(model).iterdir()), Path(model))
    return str(getattr(config, "_commit_hash", None) or "")


def folder_digest(paths: Sequence[Path], folder: Path) -> str:
    """'sha256:' and a digest of the weights and settings among these files of a folder."""
    digest = hashlib.sha256()
    for path in paths:
        if path.suffix in (".json", ".safetensors", ".bin", ".jinja", ".txt", ".model"):
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
            with open(path, "rb") as file:
                while chunk := file.read(2**22):
                    digest.update(chunk)
    return f"sha256:{digest.hexdigest()[:40]}"
