"""Without a network nothing waits for a minute: one clear line says what is unreachable and how to work offline. The cache is used."""

import socket
import sys
import time

import pytest

from tokun.utils import network_access

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def nobody(monkeypatch):
    """An address that refuses at once."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield


@pytest.fixture
def silent(monkeypatch):
    """An address that takes the question and never answers, as behind a firewall."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(network_access, "SECONDS", 0.3)
        yield


@pytest.mark.parametrize("network", ["nobody", "silent"])
def test_what_is_neither_here_nor_reached_is_one_line_with_the_way_out(network, request):
    request.getfixturevalue(network)
    start = time.monotonic()
    with (
        pytest.raises(
            network_access.NotFetched,
            match=r"--checkpoint name/model is neither a local folder.*Hub \(http://127.*hf download name/model --local-dir FOLDER",
        ),
        network_access.fetched("name/model", "--checkpoint"),
    ):
        import huggingface_hub

        huggingface_hub.snapshot_download("name/model")
    assert time.monotonic() - start < 15  # beside other jobs; each retry of the library's would take that long


def test_what_is_in_the_cache_is_used_and_the_switches_are_put_back(nobody):
    with network_access.fetched("name/model", "--checkpoint"):
        assert constants.HF_HUB_OFFLINE and network_access.os.environ[network_access.OFFLINE] == "1"
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    "error", [KeyError("hidden_size"), RuntimeError("shapes differ"), ValueError("no such class"), OSError(28, "No space left")]
)
def test_what_is_wrong_with_something_in_the_cache_passes_as_it_is(nobody, error):
    with pytest.raises(type(error)) as told, network_access.fetched("name/model", "--checkpoint"):
        raise error
    assert told.value is error


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoTokenizer", "AutoModel", "AutoProcessor", "AutoImageProcessor"])
def test_a_model_that_transformers_does_not_find_is_one_line(nobody, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    with (
        pytest.raises(network_access.NotFetched, match="--model nobody/no-model is neither a local folder"),
        network_access.fetched("nobody/no-model", "--model"),
    ):
        getattr(transformers, kind).from_pretrained("nobody/no-model", cache_dir=str(tmp_path))


def test_an_error_raised_from_a_missing_entry_is_one_line(nobody):
    errors = pytest.importorskip("huggingface_hub.errors")
    for missing in (errors.LocalEntryNotFoundError("not in the cache"), errors.OfflineModeIsEnabled("offline")):
        with pytest.raises(network_access.NotFetched), network_access.fetched("name/model", "--checkpoint"):
            try:
                raise missing
            except OSError as error:
                raise RuntimeError("the weights cannot be loaded") from error


def test_a_folder_or_a_path_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(network_access, "out_of_reach", lambda address: pytest.fail("it was asked"))
    for name in (tmp_path, tmp_path / "nowhere", "./a/b", "~/model"):
        with network_access.fetched(name, "--model"):
            pass


def test_a_server_that_refuses_is_reached():
    import http.server
    import threading

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:  # knows no HEAD: 501
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert network_access.out_of_reach(f"http://127.0.0.1:{server.server_port}") == ""
        server.shutdown()


def test_the_module_needs_no_library_of_the_hub():
    assert "huggingface_hub" in sys.modules and "huggingface_hub" not in vars(network_access)


@pytest.mark.parametrize("what", ["checkpoint", "adapter"])
def test_checkpoints_and_adapters_are_fetched_alike_and_without_a_network_told_so(nobody, what):
    import tokun
    from tokun.inference import adapters

    read = tokun.load if what == "checkpoint" else adapters.read
    with pytest.raises(
        network_access.NotFetched, match=rf"the {what} name/model is neither a local folder nor in the cache.*hf download name/model"
    ):
        read("name/model")
    with pytest.raises(
        FileNotFoundError, match=rf"{what} 'nowhere' is neither a local folder nor a Hugging Face Hub id such as 'owner/name'"
    ):
        read("nowhere")


def test_a_folder_with_a_similar_name_is_named(tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert network_access.near(tmp_path / "runs" / "mien") == f" (did you mean {tmp_path / 'runs' / 'mine'}?)"
    assert network_access.near(tmp_path / "runs" / "quite-another") == f" ({tmp_path / 'runs'} holds mine)"
    assert network_access.near("owner/model") == ""
