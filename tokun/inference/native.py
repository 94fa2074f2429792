"""A decoder's step and the choice of the next id as one C++ program (native.cpp), for CPUs. Knows ids and weights, not spans.

    program()                              the program; RuntimeError if it cannot be built
    Weights(model)                         the matrices of a Qwen3, packed for it
    step(weights, ...), head(...)          ids -> hidden (rows, size) float32 -> logits (rows, ids of a part) float32
    choose(logits, legal, u, choice), nats(logits, legal, ids)     as in `token_choice`

It is built once per machine, by the C++ compiler (g++, clang++ or CXX) against torch's headers, in a few seconds, and stored in the
user's cache. On processors with AVX-512 or AMX, matrix products use oneDNN through torch (`brgemm`); elsewhere they are plain loops.
bfloat16 weights stay bfloat16 if the processor can multiply them; otherwise they are converted to float32. Everything between the
products is float32.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
PLACES = 64  # positions per block of keys
BLOCKS = (64, 32, 16)  # columns of a matrix computed together


# --- the program ------------------------------------------------------------------------------------------------------


def program() -> ctypes.CDLL:
    """The program, built if necessary. RuntimeError says why it cannot be built. TOKUN_NATIVE=0 in the environment disables it."""
    if os.environ.get("TOKUN_NATIVE") == "0":
        raise RuntimeError("TOKUN_NATIVE=0 disables it")
    return _built()


@lru_cache
def _built() -> ctypes.CDLL:
    if has_products():
        found = _load(build(_flags(True)))
        if found.tokun_has_products():
            return found
    return _load(build(_flags(False)))


@lru_cache
def is_there() -> bool:
    """Whether the program is available; builds it if necessary."""
    try:
        program()
    except RuntimeError:
        return False
    return True


def has_products() -> bool:
    """Whether torch offers oneDNN's small matrix products on this processor."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _flags(products: bool) -> list[str]:
    parallel = [] if platform.system() == "Darwin" else ["-fopenmp"]  # Apple's compiler lacks it
    wide = ["-DTOKUN_BRGEMM", "-mprefer-vector-width=512"] if products else []
    return ["-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", *parallel, *wide]


def compiler() -> str | None:
    return next((found for name in (os.environ.get("CXX", ""), "g++", "clang++") if name and (found := shutil.which(name))), None)


def build(flags: Sequence[str]) -> Path:
    """The shared library's path. Several processes may build at once: each renames its complete file to the same name."""
    name = compiler()
    if name is None:
        raise RuntimeError("there is no C++ compiler (g++, clang++) on this machine")
    home = Path(torch.__file__).parent
    inputs = (SOURCE.read_text(), torch.__version__, str(home), *flags, name, _processor())
    path = _cache() / f"native-{hashlib.sha256(chr(0).join(inputs).encode()).hexdigest()[:16]}.so"
    if path.exists() and path.stat().st_size:  # it is empty if the machine crashed after the rename
        return path
    print(f"building {SOURCE.name}, once per machine: takes some seconds", file=sys.stderr, flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [
                name, *flags, "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
                f"-I{home / 'include'}", str(SOURCE), "-o", str(made),
                f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{home / 'lib'}",
            ]  # fmt: skip
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode:
                lines = ended.stderr.splitlines() or [f"exit code {ended.returncode}"]
                first = next((line for line in lines if "error" in line), lines[0])
                raise RuntimeError(f"{name} could not build {SOURCE.name}: {first}")
            made.replace(path)
    except OSError as error:  # for example a full disk
        raise RuntimeError(f"{path} cannot be written: {error}") from error
    return path


def _processor() -> str:
    """The processor's instruction sets, for the cache key: machines of several kinds may share a home folder."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor()) + platform.machine()


def _cache() -> Path:
    """A writable folder owned by the user, so that nobody else can place a program there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokun"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _own_folder()


@lru_cache
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="tokun-"))


class _Matrix(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("n", ctypes.c_int64), ("k", ctypes.c_int64), ("block", ctypes.c_int64)]


