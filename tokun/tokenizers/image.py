"""The image tokenizer: a convolutional VQ-VAE. Images become codes, codes become images. Knows no text.

    images (B, C, S, S) in [-1, 1]  --encode-->  codes (B, N) in 0..K-1  --decode-->  images (B, C, S, S)

with N = (S / downsample)^2 in raster order. The quantizers are those of vector-quantize-pytorch. Public codes are
numbered along the first principal axis of the codebook (`reindex`), so that neighbouring ids look alike.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ, SimVQ, VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import Codebook

from tokun.config import ImageTokenizerConfig
from tokun.utils.errors import UserError


class ResBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(_groups(channels), channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(_groups(channels), channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # each block starts as the identity

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention over the code grid, without positional encoding: the convolutions around it supply position."""

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(_groups(channels), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, HW, C / heads)
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))


class Encoder(nn.Module):
    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        widths = config.channels
        layers: list[nn.Module] = [nn.PixelUnshuffle(config.stem)]
        layers += [nn.Conv2d(config.image_channels * config.stem**2, widths[0], 3, padding=1)]
        for i, width in enumerate(widths):
            if i > 0:
                layers += [nn.Conv2d(widths[i - 1], width, 4, stride=2, padding=1)]
            layers += [ResBlock(width) for _ in range(config.blocks)]
        if config.attention:
            layers += [Attention(widths[-1])]
        layers += [nn.GroupNorm(_groups(widths[-1]), widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], config.latent_dim, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, S, S) -> (B, latent_dim, h, w)
        return self.layers(images)


