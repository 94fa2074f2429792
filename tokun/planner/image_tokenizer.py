"""FLOPs and memory of the image tokenizer, traced with fake tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from tokun.config import Config, parse_grids
from tokun.models import losses
from tokun.models.generator import count_parameters
from tokun.planner.measure import saved_bytes
from tokun.tokenizers.image import Decoder, Encoder, ImageTokenizer


@dataclass(frozen=True)
class ImageSizes:
    """FLOPs and bytes are per picture. `encode` is the forward pass of the codes stage."""

    parameters: int
    encode_flops: float
    step_flops: float
    saved: float
    quantizer: float  # distances to the codebook, one-hot codes and the like

    def memory(self, pictures: int, gpus: int) -> float:
        """Memory of a training step on one of `gpus` GPUs with `pictures` each: weights, gradients, AdamW's moments, average, DDP's
        buckets, and VGG-16."""
        return (24.0 if gpus > 1 else 20.0) * self.parameters + 59e6 + pictures * (self.saved + self.quantizer)


# peak memory of a quantizer's forward and backward pass, in float32 tables of codes x codebook: measured with codebooks of 4,096
QUANTIZER_COPIES = {"VectorQuantize": 4.0, "FSQ": 0.0, "LFQ": 7.0, "SimVQ": 1.3}


def image_tokenizer_sizes(config: Config) -> ImageSizes:
    """Trace encoder, decoder, perceptual net and discriminator over one picture of fake tensors, for the grid with the most codes.

    The backward pass counts twice the forward pass, or once for the perceptual net, whose weights are frozen. The quantizer is counted
    by hand: 2 x codes x codebook x width of a code.
    """
    m, t = config.image_tokenizer, config.image_tokenizer_train
    h, w = max(parse_grids(config.data.grids) or [(m.image_size // m.downsample,) * 2], key=math.prod)
    bf16, size, codes = t.precision == "bf16", (h * m.downsample, w * m.downsample), h * w
    with torch.device("meta"):
        model = ImageTokenizer(m)
    latent, picture = (1, m.latent_dim, h, w), (1, m.image_channels, *size)
    encode, encoder_saved = traced(lambda: Encoder(m), picture, bf16=bf16)
    decode, decoder_saved = traced(lambda: Decoder(m), latent, bf16=bf16)
    quantize = 2.0 * codes * m.codebook_size * (m.codebook_dim if m.quantizer == "VectorQuantize" else m.latent_dim)
    step, saved = 3 * (encode + decode) + quantize, encoder_saved + decoder_saved
    if t.perceptual_weight > 0 and t.perceptual != "none":
        flops, kept = traced(vgg16, (1, 3, *size), bf16=bf16)
        scale = 1.0 if t.perceptual == "lpips" else 0.35 / 15.5  # multiplications at 224 px: SqueezeNet 1.1 and VGG-16, torchvision's table
        step, saved = step + 3 * flops * scale, saved + kept * scale  # both pictures forward, one of them backward
    if t.gan_weight > 0:
        flops, kept = traced(lambda: losses.PatchDiscriminator(m.image_channels), picture, bf16=bf16)
        step, saved = step + 9 * flops, saved + 2 * kept  # its own step over both pictures, and the decoder's gradient through it
    return ImageSizes(
        count_parameters(model), encode + quantize, step, saved, QUANTIZER_COPIES[m.quantizer] * 4.0 * codes * m.codebook_size
    )


def vgg16() -> nn.Module:
    """The convolutions of VGG-16 (Simonyan and Zisserman 2014, configuration D) that LPIPS uses."""
    layers: list[nn.Module] = []
    width = 3
    for out in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):  # 0: pooling
        layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU(inplace=True)] if out else [nn.MaxPool2d(2)]
        width = out or width
    return nn.Sequential(*layers).requires_grad_(False)


def traced(make: Callable[[], nn.Module], shape: tuple[int, ...], *, bf16: bool) -> tuple[float, float]:
    """(FLOPs of the forward pass, bytes saved for the backward pass) of a module on one input, as on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode(), torch.device("cuda"), on_fake_gpu(bf16), FlopCounterMode(display=False) as counter:
        module, inputs = make(), torch.empty(shape).requires_grad_()
        saved = saved_bytes(lambda: module(inputs), exclude=module.parameters())
    return float(counter.get_total_flops()), saved


@contextlib.contextmanager
def on_fake_gpu(bf16: bool) -> Iterator[None]:
    """CUDA's autocast rules for fake tensors; torch.autocast disables itself without a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", bf16)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()