class _Layer(ctypes.Structure):
    _fields_ = [*((name, _Matrix) for name in ("qkv", "out", "gate_up", "down")), ("qk_norm", ctypes.c_void_p)]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("layers", "size", "heads", "kv_heads", "width", "inner", "is_half")),
        ("eps", ctypes.c_float), ("layer", ctypes.POINTER(_Layer)), ("embedding", ctypes.c_void_p),
    ]  # fmt: skip


class _Rows(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "length", "place", "capacity", "all")),
        *((name, ctypes.c_void_p) for name in ("ids", "starts", "index", "cos", "sin", "cache")),
    ]  # fmt: skip


class _Words(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("most", "size", "slots", "ids", "end")),
        ("temperature", ctypes.c_float),
        ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("allowed", "ruled", "in_text", "following", "limit", "first", "u", "states", "lengths")),
        *((name, ctypes.c_void_p) for name in ("chosen", "found")),
    ]


def _load(path: Path) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"{path} cannot be loaded: {error}") from error
    pointer, whole, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    model, rows, matrix, words = (ctypes.POINTER(kind) for kind in (_Model, _Rows, _Matrix, _Words))
    chosen = ctypes.c_float, whole, ctypes.c_double  # temperature, top_k, top_p
    loaded.tokun_step.argtypes = [model, rows, pointer, count]
    loaded.tokun_head.argtypes = [matrix, count, pointer, whole, pointer, count]
    loaded.tokun_choose.argtypes = [pointer, pointer, whole, whole, pointer, *chosen, pointer, count]
    loaded.tokun_draw.argtypes = [model, rows, matrix, pointer, whole, pointer, *chosen, whole, pointer, pointer, count]
    loaded.tokun_write.argtypes = [model, rows, matrix, pointer, words, count]
    loaded.tokun_write.restype = whole
    loaded.tokun_nats.argtypes = [pointer, pointer, whole, whole, pointer, pointer, count]
    for name in ("tokun_step", "tokun_head", "tokun_draw", "tokun_choose", "tokun_nats"):
        getattr(loaded, name).restype = None
    loaded.tokun_has_half.restype = loaded.tokun_has_products.restype = count
    return loaded


# --- weights and steps --------------------------------------------------------------------------------------------------


