"""Speed of the training loop: compared with a bare PyTorch loop and the Hugging Face Trainer, and the gain of each of its settings.

    python benchmarks/train.py loops                                                              # configs/tiny.yaml, on a CPU
    OMP_NUM_THREADS=1 python benchmarks/train.py loops --one-process --lives 10 --rounds 6
    python benchmarks/train.py gains
    python benchmarks/train.py kernels --config configs/engraving-cpu.yaml image_tokenizer.image_size=128 \\
        image_tokenizer.codebook_size=2048 train.optimizer=muon
    python benchmarks/train.py loops gains --device cuda --config configs/ladder/350m.yaml train.batch_size=64 train.compile=true

Ours is the real loop, `train_generator`, on code shards generated here; it is paused at its prefetcher before each step.
Each loop runs in its own process. (With --one-process, ours and the bare one run in threads of one process and share the allocator with its
settings and the compiled programs.) The loops take turns of some steps, so that other load on the machine affects all of them; between
turns the others are idle, and a loop's background work (packing ahead) is waited for and counted as its own. Printed are medians over the
turns of tokens without padding per second by the clock and per second of processor time, and of the ratio within a round; and the peak
memory, of the GPU or resident. All loops have the same model, weights, batches, AdamW, precision, compilation, loss and clipping. The bare
one has nothing else, and its batches are in memory; ours packs them, averages the weights, checks for non-finite values and logs; the
Trainer collates and logs. Ours lets the C library keep freed memory (`engine.keep_memory`), as train.py does; so does the second bare loop.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.turns import Gate, Loop, Turn, compare, median, ratio  # noqa: E402
from tokun import config, data  # noqa: E402
from tokun.config import Config  # noqa: E402
from tokun.inference.folders import TEXT_TOKENIZER  # noqa: E402
from tokun.inference.latents import Slots  # noqa: E402
from tokun.models import generator, losses  # noqa: E402
from tokun.planner.measure import measure_memory  # noqa: E402
from tokun.planner.memory import planned_memory  # noqa: E402
from tokun.tokenizers import sequences  # noqa: E402
from tokun.tokenizers.image import ImageTokenizer  # noqa: E402
from tokun.tokenizers.text import TextTokenizer  # noqa: E402
from tokun.training import engine, health, optim  # noqa: E402
from tokun.training.generator import build_vocabulary, train_generator  # noqa: E402
from tokun.training.run import open_run  # noqa: E402
from tokun.utils import checkpoint, console, typed_tree  # noqa: E402

SAMPLES = 4096
PARTS = ("text_tokenizer", "image_tokenizer", "codes")


# ---- training data --------------------------------------------------------------------------------------------------


def words(count: int) -> list[str]:
    """`count` different words of two to four syllables."""
    rng, made = np.random.default_rng(0), dict[str, None]()
    syllables = [c + v for c in "bdfghklmnprstvz" for v in "aeiou"]
    while len(made) < count:
        made["".join(rng.choice(syllables, rng.integers(2, 5)))] = None
    return list(made)


def captions(settings: Config) -> list[str]:
    """Sentences of 5 to 25 words with natural (Zipf) frequencies."""
    rng, lexicon = np.random.default_rng(1), words(2 * settings.text_tokenizer.vocab_size)
    weights = 1 / np.arange(1, len(lexicon) + 1)
    lengths = rng.integers(5, 26, SAMPLES)
    drawn = iter(rng.choice(len(lexicon), lengths.sum(), p=weights / weights.sum()).tolist())
    return [" ".join(lexicon[next(drawn)] for _ in range(length)) + "." for length in lengths]


def prepare(settings: Config, folder: Path) -> None:
    """Write the results of a run's first three stages, with random codes, since only the loops are compared."""
    m, rng = settings.image_tokenizer, np.random.default_rng(2)
    tokenizer = ImageTokenizer(m)
    tokenizer.save(folder / "image_tokenizer")
    sentences = captions(settings)
    text = TextTokenizer.train(sentences + words(2 * settings.text_tokenizer.vocab_size), vocab_size=settings.text_tokenizer.vocab_size)
    (folder / "text_tokenizer").mkdir()
    text.save(folder / "text_tokenizer" / TEXT_TOKENIZER)
    rows, columns = tokenizer.grid

    def samples() -> Iterator[dict[str, bytes]]:
        for i, sentence in enumerate(sentences):
            tree = {"caption": sentence, "captions": {"plain": sentence}, "style": "engraving", "subject": "", "grid": [rows, columns]}
            with tempfile.TemporaryFile() as file:
                np.save(file, rng.integers(0, m.codebook_size, (1, rows * columns), dtype=np.uint16))
                file.seek(0)
                yield {"__key__": f"{i:06d}", data.CODES_SUFFIX: file.read(), "json": json.dumps(tree).encode()}

    data.write_shard(folder / "codes" / "train-00000.tar", samples())
    record = {
        "fingerprint": ImageTokenizer.load(folder / "image_tokenizer").fingerprint(), "grid": [rows, columns],
        "codebook_size": m.codebook_size, "views": 1,
        "counts": {"train": SAMPLES}, "skipped": {}, "tag_counts": [["engraving", "", SAMPLES]], "settings": {},
    }  # fmt: skip
    checkpoint.write_record(folder / "codes" / "codes.json", record)