class Decoder(nn.Module):
    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        widths = config.channels[::-1]
        layers: list[nn.Module] = [nn.Conv2d(config.latent_dim, widths[0], 3, padding=1)]
        if config.attention:
            layers += [ResBlock(widths[0]), Attention(widths[0])]
        for i, width in enumerate(widths):
            if i > 0:  # convolution and pixel shuffle: no checkerboard, no interpolation
                layers += [nn.Conv2d(widths[i - 1], 4 * width, 3, padding=1), nn.PixelShuffle(2)]
            layers += [ResBlock(width) for _ in range(config.blocks)]
        layers += [nn.GroupNorm(_groups(widths[-1]), widths[-1]), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Conv2d(widths[-1], config.image_channels * config.stem**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(config.stem)

    def forward(self, latents: Tensor) -> Tensor:  # (B, latent_dim, h, w) -> (B, C, S, S)
        return self.shuffle(self.last(self.layers(latents)))


@dataclass
class Reconstruction:
    images: Tensor  # (B, C, S, S), not clamped
    codes: Tensor  # (B, N) int64
    quantizer_loss: Tensor  # scalar: commitment, entropy … as the quantizer defines


class ImageTokenizer(nn.Module):
    """Encoder, quantizer, decoder. Users call `encode` and `decode`; `forward` is for training."""

    order: Tensor  # (K,) public code -> the quantizer's own index
    rank: Tensor  # (K,) its inverse

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        _check(config)
        self.config = config
        side = config.image_size // config.downsample
        self.grid = (side, side)  # (h, w)
        self.codebook_size = config.codebook_size
        self.encoder = Encoder(config)
        self.quantizer = make_quantizer(config)
        self.decoder = Decoder(config)
        self.register_buffer("order", torch.arange(config.codebook_size))
        self.register_buffer("rank", torch.arange(config.codebook_size))

    def forward(self, images: Tensor) -> Reconstruction:  # (B, C, S, S) in [-1, 1]
        latents = self.encoder(images).float()  # the quantizer works in float32
        B, D, h, w = latents.shape
        with torch.autocast(images.device.type, enabled=False):
            tokens = latents.flatten(2).transpose(1, 2)  # (B, N, D)
            quantized, indices, loss = self._quantize(tokens)
        quantized = quantized.transpose(1, 2).reshape(B, D, h, w)
        return Reconstruction(self.decoder(quantized), self.rank[indices.long()], loss)

    @torch.no_grad()
    def encode(self, images: Tensor, *, rows: int = 0) -> Tensor:
        """images float (B, C, S, S) in [-1, 1] -> codes int64 (B, N). S must be a multiple of `downsample`.

        With `rows`, pictures are encoded in batches of exactly that size, padded if need be: kernels round differently for
        other batch sizes, so only this makes a picture's codes independent of the rest of its batch.
        """
        C, f = self.config.image_channels, self.config.downsample
        if images.ndim != 4 or images.shape[1] != C or images.shape[2] % f or images.shape[3] % f:
            raise UserError(f"images have shape {tuple(images.shape)}; this tokenizer takes (B, {C}, H, W) with H and W multiples of {f}")
        was_training = self.training
        self.eval()
        codes = torch.cat([self._codes(part, rows) for part in (images.split(rows) if rows else [images])])
        self.train(was_training)
        return codes

    def _codes(self, images: Tensor, rows: int) -> Tensor:
        B = len(images)
        if rows > B:
            images = torch.cat([images, images.new_zeros(rows - B, *images.shape[1:])])
        latents = self.encoder(images).float()
        _, indices, _ = self._quantize(latents.flatten(2).transpose(1, 2))
        return self.rank[indices.long()][:B]

    @torch.no_grad()
    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """codes int64 (B, N) in 0..K-1 -> images float (B, C, H, W) clamped to [-1, 1]. `grid`: (h, w), default square."""
        h, w = grid or self.grid
        if codes.ndim != 2 or codes.shape[1] != h * w:
            raise UserError(f"codes have shape {tuple(codes.shape)}; a grid of {h}x{w} needs (B, {h * w})")
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.codebook_size):
            raise UserError(f"codes are in {int(codes.min())}..{int(codes.max())}, outside 0..{self.codebook_size - 1}")
        vectors = self.vectors_of(self.order[codes])  # (B, N, D)
        return self.decoder(vectors.transpose(1, 2).reshape(codes.shape[0], -1, h, w)).float().clamp(-1, 1)

    @torch.no_grad()
    def reindex(self) -> None:
        """Renumber the public codes along the first principal axis of the codebook (its sign: dark to light).

        Changes no picture, only the numbering of the codes. Call once, after training.
        """
        K = self.codebook_size
        every = torch.arange(K, device=self.order.device)
        vectors = self.vectors_of(every[None])[0].double()  # (K, D)
        centred = vectors - vectors.mean(0)
        _, axes = torch.linalg.eigh(centred.T @ centred)
        position = centred @ axes[:, -1]  # (K,)
        # pictures of one code each show which end of the axis is dark; some small ones are enough
        some = position.argsort(stable=True)[:: max(1, K // 256)]
        h, w = (min(side, 4) for side in self.grid)
        flat = self.vectors_of(some[:, None].expand(len(some), h * w))
        light = torch.cat([self.decoder(v.transpose(1, 2).reshape(len(v), -1, h, w)).mean((1, 2, 3)) for v in flat.split(64)])
        if ((position[some] - position[some].mean()) * (light.double() - light.double().mean())).sum() < 0:
            position = -position
        self.order.copy_(position.argsort(stable=True))
        self.rank[self.order] = every

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """(K, latent_dim): the decoder's input for each public code."""
        return self.vectors_of(self.order[None])[0]

    def fingerprint(self) -> str:
        """sha256 over the config and the names, shapes and bytes of all weights: tokenizers agree on codes only if it is equal."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, directory: Path) -> None:
        """Write config.json and model.safetensors (float32) into `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.state_dict().items()}
        safetensors.torch.save_file(state, directory / "model.safetensors")

    @classmethod
    def load(cls, directory: Path) -> ImageTokenizer:
        """Read what `save` wrote. Raises FileNotFoundError or UserError naming the file."""
        directory = Path(directory)
        for name in ("config.json", "model.safetensors"):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory / name} is missing: the image tokenizer is incomplete. Copy or train it again.")
        try:
            config = ImageTokenizerConfig(**json.loads((directory / "config.json").read_text()))
        except (TypeError, ValueError) as error:  # not JSON, not text, or wrong keys
            raise UserError(f"{directory / 'config.json'} is not an image tokenizer's config: {error}") from error
        tokenizer = cls(config)
        try:
            state = safetensors.torch.load_file(directory / "model.safetensors")
            tokenizer.load_state_dict(state)
        except (safetensors.SafetensorError, RuntimeError) as error:
            raise UserError(f"{directory / 'model.safetensors'} does not hold these weights: {error}") from error
        return tokenizer.eval()

    def _quantize(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (B, N, D) -> (B, N, D), (B, N), scalar
        out = self.quantizer(tokens)
        loss = out[2].sum() if len(out) > 2 else tokens.new_zeros(())
        return out[0], out[1], loss

    def vectors_of(self, indices: Tensor) -> Tensor:
        """The quantizer's own indices (B, N), mapped from codes by `order` -> vectors (B, N, D)."""
        match self.quantizer:
            case VectorQuantize():
                return self.quantizer.get_output_from_indices(indices)
            case FSQ() | LFQ() | SimVQ():
                return self.quantizer.indices_to_codes(indices)
        raise AssertionError(type(self.quantizer))


class IndexedCodebook(Codebook):
    """The library's cosine codebook, with codes looked up and averaged by index.

    The library multiplies by one-hot matrices (vectors x codes); on a CPU, filling them takes longer than the search. Results and
    state are the same but for the order of sums.
    """

    embed_avg: Tensor
    cluster_size: Tensor

    def forward(self, x: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, D) of unit length -> the nearest codes' vectors (B, N, D), their indices (B, N), and empty distances."""
        assert x.ndim == 3 and self.use_cosine_sim and not any(options.values()), options
        vectors = x.float().flatten(0, 1)[None]  # (1, BN, D)
        self.init_embed_(vectors)
        book = self.embed.detach()  # (1, K, D)
        # in chunks whose cosines fit in the processor's cache
        indices = torch.cat([(part @ book[0].T).argmax(-1) for part in vectors[0].detach().split(512)])  # (BN,)
        quantized = book[0][indices]
        if self.training:
            self.update_codebook(vectors, indices[None])
        return quantized.reshape(x.shape), indices.reshape(x.shape[:2]), x.new_empty(1, *x.shape[:2], 0)

    def track_cluster_size_and_embed_avg(self, flatten: Tensor, embed_onehot: Tensor, *_: object, **__: object) -> None:
        """Update both moving averages. flatten (1, n, D); embed_onehot holds indices (1, n) instead of one-hot rows."""
        indices = embed_onehot[0]
        sizes = torch.bincount(indices, minlength=self.codebook_size)[None].float()
        sums = torch.zeros_like(self.embed_avg[0]).index_add_(0, indices, flatten[0].detach())[None]
        for average, now in ((self.cluster_size, sizes), (self.embed_avg, sums)):
            self.all_reduce_fn(now)
            average.lerp_(now, 1 - self.decay)


def make_quantizer(config: ImageTokenizerConfig) -> nn.Module:
    """The quantizer that the config names, with exactly `codebook_size` codes and `latent_dim` input and output channels."""
    D, K = config.latent_dim, config.codebook_size
    match config.quantizer:
        case "VectorQuantize":
            quantizer = VectorQuantize(
                dim=D,
                codebook_size=K,
                codebook_dim=config.codebook_dim,
                use_cosine_sim=True,
                kmeans_init=True,
                rotation_trick=True,
                decay=config.decay,
                threshold_ema_dead_code=config.dead_code_threshold,  # pyright: ignore[reportArgumentType]  # a float is compared as well
                commitment_weight=config.commitment_weight,
            )
            quantizer._codebook.__class__ = IndexedCodebook  # the library offers no other way to choose it; tests compare both
            return quantizer
        case "FSQ":
            return FSQ(levels=fsq_levels(K), dim=D)
        case "LFQ":
            return LFQ(dim=D, codebook_size=K, entropy_loss_weight=0.02, commitment_loss_weight=config.commitment_weight)
        case "SimVQ":
            return SimVQ(dim=D, codebook_size=K, rotation_trick=True, commitment_weight=config.commitment_weight)
    raise UserError(f"quantizer {config.quantizer!r} is not one of VectorQuantize, FSQ, LFQ, SimVQ")


def fsq_levels(codebook_size: int) -> list[int]:
    """Levels per dimension whose product is exactly `codebook_size`, a power of two: eights, then a remainder of 4, or 2 x 8 -> 4 x 4.

    The paper's table (Mentzer et al. 2023, table 1) only approximates powers of two ([8, 5, 5, 5] = 1000); an id space
    with a fixed codebook size needs the exact product.
    """
    bits = int(math.log2(codebook_size))
    levels = [8] * (bits // 3)
    if bits % 3 == 1:
        levels = [*levels[:-1], 4, 4]
    elif bits % 3 == 2:
        levels = [*levels, 4]
    return levels


def _check(config: ImageTokenizerConfig) -> None:
    steps = len(config.channels) - 1
    if config.stem * 2**steps != config.downsample:
        raise UserError(
            f"downsample {config.downsample} is not stem {config.stem} x 2^{steps}: "
            f"with {len(config.channels)} entries in channels it is {config.stem * 2**steps}"
        )
    if config.image_size % config.downsample:
        raise UserError(f"image_size {config.image_size} is not a multiple of downsample {config.downsample}")
    if config.image_channels not in (1, 3):
        raise UserError(f"image_channels is {config.image_channels}; 1 is grayscale, 3 is RGB")
    if config.attention and config.channels[-1] % 4:
        raise UserError(f"channels end with {config.channels[-1]}; with attention (4 heads) it must be a multiple of 4")
    K = config.codebook_size
    if K < 8 or K > 65536:
        raise UserError(f"codebook_size is {K}; it must be in 8..65536 (code shards are uint16)")
    if config.quantizer in ("FSQ", "LFQ") and K & (K - 1):
        raise UserError(f"codebook_size {K} is not a power of two, which {config.quantizer} needs")


def _groups(channels: int) -> int:
    """Groups of 16 channels: much smaller ones approach instance norm, which loses a picture's brightness."""
    return max(1, channels // 16) if channels % 16 == 0 else 1
