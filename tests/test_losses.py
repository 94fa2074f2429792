"""Promises of tokun/models/losses.py."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from tokun.models import losses
from tokun.models.losses import (
    IGNORE,
    NoDistance,
    PatchDiscriminator,
    SqueezeNetDistance,
    adaptive_weight,
    adversarial_loss,
    chunked_loss,
    discriminator_loss,
    line_loss,
    make_perceptual,
    next_token_losses,
    weighted_loss,
)  # fmt: skip

WEIGHTS = Path(__file__).parent.parent.parent / "shared" / "models" / "squeezenet1_1_imagenet.safetensors"


def hatching(period: float, angle: float = 0.0, phase: float = 0.0, contrast: float = 1.0, side: int = 64) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    along = x * torch.cos(torch.tensor(angle)) + y * torch.sin(torch.tensor(angle))
    return (contrast * torch.sin(2 * torch.pi * (along / period + phase)))[None, None]


# --- pictures -------------------------------------------------------------------------------------------------------


def test_line_loss_is_zero_for_equal_pictures_and_symmetric():
    a, b = hatching(4.0), hatching(6.0, 0.5)
    assert line_loss(a, a) == 0
    torch.testing.assert_close(line_loss(a, b), line_loss(b, a))


def test_line_loss_sees_what_mean_grey_does_not():
    """Other spacing, other direction, weaker lines, plain grey: all of the same mean, all worse than a shifted copy."""
    lines = hatching(4.0)
    shifted = line_loss(hatching(4.0, phase=0.5), lines)
    for other in (hatching(6.0), hatching(4.0, 1.57), hatching(4.0, 0.8), hatching(4.0, contrast=0.3), torch.zeros_like(lines)):
        assert abs(other.mean() - lines.mean()) < 0.05
        assert line_loss(other, lines) > 3 * shifted


def test_line_loss_forgives_a_half_period_where_a_pixel_loss_prefers_grey():
    lines, shifted, grey = hatching(4.0), hatching(4.0, phase=0.5), torch.zeros(1, 1, 64, 64)
    l1 = lambda a, b: (a - b).abs().mean()  # noqa: E731
    assert l1(shifted, lines) > 1.9 * l1(grey, lines)
    assert line_loss(shifted, lines) < 0.1 * line_loss(grey, lines)


def test_line_loss_has_a_finite_gradient_everywhere_and_works_in_half_precision():
    for picture in (torch.zeros(1, 3, 32, 32), hatching(4.0, side=32)):
        picture = picture.clone().requires_grad_()
        line_loss(picture, torch.zeros_like(picture)).backward()
        assert picture.grad.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert line_loss(hatching(4.0).bfloat16(), hatching(6.0)).dtype == torch.float32


def random_squeezenet(path: Path) -> Path:
    """Weights in torchvision's layout; its own module names are the test's slow twin."""
    sizes = {3: (64, 16, 64), 4: (128, 16, 64), 6: (128, 32, 128), 7: (256, 32, 128), 9: (256, 48, 192), 10: (384, 48, 192),
             11: (384, 64, 256), 12: (512, 64, 256)}  # fmt: skip
    torch.manual_seed(0)
    convolutions = {"features.0": nn.Conv2d(3, 64, 3), "classifier.1": nn.Conv2d(512, 10, 1)}
    for i, (inputs, squeeze, expand) in sizes.items():
        convolutions |= {
            f"features.{i}.squeeze": nn.Conv2d(inputs, squeeze, 1), f"features.{i}.expand1x1": nn.Conv2d(squeeze, expand, 1),
            f"features.{i}.expand3x3": nn.Conv2d(squeeze, expand, 3),
        }  # fmt: skip
    state = {f"{name}.{k}": v.detach() for name, conv in convolutions.items() for k, v in conv.state_dict().items()}
    (torch.save if path.suffix == ".pth" else lambda s, p: safetensors.torch.save_file(s, p))(state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_squeezenet_distance_reads_torchvision_weights(tmp_path, suffix):
    distance = make_perceptual("squeezenet", str(random_squeezenet(tmp_path / f"net{suffix}")))
    a, b = hatching(4.0), hatching(9.0, 0.7).requires_grad_()
    assert distance(a, a) == 0 and distance(a.expand(-1, 3, -1, -1), a) == 0
    distance(a, b).backward()
    assert b.grad.abs().sum() > 0 and not any(p.requires_grad for p in distance.parameters())
    assert [t.shape[1] for t in distance.taps(a)] == [64, 128, 256, 384, 384, 512, 512]


def test_squeezenet_features_are_torchvisions(tmp_path):
    models = pytest.importorskip("torchvision.models")
    path = random_squeezenet(tmp_path / "net.safetensors")
    theirs = models.squeezenet1_1(num_classes=10)
    theirs.load_state_dict(safetensors.torch.load_file(path))
    ours, images = SqueezeNetDistance(str(path)), torch.rand(2, 3, 64, 64) * 2 - 1
    x = ((images + 1) / 2 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(ours.taps(images)[-1], theirs.features(x))


@pytest.mark.parametrize(
    "kind",
    [
        "random",  # random weights rank as trained ones do
        pytest.param(
            "trained",
            marks=pytest.mark.skipif(not WEIGHTS.is_file(), reason="the trained SqueezeNet weights do not lie beside the project"),
        ),
    ],
)
def test_squeezenet_distance_ranks_likeness(kind, tmp_path):
    distance = SqueezeNetDistance(str(WEIGHTS if kind == "trained" else random_squeezenet(tmp_path / "net.safetensors")))
    a = hatching(8.0, 0.4)
    assert distance(a, a) == 0
    slightly = distance(a, (a + 0.05 * torch.randn_like(a)).clamp(-1, 1))
    assert 0 < slightly < distance(a, hatching(8.0, -1.0)) and slightly < distance(a, torch.zeros_like(a))


def test_a_missing_weights_file_or_kind_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"perceptual_weights .*none\.pth does not exist"):
        make_perceptual("squeezenet", str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match="perceptual is 'vgg'; it must be lpips, squeezenet or none"):
        make_perceptual("vgg")
    assert isinstance(make_perceptual("none"), NoDistance) and make_perceptual("none")(hatching(4.0), hatching(5.0)) == 0


def test_weights_that_cannot_be_downloaded_say_the_way_out(monkeypatch):
    def no_network(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    with pytest.raises(OSError, match=r"perceptual_weights, or set image_tokenizer_train\.perceptual=none"):
        losses.load_squeezenet("")


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction, adversarial = (3 * last).square().sum(), (torch.tensor([4.0, 3.0]) * last).sum()
    expected = (18 * last).norm() / (5.0 + 1e-6)
    weight = adaptive_weight(reconstruction, adversarial, last)
    torch.testing.assert_close(weight, expected.detach())
    assert not weight.requires_grad
    (reconstruction + weight * adversarial).backward()  # the graph is still there
    assert adaptive_weight(last.sum(), (0 * last).sum(), last) == 1e4


def test_the_discriminator_learns_the_direction_of_lines():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(1, width=16)
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-3)
    real = torch.cat([hatching(5.0, 0.0, p / 8, side=32) for p in range(8)])
    fake = real.transpose(2, 3)
    first = None
    for _ in range(30):
        loss = discriminator_loss(discriminator(real), discriminator(fake))
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first == pytest.approx(1.0, abs=0.3) and loss < 0.3
    assert discriminator(real).mean() > 0.5 and discriminator(fake).mean() < -0.5
    assert adversarial_loss(discriminator(fake)) > adversarial_loss(discriminator(real))
    assert discriminator(real).shape[1] == 1 and discriminator_loss(torch.ones(3), -torch.ones(3)) == 0


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 9, 12, generator=g) * 3
    labels = torch.randint(0, 12, (4, 9), generator=g)
    labels[torch.rand(4, 9, generator=g) < 0.3] = IGNORE
    return logits, labels, torch.arange(12) >= 7


def test_next_token_losses_are_cross_entropy_per_modality(batch):
    logits, labels, _ = batch
    out = next_token_losses(*batch)
    image, text = (labels >= 7), (labels >= 0) & (labels < 7)
    for name, mask in (("image", image), ("text", text)):
        expected = F.cross_entropy(logits[mask], labels[mask], reduction="sum")
        torch.testing.assert_close(out[f"{name}_sum"], expected)
        assert out[f"{name}_count"] == mask.sum()
    torch.testing.assert_close(out["z_sum"], logits[image | text].logsumexp(-1).square().sum())


def test_any_split_of_the_batch_adds_up_to_the_same_sums(batch):
    logits, labels, is_image = batch
    whole = next_token_losses(*batch)
    for parts in ([1, 3], [1, 1, 1, 1], [2, 2]):
        several = [next_token_losses(a, b, is_image) for a, b in zip(logits.split(parts), labels.split(parts))]
        for name, value in whole.items():
            torch.testing.assert_close(sum(part[name] for part in several), value)


def test_padding_has_no_influence(batch):
    logits, labels, is_image = batch
    changed = torch.where((labels == IGNORE)[..., None], torch.full_like(logits, 1e4), logits).requires_grad_()
    out = next_token_losses(changed, labels, is_image)
    for name, value in next_token_losses(*batch).items():
        assert torch.equal(out[name], value)
    sum(out.values()).backward()
    assert (changed.grad[labels == IGNORE] == 0).all()


def test_a_batch_without_one_modality_or_any_label_is_zero_and_finite(batch):
    logits, labels, is_image = batch
    out = next_token_losses(logits, torch.where(labels >= 7, IGNORE, labels), is_image)
    assert out["image_sum"] == 0 and out["image_count"] == 0 and out["text_count"] > 0
    assert all(v == 0 for v in next_token_losses(logits, torch.full_like(labels, IGNORE), is_image).values())


def test_half_precision_logits_are_summed_in_float32(batch):
    logits, labels, is_image = batch
    out = next_token_losses(logits.bfloat16(), labels, is_image)
    assert all(v.dtype == torch.float32 for v in out.values())
    torch.testing.assert_close(out["text_sum"], next_token_losses(logits.bfloat16().float(), labels, is_image)["text_sum"])


def loss_parts_and_gradients(*, chunk: int, bf16: bool) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    labels, is_image, weights = torch.randint(0, 12, (36,), generator=g), torch.arange(12) >= 7, torch.tensor([0.3, 2.0, 0.01])
    labels[::5] = IGNORE
    hidden = torch.randn(36, 8, generator=g).requires_grad_()
    torch.manual_seed(1)
    head = nn.Linear(8, 14, bias=True)  # two rows more than the vocabulary has
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if chunk:
            loss, parts = chunked_loss(hidden, head, labels, is_image, weights, size=12, chunk=chunk)
        else:
            parts = next_token_losses(head(hidden)[..., :12], labels, is_image)
            loss = weighted_loss(parts, weights)
    (4 * loss).backward()  # as many processes
    if chunk:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for name, value in chunked_loss(hidden, head, labels, is_image, weights, size=12, chunk=chunk)[1].items():
                torch.testing.assert_close(value, parts[name])  # evaluation sees the same
    return [
        loss.detach(),
        *(parts[name].detach() for name in (*losses.TERMS, *losses.COUNTS)),
        hidden.grad,
        head.weight.grad,
        head.bias.grad,
    ]


@pytest.mark.parametrize("chunk", [1, 7, 36, 100])
def test_the_loss_in_chunks_is_the_whole_one_with_its_parts_and_gradients(chunk):
    exact = loss_parts_and_gradients(chunk=0, bf16=False)
    for piecewise, whole in zip(loss_parts_and_gradients(chunk=chunk, bf16=False), exact, strict=True):
        torch.testing.assert_close(piecewise, whole, atol=1e-5, rtol=1e-5)
    # in bfloat16 it is no farther from the truth
    for piecewise, whole, truth in zip(
        loss_parts_and_gradients(chunk=chunk, bf16=True), loss_parts_and_gradients(chunk=0, bf16=True), exact, strict=True
    ):
        assert piecewise.dtype == whole.dtype
        assert (piecewise - truth).norm() <= 1.1 * (whole - truth).norm() + 1e-5


def test_gradients_in_chunks_add_up_over_micro_batches_and_leave_frozen_heads_alone():
    torch.manual_seed(0)
    hidden, head, labels = torch.randn(6, 4, requires_grad=True), nn.Linear(4, 9, bias=False), torch.arange(6)
    options = dict(size=9, chunk=2)
    run = lambda h, y: chunked_loss(h, head, y, torch.arange(9) > 3, torch.ones(3), **options)[0]  # noqa: E731
    run(hidden, labels).backward()
    once, head.weight.grad = head.weight.grad, None
    for rows in (slice(0, 3), slice(3, 6)):
        run(hidden[rows], labels[rows]).backward()
    torch.testing.assert_close(head.weight.grad, once)
    head.requires_grad_(False).weight.grad = None
    run(hidden, labels).backward()
    assert head.weight.grad is None
    assert run(hidden[:0], labels[:0]) == 0  # a micro batch of padding alone
