"""Benchmarks of the data tools: speed at scale, comparison with img2dataset, speed of encoding, and resuming after kills.

    python benchmarks/data_tools.py pictures --shared ../shared --out PICTURES --n 100000   # distinct ones, from real and toy engravings
    python benchmarks/data_tools.py scale --pictures PICTURES --out OUT              # 10,000 against all of them
    python benchmarks/data_tools.py img2dataset --pictures PICTURES --out OUT --python OTHER-VENV/bin/python
    python benchmarks/data_tools.py encode --tokenizer RUN/image_tokenizer --shards 'shards/train-*.tar' --out OUT
    python benchmarks/data_tools.py kills --out OUT --times 20 --tokenizer RUN/image_tokenizer

Each prints one table. Speeds are given by processor time, which other work on the machine hardly affects, and by the clock.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_tools import toy  # noqa: E402
from tokun.utils import console  # noqa: E402

PER_FOLDER = 1000


# ---- pictures -------------------------------------------------------------------------------------------------------


def originals(shared: Path) -> Iterator[tuple[Image.Image, str]]:
    """(picture, caption) of every real engraving, cycling endlessly; every eighth is a toy one."""
    shards = sorted((shared / "data" / "engravings").glob("*.tar")) + sorted((shared / "data" / "engravings-128").glob("*.tar"))
    if not shards:
        raise FileNotFoundError(f"no engravings in {shared}/data: name the folder with --shared")
    count = 0
    while True:
        for shard in shards:
            with tarfile.open(shard) as tar:
                files = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
            for name in (name for name in files if name.endswith(".webp")):
                if count % 8 == 7:
                    image, record = toy.draw(1, count, 256)
                    yield image.convert("L"), record["caption"]
                    count += 1
                yield Image.open(io.BytesIO(files[name])).convert("L"), json.loads(files[name[:-5] + ".json"])["caption"]
                count += 1


def transformed(image: Image.Image, rng: np.random.Generator, sides: tuple[int, int]) -> Image.Image:
    """A random crop of the picture, rotated, stretched and with changed tones; its short side is within `sides`, in pixels."""
    width, height = image.size
    share = rng.uniform(0.55, 0.9, 2)
    left, top = (rng.uniform(0, 1 - share) * (width, height)).astype(int)
    box = (left, top, left + max(32, int(share[0] * width)), top + max(32, int(share[1] * height)))
    part = image.crop(box).rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR, fillcolor=255)
    short = int(rng.integers(sides[0], sides[1] + 1))
    scale = short / min(part.size)
    part = part.resize((max(1, round(part.width * scale)), max(1, round(part.height * scale))), Image.Resampling.BICUBIC)
    gamma = rng.uniform(0.7, 1.4)
    return part.point([round(255 * (tone / 255) ** gamma) for tone in range(256)])


def make_pictures(shared: Path, out: Path, n: int, sides: tuple[int, int], first: int = 0) -> None:
    for index, (image, caption) in zip(tqdm(range(n), unit="picture"), originals(shared), strict=False):
        if index < first:
            continue
        folder = out / f"{index // PER_FOLDER:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        transformed(image, np.random.default_rng((7, index)), sides).save(folder / f"{index:07d}.jpg", quality=85)
        (folder / f"{index:07d}.txt").write_text(f"{caption} ({index})", encoding="utf-8")


# ---- running and measuring ------------------------------------------------------------------------------------------


class Memory:
    """Peak resident memory in bytes of a process and its children, sampled."""

    def __init__(self, pid: int) -> None:
        self.pid, self.main, self.child, self.running = pid, 0, 0, True
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        while self.running:
            self.main = max(self.main, resident(self.pid))
            for child in children(self.pid):
                self.child = max(self.child, resident(child))
            time.sleep(0.2)

    def stop(self) -> None:
        self.running = False
        self.thread.join()


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def children(pid: int) -> list[int]:
    try:
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return []


def timed(command: list[str], **environment: str) -> dict[str, float]:
    """Run the command: seconds by the clock and of processor time, and peak memory of it and of its largest child."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    memory = Memory(process.pid)
    code = process.wait()
    memory.stop()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.monotonic() - start, "cpu": cpu, "main_mb": memory.main / 2**20, "child_mb": memory.child / 2**20}


def prepare_command(source: Path, out: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "data_tools.prepare",
        str(source),
        "--style",
        "engraving",
        "--out",
        str(out),
        "--captions-from-names",
        *options,
    ]


# ---- the tables -----------------------------------------------------------------------------------------------------


