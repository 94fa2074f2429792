"""Promises of tokun/training/health.py."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from tokun.training.health import Spikes, StopRequest, attention_logit_max, matmul_rate, peak_memory


def test_a_spike_is_skipped_counted_and_leaves_the_measure_alone():
    spikes = Spikes(5.0)
    norms = [1.0 + 0.1 * (step % 7) for step in range(60)]
    assert not any(spikes.is_spike(norm) for norm in norms)
    assert spikes.is_spike(40.0) and not spikes.is_spike(1.2) and spikes.is_spike(9.0) and spikes.count == 2
    assert max(spikes.norms) < 2


def test_the_first_steps_are_never_spikes_and_a_lasting_rise_is_believed():
    spikes = Spikes(5.0)
    assert not any(spikes.is_spike(norm) for norm in [1.0] * 20 + [1000.0] + [1.0] * 28)
    told = [spikes.is_spike(1.0)] + [spikes.is_spike(50.0) for _ in range(30)]
    assert told[:1] == [False] and told[1:12] == [True] * 10 + [False] and spikes.count < 30
    assert not Spikes(0).is_spike(1e9) and Spikes(0).limit() is None
    with pytest.raises(ValueError, match=r"spike_factor is 0\.5"):
        Spikes(0.5)


@pytest.mark.parametrize(("norms", "quantile"), [(range(1, 61), 54), ([1.0] * 53 + [2.0] * 6 + [9.0], 2.0), ([1.0] * 54 + [2.0] * 6, 1.0)])
def test_what_counts_as_high_is_nine_tenths_of_the_way_up(norms, quantile):
    """`factor` times the 90 % quantile: neither the median nor the largest norm decides."""
    for factor in (1.5, 5.0):
        for norm, spike in ((factor * quantile, False), (factor * quantile * 1.001, True)):
            spikes = Spikes(factor)
            spikes.norms.extend(map(float, norms))
            assert spikes.limit() == factor * quantile and spikes.is_spike(norm) == spike


def test_a_restored_measure_decides_the_same():
    one, other = Spikes(3.0), Spikes(3.0)
    for step in range(120):
        one.is_spike(1 + (step % 5))
    other.load_state_dict(one.state_dict())
    norms = [2.0, 30.0, 14.9, 15.1, 3.0]
    assert [one.is_spike(norm) for norm in norms] == [other.is_spike(norm) for norm in norms]
    assert one.state_dict() == other.state_dict()


def test_the_largest_attention_logit_is_that_of_the_formula(tiny_model):
    """The same number from queries and keys caught at the eager attention."""
    import transformers.models.qwen3.modeling_qwen3 as qwen

    generator = tiny_model.generator
    ids = torch.arange(24).reshape(2, 12) % 60
    before, implementation, slow = generator(input_ids=ids).logits, generator.config._attn_implementation, []
    eager = qwen.eager_attention_forward

    def spying(module, query, key, value, mask, scaling, **options):
        logits = query @ qwen.repeat_kv(key, module.num_key_value_groups).transpose(2, 3) * scaling
        slow.append(logits.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).max().item())
        return eager(module, query, key, value, mask, scaling, **options)

    found = attention_logit_max(generator, ids)
    generator.config._attn_implementation = "eager"
    qwen.eager_attention_forward = spying
    try:
        with torch.no_grad():
            generator(input_ids=ids)
    finally:
        qwen.eager_attention_forward = eager
        generator.config._attn_implementation = implementation
    assert found == pytest.approx(max(slow), rel=1e-4)
    assert torch.equal(generator(input_ids=ids).logits, before)


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_sigterm_is_noted_and_its_old_meaning_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    assert not stop.asked
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked
    stop.close()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_the_first_ctrl_c_is_a_request_and_the_second_stops_at_once(capfd):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wanted() and stop.by == "Ctrl-C" and "Ctrl-C again stops at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        stop.close()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
        StopRequest().close()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("causes", "told"),
    [(("", "SIGTERM", "Ctrl-C"), "Ctrl-C"), (("its launcher has ended", "", "SIGTERM"), "SIGTERM"),
     (("its launcher has ended", ""), "its launcher has ended"), (("", ""), "")],
)  # fmt: skip
def test_processes_that_were_asked_in_several_ways_all_name_one_cause(causes, told):
    stops, sent = [StopRequest() for _ in causes], []
    for stop, cause in zip(stops, causes):
        stop.close()
        stop.asked, stop.by = bool(cause), cause or stop.by
        stop.agree(lambda value: sent.append(value) or 0)
    assert [stop.agree(lambda _: max(sent)) for stop in stops] == [bool(told)] * len(stops)
    assert {stop.by if stop.asked else "" for stop in stops} == {told}


def test_rates_and_memory_are_those_of_this_machine():
    device = torch.device("cpu")
    assert 1e8 < matmul_rate(device, torch.float32) < 1e16
    assert 50 * 2**20 < peak_memory(device) < 2**42
