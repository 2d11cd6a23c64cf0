"""quietstar.data.hub: without a network two attempts and one sentence; a hub that answers is a hub."""

import errno
import json
import logging
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from families import tiny_decoder
from huggingface_hub import constants
from small_recipes import rejected

from quietstar.data import hub
from quietstar.errors import UserError
from quietstar.modeling.pretrained import load_config


class Nothing(BaseHTTPRequestHandler):
    """A hub that has no repository at all."""

    asked: list[str]

    def _answer(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        self.send_response(200 if self.path == "/" else 404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = _answer

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Nothing]]:
    """The hub of this test, and what it was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Nothing)
    Nothing.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield Nothing
    server.shutdown()
    server.server_close()


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address at which nobody listens."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Nothing)
    address = f"http://127.0.0.1:{server.server_port}"
    server.server_close()
    online(monkeypatch, address)
    return address


def online(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """As if HF_HUB_OFFLINE were not set, as it is for the tests."""
    import datasets.config
    import huggingface_hub.file_download as download

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(download, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/x", raising=False)
    monkeypatch.setattr(hub, "_answers", {})
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["plan", "qwen2.5-0.5b"], "model Qwen/Qwen2.5-0.5B"),
        (["generate", "no/such", "text"], "model no/such"),
        (["train", "tiny", "data.name=no/such"], "data set no/such"),
        (["train", "tiny", "model.tokenizer=no/such"], "no/such"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_without_a_network(words, kind, nowhere, capsys, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    message = f"{kind} is neither a folder nor in the local cache of the Hugging Face Hub, which cannot"
    with caplog.at_level(logging.INFO, "huggingface_hub"):
        rejected(capsys, words, message)
    assert "Retrying" not in caplog.text
    assert constants.HF_HUB_OFFLINE is False  # as before
    assert list(hub._answers) == [nowhere]


@pytest.mark.slow  # lists the tasks of lm-evaluation-harness
def test_a_task_of_the_harness_without_a_network(nowhere, capsys, tmp_path, caplog):
    """Its data are looked for before a model is, and once."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")
    (tmp_path / "task.yaml").write_text(
        "task: quietstar_of_no_hub\ndataset_path: no/such\noutput_type: loglikelihood\n"
    )
    words = ["eval", "no/model", "--tasks", "quietstar_of_no_hub", "--include-path", tmp_path]
    with caplog.at_level(logging.INFO, "huggingface_hub"):
        rejected(capsys, words, f"; the Hugging Face Hub cannot be reached ({nowhere}: ", alone=False)
    assert "Retrying" not in caplog.text
    assert constants.HF_HUB_OFFLINE is False


def test_the_sentence_says_what_failed(nowhere):
    with pytest.raises(UserError, match=rf"which cannot be reached \({nowhere}: .*refused.*\)$"):
        load_config("no/such")


def test_a_name_that_the_hub_has_not(endpoint, capsys):
    message = "model no/such is neither a folder nor a name on the Hugging Face Hub (a private one needs"
    rejected(capsys, ["generate", "no/such", "text"], message)
    assert endpoint.asked[0] == "HEAD /" and len(endpoint.asked) > 1


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "../none", "a/b/c", "~/none", "a b"])
def test_nothing_is_asked_about_what_is_no_name(name, endpoint):
    words = f"model {name} is neither a folder nor a name on the Hugging Face Hub"
    with pytest.raises(UserError, match=rf"^{re.escape(words)}$"):
        load_config(name)
    assert endpoint.asked == []


def test_what_can_be_given_instead(nowhere):
    from quietstar.evaluation.items import load_rows

    with pytest.raises(UserError, match=r"\); --data takes a local file of the same columns$"):
        load_rows(["a"], data=None, hub_name="no/such", hub_config=None, split="test")


def test_nothing_is_asked_about_a_folder(endpoint, tmp_path):
    tiny_decoder("llama").save_pretrained(tmp_path)
    assert load_config(tmp_path).model_type == "llama"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nope"}))
    with pytest.raises(UserError, match="is of model type 'nope'"):
        load_config(tmp_path)
    assert endpoint.asked == []


def test_an_answer_holds_for_a_while(endpoint, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(hub.time, "monotonic", lambda: now[0])
    assert [hub.unreachable(), hub.unreachable()] == [None, None] and endpoint.asked == ["HEAD /"]
    now[0] += hub.HOLDS + 1
    assert hub.unreachable() is None and len(endpoint.asked) == 2


def test_two_attempts(nowhere, monkeypatch):
    waited = []
    monkeypatch.setattr(hub.time, "sleep", waited.append)
    assert hub.unreachable() is not None and hub.unreachable() is not None
    assert waited == [1.0, 0.0]


def test_what_the_cache_has_in_part(nowhere, tmp_path, monkeypatch):
    """It is there, so the sentence says what is missing of it."""
    folder = tmp_path / "models--me--x"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    tiny_decoder("llama").config.save_pretrained(folder / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with (
        pytest.raises(UserError, match=r"^model me/x is not wholly in the local .*refused.*safetens"),
        hub.from_hub("model", "me/x"),
    ):
        raise OSError("me/x has no file named model.safetensors")
    with pytest.raises(UserError, match="is neither a folder nor in"), hub.from_hub("model", "me/y"):
        raise OSError("me/y has no file named model.safetensors")


def test_a_full_disk_is_no_matter_of_the_hub(nowhere):
    with pytest.raises(OSError, match="No space left") as error, hub.from_hub("data set", "a/b"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not isinstance(error.value, UserError)


def test_it_is_the_error_of_transformers_as_well(nowhere):
    with pytest.raises(OSError, match="no/such is neither a folder nor in the local cache"):
        load_config("no/such")


def test_the_setting_is_named(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"which cannot be reached \(HF_HUB_OFFLINE is set\)"):
        load_config("no/such")