def block_of(n: int) -> int:
    """The columns computed together: as many as keep the threads' loads nearly equal."""
    threads = torch.get_num_threads()
    return next((size for size in BLOCKS if -(-n // (size * threads)) * size * threads <= 1.05 * n), BLOCKS[-1])


def by_kv_head(qkv: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Reorder the rows of all queries, all keys, all values (n, k) by kv head: its queries, key and value, then the next head's."""
    width = len(qkv) // (heads + 2 * kv_heads)
    parts = (part.view(kv_heads, -1, qkv.shape[1]) for part in qkv.split([heads * width, kv_heads * width, kv_heads * width]))
    return torch.cat(list(parts), 1).flatten(0, 1)


def interleaved(gate_up: Tensor, half: int) -> Tensor:
    """Reorder the rows of gate and up (2 n, k) into alternating blocks of `half` rows, padded with zeros at the end."""
    parts = (F.pad(part, (0, 0, 0, -len(part) % half)).view(-1, half, part.shape[1]) for part in gate_up.chunk(2))
    return torch.cat(list(parts), 1).flatten(0, 1)


class PackedMatrix:
    """x (rows, k) -> x W^T (rows, n), W (n, k) in blocks of columns."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, block: int = 0):
        (n, k), self.block = weight.shape, block or block_of(len(weight))
        blocks = F.pad(weight.to(dtype), (0, 0, 0, -n % self.block)).view(-1, self.block, k)
        if dtype == torch.bfloat16:
            self.weight = blocks.view(len(blocks), self.block, k // 2, 2).transpose(1, 2).contiguous()
        else:
            self.weight = blocks.transpose(1, 2).contiguous()
        self.struct = _Matrix(self.weight.data_ptr(), n, k, self.block)


class Weights:
    """The weights of a Qwen3 in the program's layout. `layers`: (query, key and value; out; gate and up; down;
    weights of the heads' norms) of each."""

    def __init__(self, config: Any, layers: Iterable[tuple[Tensor, ...]], embedding: Tensor, head: Tensor):
        sizes = config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size
        self.program = program()
        self.is_half = embedding.dtype == torch.bfloat16 and bool(self.program.tokun_has_half()) and all(size % 2 == 0 for size in sizes)
        self.dtype = torch.bfloat16 if self.is_half else torch.float32
        self.embedding, self.head = embedding.to(self.dtype).contiguous(), head
        self.heads: dict[tuple[int, int], PackedMatrix] = {}
        self.layers = []
        for qkv, out, gate_up, down, norms in layers:
            qkv, block = by_kv_head(qkv, config.num_attention_heads, config.num_key_value_heads), block_of(len(gate_up))
            parts = (qkv, 0), (out, 0), (interleaved(gate_up, block // 2), block), (down, 0)
            self.layers.append(([PackedMatrix(part, self.dtype, block) for part, block in parts], norms.float().contiguous()))
        structs = (_Layer(*(part.struct for part in parts), norms.data_ptr()) for parts, norms in self.layers)
        self.layer_structs = (_Layer * len(self.layers))(*structs)
        self.width, self.kv_heads = config.head_dim, config.num_key_value_heads
        self.model = _Model(
            len(self.layers),
            config.hidden_size,
            config.num_attention_heads,
            self.kv_heads,
            self.width,
            config.intermediate_size,
            self.is_half,
            config.rms_norm_eps,
            self.layer_structs,
            self.embedding.data_ptr(),
        )

    def first_layer(self) -> Weights:
        """The same weights with only the first layer."""
        first = copy.copy(self)
        first.model, first.layers = _Model.from_buffer_copy(self.model), self.layers[:1]
        first.model.layers = 1
        return first

    def new_cache(self, rows: int, capacity: int) -> Tensor:
        """A cache of keys and values for `rows` rows of up to `capacity` ids: (layers, rows, 2 * kv heads, …).
        Unwritten parts are never read."""
        return torch.empty(len(self.layers), rows, 2 * self.kv_heads, -(-capacity // PLACES) * PLACES * self.width, dtype=self.dtype)

    def step(self, ids: Tensor, place: int, rows: CachedRows) -> Tensor:
        """ids (B, T) int64 of these rows from position `place` -> the last hidden states (B, size) float32, normed."""
        ids, hidden = ids.contiguous(), torch.empty(len(ids), self.model.size)
        self.program.tokun_step(self.model, rows.struct(ids, ids.shape[1], place, ids.shape[1]), hidden.data_ptr(), torch.get_num_threads())
        return hidden

    def draw(
        self, hidden: Tensor, place: int, rows: CachedRows, part: slice, u: Tensor, choice: Any, before: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Generate n ids of the part for each row from position `place`, with `u` (B, n), each chosen as by `choose` and fed back.
        hidden (B, size) before -> (hidden after, ids (B, n) int64, the sum of their nats (B,) float64, including `before`)."""
        hidden, u, head = hidden.clone(), u.float().contiguous(), self.head_of(part)
        ids, nats = torch.empty(u.shape, dtype=torch.long), torch.zeros(len(u), dtype=torch.float64) if before is None else before.clone()
        self.program.tokun_draw(
            self.model,
            rows.struct(ids, 1, place, u.shape[1]),
            head.struct,
            hidden.data_ptr(),
            u.shape[1],
            u.data_ptr(),
            choice.temperature,
            choice.top_k,
            choice.top_p,
            part.start,
            ids.data_ptr(),
            nats.data_ptr(),
            torch.get_num_threads(),
        )
        return hidden, ids, nats

    def write(
        self,
        hidden: Tensor,
        place: int,
        rows: CachedRows,
        part: slice,
        u: Tensor,
        choice: Any,
        tables: Sequence[Tensor],
        states: Tensor,
        lengths: Tensor,
        end: int,
    ) -> tuple[Tensor, Tensor]:
        """Generate each row to its end from position `place`: (ids (B, n) int64, -1 after the end, the nats of its texts (B,) float64).

        tables: `grammar.Tables`, with `allowed` and `ruled` for the part's ids.
        u (B, slots) float32; states, lengths (B,) int64 are updated."""
        hidden, u, head, tables = hidden.contiguous(), u.float().contiguous(), self.head_of(part), [table.contiguous() for table in tables]
        most = rows.capacity - place
        ids, nats = torch.full((len(u), most), -1), torch.zeros(len(u), dtype=torch.float64)
        words = _Words(
            most, head.struct.n, u.shape[1], tables[3].shape[1], end, choice.temperature, choice.top_k, choice.top_p,
            *(part.data_ptr() for part in (*tables, u, states, lengths, ids, nats)),
        )  # fmt: skip
        made = self.program.tokun_write(
            self.model, rows.struct(ids, 1, place, most), head.struct, hidden.data_ptr(), words, torch.get_num_threads()
        )
        return ids[:, :made], nats

    def logits(self, hidden: Tensor, part: slice) -> Tensor:
        """hidden (B, size) float32 -> (B, ids of the part) float32."""
        head, hidden = self.head_of(part), hidden.contiguous()
        found = hidden.new_empty(len(hidden), head.struct.n)
        self.program.tokun_head(head.struct, self.is_half, hidden.data_ptr(), len(hidden), found.data_ptr(), torch.get_num_threads())
        return found

    def head_of(self, part: slice) -> PackedMatrix:
        key = (part.start, part.stop)
        if key not in self.heads:
            self.heads[key] = PackedMatrix(self.head[part], self.dtype)
        return self.heads[key]


class CachedRows:
    """The sequences of a cache. starts (B,) int64: the first position of each; cos, sin (positions, width / 2) float32."""

    def __init__(self, starts: Tensor, cos: Tensor, sin: Tensor, cache: Tensor):
        self.starts, self.index, self.cache = starts, torch.arange(cache.shape[1]), cache
        self.cos, self.sin = cos.contiguous(), sin.contiguous()
        self.room = cache.shape[3] // (2 * cos.shape[1])
        self.capacity = min(len(cos), self.room)

    def __getitem__(self, rows: slice | Tensor) -> CachedRows:
        some = copy.copy(self)
        some.starts, some.index = self.starts[rows], self.index[rows]
        return some

    def __len__(self) -> int:
        return len(self.index)

    def struct(self, ids: Tensor, length: int, place: int, more: int) -> _Rows:
        """The C structure for `length` ids per row at once, `more` in total. IndexError if they do not fit."""
        if len(ids) != len(self) or place + more > self.capacity:
            raise IndexError(
                f"{len(ids)} rows of ids at positions {place} to {place + more}; there are {len(self)} rows of {self.capacity} positions"
            )
        places = (part.data_ptr() for part in (ids, self.starts, self.index, self.cos, self.sin, self.cache))
        return _Rows(len(ids), length, place, self.room, self.cache.shape[1], *places)


# --- the next id --------------------------------------------------------------------------------------------------------


def choose(logits: Tensor, legal: Tensor | None, u: Tensor, choice: Any) -> Tensor:
    """As `token_choice.choose`, for float32 logits (B, V)."""
    (B, V), legal, logits, u = logits.shape, None if legal is None else legal.contiguous(), logits.contiguous(), u.float().contiguous()
    chosen = torch.empty(B, dtype=torch.long)
    program().tokun_choose(
        logits.data_ptr(), None if legal is None else legal.data_ptr(), B, V, u.data_ptr(), choice.temperature, choice.top_k, choice.top_p,
        chosen.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return chosen


def nats(logits: Tensor, legal: Tensor | None, ids: Tensor) -> Tensor:
    """The negative log-likelihood of ids (B,) int64 under float32 logits (B, V) over the legal ids: float64 (B,)."""
    (B, V), legal, logits = logits.shape, None if legal is None else legal.contiguous(), logits.contiguous()
    found = torch.empty(B, dtype=torch.float64)
    program().tokun_nats(
        logits.data_ptr(), None if legal is None else legal.data_ptr(), B, V, ids.data_ptr(), found.data_ptr(), torch.get_num_threads()
    )
    return found
