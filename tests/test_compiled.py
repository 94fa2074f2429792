"""Promises of what torch.compile makes of the models' layers, kernels and losses. In one file, since to import the compiler and to compile
takes half of the time."""

import contextlib
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from tests.test_generator import labelled, loss_and_gradients, make
from tests.test_losses import random_squeezenet
from tokun.models import kernels
from tokun.models.feature_alignment import AlignmentHead
from tokun.models.generator import add_dropout, can_compile, compile_layers, tune_for, uncompiled
from tokun.models.losses import make_perceptual

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="torch.compile needs a C++ compiler on a CPU"),
    pytest.mark.filterwarnings("ignore"),  # torch._dynamo silences warnings of its own in a way that an error filter overrides
]
__all__ = ["labelled"]  # the fixture


def step(model, ids) -> dict[str, torch.Tensor]:
    """The loss of a training step on these ids, and the gradients by name."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def compiled() -> SimpleNamespace:
    """A model with dropout whose layers are compiled, once for all tests, and its losses and gradients: compiled (of seed 1 twice and of
    seed 2), as written, and in evaluation before it was compiled and without."""
    torch._dynamo.reset()  # it does not look at hooks when it takes a graph compiled before, of a model without dropout
    model, ids = make(), torch.randint(0, 50, (2, 9))
    add_dropout(model, 0.3)
    tune_for(model, torch.device("cpu"))
    model.train()

    def seeded(seed):
        torch.manual_seed(seed)
        return step(model, ids)

    names, graphs = list(model.state_dict()), counters["stats"]["unique_graphs"]
    model.eval()
    still = seeded(0)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compile_layers(model)
        fast, again, other = (seeded(seed) for seed in (1, 1, 2))
    graphs = counters["stats"]["unique_graphs"] - graphs
    with uncompiled(model):  # the same function of the same seeds, as it is written
        left = sum(m._compiled_call_impl is not None for m in model.modules())
        slow = seeded(1)
        model.eval()
        restored = seeded(0)
    found = dict(fast=fast, again=again, other=other, slow=slow, still=still, restored=restored, left=left, graphs=graphs)
    return SimpleNamespace(model=model, ids=ids, names=names, **found)


def test_compiled_layers_give_the_same_loss_and_gradients_and_the_same_names(compiled):
    model = compiled.model
    assert sum(m._compiled_call_impl is not None for m in model.modules()) == model.config.num_hidden_layers
    assert compiled.left == 0 and compiled.graphs == 1, "one compilation serves all layers"
    assert all(torch.equal(compiled.restored[name], still) for name, still in compiled.still.items())
    assert compiled.fast.keys() == compiled.slow.keys() and list(model.state_dict()) == compiled.names
    for name, slow in compiled.slow.items():
        torch.testing.assert_close(compiled.fast[name], slow, atol=1e-5, rtol=1e-4, msg=name)


def test_compiled_layers_drop_what_their_seeds_say_and_no_two_branches_the_same(compiled):
    model, first, again, other = compiled.model, compiled.fast, compiled.again, compiled.other
    assert all(torch.equal(first[name], again[name]) for name in first) and not torch.equal(first["loss"], other["loss"])
    seeds = [layer.mlp.down_proj.dropout_seed.item() for layer in model.model.layers] + [
        layer.self_attn.o_proj.dropout_seed.item() for layer in model.model.layers
    ]
    assert len(set(seeds)) == 2 * model.config.num_hidden_layers
    plain = make().eval()
    with uncompiled(model):
        torch.testing.assert_close(model.eval()(input_ids=compiled.ids).logits, plain(input_ids=compiled.ids).logits, atol=1e-4, rtol=1e-3)


def test_layers_compiled_once_without_dropout_serve_all_lengths_with_the_same_loss_and_gradients():
    torch._dynamo.reset()  # graphs of a model with dropout
    model = make(num_layers=1)  # two of them are compiled above
    tune_for(model, torch.device("cpu"))
    rows = [torch.randint(0, 50, (2, length)) for length in (9, 20, 13)]
    plain = [step(model, ids) for ids in rows]
    compile_layers(model)
    graphs = []
    for ids, wanted in zip(rows, plain):
        found = step(model, ids)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=name)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1], "compiled again for another length"
    hidden = []
    for block in (contextlib.nullcontext(), uncompiled(model)):  # what an alignment head sees of a layer, compiled and as it is written
        with block:
            head = AlignmentHead(model.config.hidden_size)
            head.watch(model.model.layers[0])
            model(input_ids=rows[0], use_cache=False)
            hidden.append(head._hidden)
    assert hidden[0].requires_grad
    torch.testing.assert_close(*hidden, atol=1e-5, rtol=1e-4)
    with uncompiled(model):
        torch.testing.assert_close(step(model, rows[0])["loss"], plain[0]["loss"], atol=0, rtol=0)
    assert any(m._compiled_call_impl is not None for m in model.modules()), "compiled again after the block"


def test_compiled_hashed_dropout_is_the_same_to_the_bit_and_its_gradient_has_the_same_mask():
    compiled, seed = torch.compile(kernels.hashed_dropout, dynamic=True), torch.tensor(77, dtype=torch.int32)
    for shape in ((4, 9, 32), (2, 33, 40)):
        x = torch.rand(shape) + 1
        x.requires_grad_()
        y = compiled(x, 0.1, seed)
        assert torch.equal(y, kernels.hashed_dropout(x, 0.1, seed))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient != 0, y != 0)


def test_the_loss_in_compiled_chunks_is_the_whole_one(labelled):
    whole = loss_and_gradients(make(), *labelled)
    for name, value in loss_and_gradients(make(), *labelled, chunk=10, compiled=True).items():
        torch.testing.assert_close(value, whole[name], atol=1e-5, rtol=1e-4, msg=name)


def test_features_are_compared_by_one_compiled_kernel_as_they_are_plainly(tmp_path):
    path = str(random_squeezenet(tmp_path / "net.safetensors"))
    plain, compiled = (make_perceptual("squeezenet", path, compiled=wanted).angle for wanted in (False, True))
    features = [torch.randn(2, 8, 5, 5, requires_grad=True) for _ in range(2)]
    features[1].data.copy_(features[0].data)
    target = torch.randn(2, 8, 5, 5)
    values = [angle(x, target) for angle, x in zip((plain, compiled), features)]
    torch.testing.assert_close(*values)
    torch.stack(values).sum().backward()
    torch.testing.assert_close(features[0].grad, features[1].grad)