# ---- the loops ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Setting:
    """The settings shared by all loops of a comparison."""

    settings: Config
    folder: Path
    device: torch.device
    steps: int  # of each loop, in total

    def key(self) -> tuple[Any, ...]:
        """The arguments for making an equal setting in another process."""
        return self.settings, self.folder, self.device, self.steps

    def __post_init__(self) -> None:
        c = self.settings
        codes = checkpoint.read_record(self.folder / "codes" / "codes.json")
        text = TextTokenizer.load(self.folder / "text_tokenizer" / TEXT_TOKENIZER)
        self.vocabulary = build_vocabulary(c, text, codes)
        self.slots = Slots(codes["grid"][0] * codes["grid"][1], self.vocabulary.max_text)
        mix = dict(task_mix=c.train.task_mix, tag_dropout=c.train.tag_dropout, plain_share=c.train.plain_share, seed=c.seed)
        samples = data.CodeSamples(sorted((self.folder / "codes").glob("train-*.tar")))
        batches = data.TokenBatches(
            samples, self.vocabulary, text.encode, batch_size=c.train.batch_size, sort_window=c.data.sort_window, **mix
        )
        self.batches = [batches(step) for step in range(self.steps)]
        pad = self.vocabulary.id("<pad>")
        self.tokens = [int((batch.input_ids != pad).sum()) for batch in self.batches]
        self.padding = 1 - sum(self.tokens) / sum(batch.input_ids.numel() for batch in self.batches)
        self.flops = generator.flops_per_token(self.model(), self.slots.size)

    def model(self) -> Any:
        """The generator, made as in the training stage."""
        c, v = self.settings, self.vocabulary
        torch.manual_seed(c.seed)
        model = generator.make_generator(
            c.generator,
            vocab_size=v.size,
            max_length=sequences.most_positions(v),
            pad=v.id("<pad>"),
            bos=v.id("<bos>"),
            eos=v.id("<eos>"),
        )
        generator.add_dropout(model, c.generator.dropout)
        if c.train.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        generator.tune_for(model, self.device)
        return model.to(self.device).train()

    def micro(self) -> int:
        return self.settings.train.micro_batch_size or self.settings.train.batch_size

    def loss(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """(logits, labels, image targets, text targets of the whole batch) -> the loss of the training stage."""
        t, is_image, size = self.settings.train, self.vocabulary.is_image.to(self.device), self.vocabulary.size
        token_losses = torch.compile(losses.next_token_losses, dynamic=True) if t.compile else losses.next_token_losses

        def loss(logits: Tensor, labels: Tensor, image: Tensor, text: Tensor) -> Tensor:
            parts = token_losses(logits[..., :size], labels, is_image)
            return (
                t.image_weight * parts["image_sum"] / image
                + t.text_weight * parts["text_sum"] / text
                + t.z_loss * parts["z_sum"] / (image + text)
            )

        return loss

    def targets(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        image = self.vocabulary.is_code(labels).sum()
        return image.clamp_min(1), ((labels != losses.IGNORE).sum() - image).clamp_min(1)


def ours(setting: Setting, gate: Gate) -> None:
    """`train_generator` itself, in its own run folder."""
    engine.keep_memory()
    out = Path(tempfile.mkdtemp(dir=setting.folder, prefix="run-"))
    for part in PARTS:
        (out / part).symlink_to(setting.folder / part)
    settings = dataclasses.replace(setting.settings, out=str(out))
    prefetch = data.prefetch

    def held_at_the_gate(make: Callable[[int], Any], start: int, **options: Any) -> Iterator[Any]:
        """The waiting time for data is measured after the gate."""
        with contextlib.closing(prefetch(make, start, **options)) as batches:
            while True:
                gate()
                before = time.perf_counter()
                batch = next(batches)
                gate.waited += time.perf_counter() - before
                yield batch

    with mock.patch.object(data, "prefetch", held_at_the_gate):
        train_generator(open_run(settings))


def bare(setting: Setting, gate: Gate) -> None:
    """Only what a training step needs."""
    t, model, loss_of = setting.settings.train, setting.model(), setting.loss()
    if t.compile:
        generator.compile_layers(model)
    optimizer = optim.make_adamw(model, lr=t.lr, betas=t.betas, weight_decay=t.weight_decay)
    batches = [(b.input_ids.to(setting.device), b.labels.to(setting.device)) for b in setting.batches]
    for all_ids, all_labels in batches:
        gate()
        targets = setting.targets(all_labels)
        for ids, labels in zip(all_ids.split(setting.micro()), all_labels.split(setting.micro()), strict=True):
            with torch.autocast(setting.device.type, torch.bfloat16, enabled=t.precision == "bf16"):
                logits = model(input_ids=ids, use_cache=False).logits
            loss_of(logits, labels, *targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), t.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def bare_that_keeps_memory(setting: Setting, gate: Gate) -> None:
    engine.keep_memory()
    bare(setting, gate)


def trainer(setting: Setting, gate: Gate) -> None:
    """The Hugging Face Trainer with the same sequences in the same order, padded to the longest of a batch as ours are."""
    import transformers

    pad, t = setting.vocabulary.id("<pad>"), setting.settings.train
    rows = [
        {"input_ids": ids[ids != pad], "labels": labels[ids != pad]} for b in setting.batches for ids, labels in zip(b.input_ids, b.labels)
    ]

    def collate(several: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        fill = {"input_ids": pad, "labels": losses.IGNORE}
        return {k: torch.nn.utils.rnn.pad_sequence([r[k] for r in several], batch_first=True, padding_value=fill[k]) for k in fill}

    model, loss_of = setting.model(), setting.loss()
    model.config.use_cache = False
    if t.compile:
        generator.compile_layers(model)

    class AtTheGate(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate()

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(dir=setting.folder, prefix="trainer-"), max_steps=setting.steps,
        per_device_train_batch_size=setting.micro(),
        gradient_accumulation_steps=t.batch_size // setting.micro(), learning_rate=t.lr, weight_decay=t.weight_decay, adam_beta1=t.betas[0],
        adam_beta2=t.betas[1], max_grad_norm=t.max_grad_norm, lr_scheduler_type="cosine", warmup_steps=t.warmup_steps,
        bf16=t.precision == "bf16",
        optim="adamw_torch_fused", logging_steps=t.log_every, report_to=[], save_strategy="no", disable_tqdm=True,
        use_cpu=setting.device.type == "cpu",
        remove_unused_columns=False,
    )  # fmt: skip
    theirs = InOrder(
        model, arguments, train_dataset=rows, data_collator=collate, callbacks=[AtTheGate()],
        compute_loss_func=lambda outputs, labels, **_: loss_of(outputs.logits, labels, *setting.targets(labels)),
    )  # fmt: skip
    theirs.remove_callback(transformers.PrinterCallback)
    theirs.train()


# ---- comparing ------------------------------------------------------------------------------------------------------


def row(name: str, turns: list[Turn], reference: list[Turn], setting: Setting, rate: float) -> str:
    """One line of the table; `reference`: the turns of the reference loop."""
    clock, own = median(turns, lambda t: t.tokens / t.seconds), median(turns, lambda t: t.tokens / t.processor)
    by_clock = ratio(turns, reference)
    by_own = statistics.median((t.tokens / t.processor) / (r.tokens / r.processor) for t, r in zip(turns, reference, strict=True))
    waited = sum(t.waited for t in turns) / sum(t.seconds for t in turns)
    return (
        f"{name:<40}{clock:10,.0f}{by_clock:8.3f}{own:12,.0f}{by_own:8.3f}{setting.flops * clock / rate:8.1%}"
        f"{waited:8.2%}{setting.padding:9.2%}{max(t.memory for t in turns) / 2**30:9.2f}"
    )


HEAD = f"{'':<40}{'tokens/s':>10}{'ratio':>8}{'/CPU s':>12}{'ratio':>8}{'MFU':>8}{'wait':>8}{'padding':>9}{'GiB':>9}"


def compare_loops(setting: Setting, rate: float, *, steps: int, rounds: int, lives: int) -> None:
    works = {"ours": ours, "bare": bare, "bare, keeps memory as ours": bare_that_keeps_memory, "Trainer": trainer}
    turns: dict[str, list[Turn]] = {name: [] for name in works}
    for life in range(lives):
        found = compare([Loop(name, work, setting) for name, work in works.items()], steps=steps, rounds=rounds)
        for name, own in found.items():
            turns[name] += own
        if lives > 1:
            told = ", ".join(f"{name} {ratio(own, found['bare']):.3f}" for name, own in found.items())
            print(f"processes {life + 1} of {lives}, tokens/s beside the bare loop's: {told}", flush=True)
    print(f"\nloops, {lives} x {rounds} rounds of {steps} steps; ratios to the bare loop\n{HEAD}")
    for name, own in turns.items():
        print(row(name, own, turns["bare"], setting, rate))
    print(row("ours, to the bare one that keeps memory", turns["ours"], turns["bare, keeps memory as ours"], setting, rate))


def turns_in_one_process(pipe: Connection, key: tuple[Any, ...], steps: int, rounds: int) -> None:
    setting = Setting(*key)
    pipe.send(
        compare([Loop(name, work, setting, thread=True) for name, work in (("ours", ours), ("bare", bare))], steps=steps, rounds=rounds)
    )


def compare_in_one_process(setting: Setting, rate: float, *, steps: int, rounds: int, lives: int) -> None:
    """Compare ours and the bare loop in a shared process, which excludes differences between processes; each life is a fresh one."""
    # glibc gives each thread its own arena, whose memory is returned to the system after every step; the main thread has no such cost
    os.environ["MALLOC_ARENA_MAX"] = "1"
    context, turns, ratios = get_context("spawn"), {"ours": [], "bare": []}, []
    for life in range(lives):
        pipe, theirs = context.Pipe()
        process = context.Process(target=turns_in_one_process, args=(theirs, setting.key(), steps, rounds))
        process.start()
        theirs.close()
        found = pipe.recv()
        process.join()
        for name, own in found.items():
            turns[name] += own
        ratios.append(ratio(found["ours"], found["bare"]))
        print(f"process {life + 1} of {lives}, tokens/s beside the bare loop's: {ratios[-1]:.3f}", flush=True)
    print(f"\nin one process, {lives} x {rounds} rounds of {steps} steps; ratios to the bare loop\n{HEAD}")
    for name, own in turns.items():
        print(row(name, own, turns["bare"], setting, rate))
    if lives > 1:
        print(
            f"ratios of the processes: median {statistics.median(ratios):.3f}, mean {statistics.mean(ratios):.3f} +- "
            f"{statistics.stdev(ratios) / lives**0.5:.3f}"
        )


def unfused() -> Any:
    """Within this context, loops use AdamW without its fused kernel."""
    adamw = torch.optim.AdamW
    return mock.patch.object(torch.optim, "AdamW", lambda *a, **k: adamw(*a, **{**k, "fused": False}))


def other_attention() -> Any:
    """Use the attention that `tune_for` does not choose for the device."""
    tune = generator.tune_for

    def tune_otherwise(model: Any, device: torch.device) -> None:
        tune(model, device)
        model.set_attn_implementation("sdpa" if model.config._attn_implementation == "eager" else "eager")

    return mock.patch("tokun.training.generator.tune_for", tune_otherwise)


def torchs_dropout() -> Any:
    """Dropout by torch's own generator."""
    return mock.patch.multiple(generator, _draw_dropout_seeds=lambda _model: None, _recomputing="inductor")


def all_products() -> Any:
    """Attention that computes all products, including those of later keys."""
    return mock.patch.object(generator, "_register_attention", lambda: "eager")


def all_logits() -> Any:
    """The loss in chunks of a GiB, on any device."""
    return mock.patch.dict(generator.CHUNK_BYTES, cpu=2**30)


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Disable the optimisations for CPUs in the layers and the loss."""
    with torchs_dropout(), all_products(), all_logits():
        yield


ON_CPU = [
    ("dropout by torch's generator", [], torchs_dropout),
    ("attention: all products", [], all_products),
    ("logits of all positions at once", [], all_logits),
]


def gains(settings: Config, device: torch.device) -> list[tuple[str, list[str], Callable[[], Any]]]:
    """(name of a change, settings, context for the setup) of each change."""
    t = settings.train
    other = "plain products" if device.type == "cuda" else "PyTorch's kernel (SDPA)"
    precision = "no" if t.precision == "bf16" else "bf16"
    window = 0 if settings.data.sort_window else 4096
    return [
        (f"compile={not t.compile}", [f"train.compile={str(not t.compile).lower()}"], contextlib.nullcontext),
        (f"precision={precision}", [f"train.precision={precision}"], contextlib.nullcontext),
        (f"sort_window={window}", [f"data.sort_window={window}"], contextlib.nullcontext),
        ("AdamW not fused", [], unfused),
        (f"attention: {other}", [], other_attention),
        ("loss in chunks of 512 positions", ["train.loss_chunk=512"], contextlib.nullcontext),
        ("activations checkpointed", ["train.gradient_checkpointing=true"], contextlib.nullcontext),
        *(ON_CPU if device.type == "cpu" and t.compile else []),
    ]


def compare_kernels(setting: Setting, rate: float, *, steps: int, rounds: int, lives: int) -> None:
    """Our loop compared with itself under `plain_kernels`, in separate processes and in turns."""
    turns: dict[str, list[Turn]] = {"plain kernels": [], "as it is": []}
    for life in range(lives):
        found = compare([Loop("plain kernels", ours, setting, plain_kernels), Loop("as it is", ours, setting)], steps=steps, rounds=rounds)
        for name, own in found.items():
            turns[name] += own
        print(f"processes {life + 1} of {lives}: {ratio(found['as it is'], found['plain kernels']):.3f}", flush=True)
    print(f"\nour loop without the kernels for CPUs and with them, {lives} x {rounds} rounds of {steps} steps; ratios to the first\n{HEAD}")
    for name, own in turns.items():
        print(row(name, own, turns["plain kernels"], setting, rate))
    ratios = [(t.tokens / t.seconds) / (r.tokens / r.seconds) for t, r in zip(turns["as it is"], turns["plain kernels"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"ratios within a round: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")


def compare_gains(settings: Config, folder: Path, device: torch.device, rate: float, *, steps: int, rounds: int) -> None:
    base = Setting(settings, folder, device, (rounds + 2) * steps + 1)
    print(f"\nour loop with one thing changed, {rounds} rounds of {steps} steps in turns with the loop as it is; ratios to that\n{HEAD}")
    for name, overrides, context in gains(settings, device):
        tree = config.to_dict(settings)
        for override in overrides:
            typed_tree.override(tree, override, Config)
        changed = Setting(config.from_dict(tree), folder, device, base.steps) if overrides else base
        loops = [Loop("as it is", ours, base), Loop(name, ours, changed, context)]
        turns = compare(loops, steps=steps, rounds=rounds)
        print(row(name, turns[name], turns["as it is"], changed, rate), flush=True)


def compare_memory(settings: Config, micro: int) -> None:
    """The peak memory of a step by the allocator's records, with all logits at once and in chunks."""
    print(f"\npeak of one step of {micro} sequences of full length, MiB (weights, moments, average, gradients and all)")
    for chunk in (10**9, 512):
        settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, loss_chunk=chunk))
        peak = measure_memory(settings, micro=micro)["peak"]
        planned = planned_memory(settings, micro=micro, gpu=torch.cuda.is_available())["peak"]
        print(
            f"{'all logits at once' if chunk > 512 else f'in chunks of {chunk}':<34}{peak / 2**20:10,.0f}  planned {planned / 2**20:,.0f}"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="loops, gains, kernels, memory; then settings a.b=c that override the config's")
    parser.add_argument("--config", default=str(ROOT / "configs" / "tiny.yaml"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20, help="per turn (%(default)s)")
    parser.add_argument("--rounds", type=int, default=12, help="%(default)s")
    parser.add_argument(
        "--lives",
        type=int,
        default=1,
        help="fresh processes per loop, since the same loop's speed varies by some percent between processes (%(default)s)",
    )
    parser.add_argument("--one-process", action="store_true", help="loops: ours and the bare one in threads of one process")
    args = parser.parse_intermixed_args(argv)
    what, overrides = [w for w in args.what if "=" not in w], [w for w in args.what if "=" in w]
    if unknown := set(what) - {"loops", "gains", "kernels", "memory"}:
        parser.error(f"{', '.join(unknown)}: must be loops, gains, kernels or memory")
    device = torch.device(args.device)
    if (device.type == "cuda") != torch.cuda.is_available():
        parser.error(
            f"--device {device.type}, but torch sees "
            f"{'a GPU: hide it with CUDA_VISIBLE_DEVICES=' if torch.cuda.is_available() else 'no GPU'}"
        )
    quiet = ["train.steps=1000000000", "train.save_every=1000000000", "train.eval_every=1000000000", "train.sample_every=1000000000"]
    alone = ["data.toy=0", "train.deepspeed=", "train.optimizer=adamw", "tracking.kind=none", "train.max_minutes=0"]
    settings = config.load_config(args.config, [*alone, *quiet, *overrides])
    settings.data.val = ""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(settings, folder)
        rate = health.matmul_rate(device, torch.bfloat16 if settings.train.precision == "bf16" else torch.float32)
        setting = Setting(settings, folder, device, (args.rounds + 2) * args.steps + 1)
        c = setting.model()
        print(
            f"{args.config}: {generator.count_parameters(c) / 1e6:.2f}M parameters, batch {settings.train.batch_size}, vocabulary "
            f"{setting.vocabulary.size}, "
            f"precision {settings.train.precision}, compile {settings.train.compile}; {device.type}, {torch.get_num_threads()} thread(s), "
            f"torch {torch.__version__}, matrix products at {rate / 1e12:.3f} TFLOP/s"
        )
        if "loops" in what and args.one_process:
            compare_in_one_process(setting, rate, steps=args.steps, rounds=args.rounds, lives=args.lives)
        elif "loops" in what:
            compare_loops(setting, rate, steps=args.steps, rounds=args.rounds, lives=args.lives)
        if "gains" in what:
            compare_gains(settings, folder, device, rate, steps=args.steps, rounds=args.rounds)
        if "kernels" in what:
            compare_kernels(setting, rate, steps=args.steps, rounds=args.rounds, lives=args.lives)
        if "memory" in what:
            compare_memory(settings, setting.micro())


if __name__ == "__main__":
    console.run("benchmarks/train.py", main)