def scale(pictures: Path, out: Path, small: int, workers: int) -> None:
    """Run the same command on the first folders and on all of them."""
    shutil.rmtree(out, ignore_errors=True)
    linked = out / "small-files"
    for folder in sorted(pictures.iterdir())[: small // PER_FOLDER]:
        shutil.copytree(folder, linked / folder.name, copy_function=os.link)
    print(f"{'pictures':>10} {'kept':>8} {'CPU s':>8} {'per CPU s':>10} {'clock s':>8} {'main MB':>8} {'worker MB':>10}")
    for source in (linked, pictures):
        target = out / f"shards-{source.name}"
        measured = timed(prepare_command(source, target, "--workers", str(workers)), OMP_NUM_THREADS="1")
        record = json.loads((target / "prepare.json").read_text())
        rate = record["files"] / measured["cpu"]
        print(
            f"{record['files']:>10,} {record['kept']:>8,} {measured['cpu']:>8.0f} {rate:>10.1f} {measured['seconds']:>8.0f} "
            f"{measured['main_mb']:>8.0f} {measured['child_mb']:>10.0f}"
        )


IMG2DATASET = """
import sys
from img2dataset import download
if __name__ == "__main__":
    download(url_list=sys.argv[1], output_folder=sys.argv[2], output_format="webdataset", input_format="parquet", url_col="url",
             caption_col="caption", image_size=256, resize_mode="keep_ratio", resize_only_if_bigger=True, processes_count=1, thread_count=1,
             encode_format="jpg", encode_quality=92, number_sample_per_shard=1000, enable_wandb=False)
"""


def beside_img2dataset(pictures: Path, out: Path, python: str, n: int, turns: int) -> None:
    """The same local files resized to the same size, both as JPEG of quality 92 in one process and one thread, in turns.

    Ours runs without cleaning; theirs reads file:// addresses, and a loopback server. Each command runs on a quarter of the
    pictures and on all; the difference is the work without the start-up.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.rmtree(out, ignore_errors=True)
    files = [file for folder in sorted(pictures.iterdir()) for file in sorted(folder.glob("*.jpg"))][:n]
    sizes = {"quarter": len(files) // 4, "all": len(files)}
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(pictures)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    port = int(server.stdout.readline())
    for size, count in sizes.items():
        for file in files[:count]:
            for path in (file, file.with_suffix(".txt")):
                target = out / size / path.relative_to(pictures)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, target)
        captions = [file.with_suffix(".txt").read_text() for file in files[:count]]
        for name, start in (("files", pictures.resolve().as_uri()), ("server", f"http://127.0.0.1:{port}")):
            urls = [f"{start}/{file.relative_to(pictures)}" for file in files[:count]]
            pq.write_table(pa.table({"url": urls, "caption": captions}), out / f"{name}-{size}.parquet")

    def theirs(name: str, size: str) -> list[str]:
        return [python, "-c", IMG2DATASET, str(out / f"{name}-{size}.parquet"), str(out / "made")]

    def ours(filter: str, size: str) -> list[str]:
        return prepare_command(out / size, out / "made", "--workers", "1", "--no-clean", "--format", "jpg", "--filter", filter)

    runs = {
        "img2dataset, files": lambda size: theirs("files", size),
        "prepare --filter area": lambda size: ours("area", size),
        "prepare --filter linear": lambda size: ours("linear", size),
        "img2dataset, server": lambda size: theirs("server", size),
        "prepare --filter hamming": lambda size: ours("hamming", size),
        "prepare (lanczos)": lambda size: ours("lanczos", size),
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {size: [] for size in sizes} for name in runs}
    try:
        for _ in range(turns):
            for size in sizes:
                for name, command in runs.items():
                    shutil.rmtree(out / "made", ignore_errors=True)
                    seconds[name][size].append(timed(command(size), OMP_NUM_THREADS="1")["cpu"])
    finally:
        server.kill()
        server.wait()
    show_beside(seconds, sizes)


def show_beside(seconds: dict[str, dict[str, list[float]]], sizes: dict[str, int]) -> None:
    """One table of whole commands, and one of the work after the start; the ratios are within each turn."""
    columns = {f"all {sizes['all']:,}, whole command": {name: own["all"] for name, own in seconds.items()}}
    columns[f"{sizes['all'] - sizes['quarter']:,} after the start"] = {
        name: [whole - quarter for whole, quarter in zip(own["all"], own["quarter"], strict=True)] for name, own in seconds.items()
    }
    for (title, column), count in zip(columns.items(), (sizes["all"], sizes["all"] - sizes["quarter"]), strict=True):
        print(f"{title:<34} {'CPU s':>16} {'per CPU s':>10} {'img2dataset / it: files':>24} {'server':>14}")
        for name, own in column.items():
            ratios = [spread([a / b for a, b in zip(column[f"img2dataset, {kind}"], own, strict=True)]) for kind in ("files", "server")]
            print(f"{name:<34} {spread(own):>16} {count * len(own) / sum(own):>10.1f} {ratios[0]:>24} {ratios[1]:>14}")


def spread(numbers: list[float]) -> str:
    return f"{min(numbers):.2f} to {max(numbers):.2f}"


SERVER = """
import functools, http.server, sys
class Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=sys.argv[1]))
print(server.server_address[1], flush=True)
server.serve_forever()
"""


def encode(tokenizer: Path, shards: str, out: Path, views: int) -> None:
    """The codes stage compared with the bare model on the same batch, with pictures and views already in memory."""
    import torch

    from tokun import data
    from tokun.config import from_dict
    from tokun.tokenizers.image import ImageTokenizer
    from tokun.training.codes import CPU_ROWS, encode_shard

    model = ImageTokenizer.load(tokenizer).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    config = from_dict({"codes": {"views": views}})
    size, channels = model.config.image_size, model.config.image_channels
    out.mkdir(parents=True, exist_ok=True)
    rows = config.codes.batch_size if device.type == "cuda" else CPU_ROWS
    pixels = torch.rand(config.codes.batch_size // views * views, channels, size, size, device=device) * 2 - 1
    print(f"{'shard':<24} {'views':>8} {'stage /s':>10} {'bare /s':>10} {'ratio':>7}")
    for shard in data.expand_shards(shards):
        model.encode(pixels, rows=rows)
        bare = []
        for part in range(2):  # before and after, since the machine's speed varies
            start = time.perf_counter()
            for _ in range(8):
                model.encode(pixels, rows=rows).cpu()
            bare.append(8 * len(pixels) / (time.perf_counter() - start))
            if part == 0:
                start = time.perf_counter()
                encode_shard(shard, out / shard.name, model, config, device)
                with tarfile.open(out / shard.name) as tar:
                    count = views * sum(name.endswith(".npy") for name in tar.getnames())
                rate = count / (time.perf_counter() - start)
        print(f"{shard.name:<24} {count:>8,} {rate:>10.1f} {sum(bare) / 2:>10.1f} {rate / (sum(bare) / 2):>7.2f}")


def kills(out: Path, times: int, tokenizer: Path | None) -> None:
    """prepare, caption (templates) and, with a tokenizer, encode: killed at random moments, then finished.

    Are the bytes those of an uninterrupted run?"""
    shutil.rmtree(out, ignore_errors=True)
    source = out / "in"
    for index in range(1500):
        image, record = toy.draw(3, index, 128)
        path = source / f"{index // 100:02d}" / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        path.with_suffix(".txt").write_text(f"{record['caption']} {index}", encoding="utf-8")
    shards = out / "prepare-whole"
    kill("prepare", out, times, lambda target: prepare_command(source, target, "--workers", "2", "--shard-size", "100"), "prepare.json")
    caption = [sys.executable, "-m", "data_tools.caption", str(shards), "--registers", "plain,poetic,alt"]
    kill("caption", out, times, lambda target: [*caption, "--out", str(target)], "caption.json")
    if tokenizer is not None:
        for name in ("killed", "whole"):
            shutil.copytree(tokenizer, out / f"encode-{name}" / "image_tokenizer")
        encode = [sys.executable, "-m", "data_tools.encode", "--config", str(ROOT / "configs" / "engraving-cpu.yaml")]
        encode += [f"data.train={shards}/train-*.tar", f"data.val={shards}/val-*.tar"]
        kill("encode", out, times, lambda target: [*encode, f"out={target}"], "codes/codes.json", folder="codes")


def kill(tool: str, out: Path, times: int, command_for: Callable[[Path], list[str]], last: str, folder: str = "") -> None:
    """Kill the tool `times` times, at moments spread over its run, then let it finish, and compare."""
    killed, whole = out / f"{tool}-killed", out / f"{tool}-whole"
    length = timed(command_for(whole))["seconds"]
    moments, count = random.Random(0), 0
    while count < times:
        if (killed / last).exists():  # finished: start over
            shutil.rmtree(killed / folder)
        process = subprocess.Popen(command_for(killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=moments.uniform(0.3, 1.0) * length)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            count += 1
    subprocess.run(command_for(killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    same = digest(killed / folder) == digest(whole / folder)
    print(f"{tool}: killed {count} times, then finished: {'the same bytes as' if same else 'OTHER BYTES THAN'} a whole run", flush=True)
    if not same:
        raise SystemExit(1)


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pictures", "scale", "img2dataset", "encode", "kills"))
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--sides", type=int, nargs=2, default=(300, 600), help="smallest and largest short side of the pictures, in pixels")
    parser.add_argument("--first", type=int, default=0, help="skip the first N pictures (to draw in several processes)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--python", default=sys.executable, help="the Python of an environment with img2dataset")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--shards", default="")
    parser.add_argument("--views", type=int, default=5)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--turns", type=int, default=3, help="of the comparison with img2dataset")
    args = parser.parse_args()
    if args.what == "pictures":
        make_pictures(args.shared, args.out, args.n, tuple(args.sides), args.first)
    elif args.what == "scale":
        scale(args.pictures, args.out, args.n if args.n < 100_000 else 10_000, args.workers)
    elif args.what == "img2dataset":
        beside_img2dataset(args.pictures, args.out, args.python, args.n if args.n < 100_000 else 8000, args.turns)
    elif args.what == "encode":
        encode(args.tokenizer, args.shards, args.out, args.views)
    else:
        kills(args.out, args.times, args.tokenizer)


if __name__ == "__main__":
    console.run("benchmarks/data_tools.py", main)
