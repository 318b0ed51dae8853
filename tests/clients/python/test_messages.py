"""Anthropic's Messages API: failures, as exceptions of its official SDK."""

import threading

import anthropic
import pytest

from harness import eventually, sim_route
from talk import PROMPT

HANG = ("--load-time", "1h", "--hang-load")


def ask(model="tiny", **more):
    return {"model": model, "messages": PROMPT, "max_tokens": 16, **more}


def types_of(error):
    """Returns status, Anthropic's type and Anteroom's code, and checks that the SDK found the request id."""
    body = error.value.body
    assert body["type"] == "error" and body["error"]["message"]
    assert body["request_id"] == error.value.response.headers["x-request-id"]
    return error.value.status_code, body["error"]["type"], body["error"]["code"]


@pytest.mark.parametrize("mode", ["comment", "chunk"])
def test_stream_through_a_cold_start(anteroom, anthropic_client, mode):
    keepalive = {"mode": mode, "after": "50ms", "interval": "50ms"}
    proxy = anteroom(sim_route("--load-time", "1s", keepalive=keepalive))
    with anthropic_client(proxy).messages.stream(**ask()) as stream:
        assert "".join(stream.text_stream)
        assert stream.get_final_message().stop_reason
    assert proxy.stop() == {"completed": 1}


@pytest.mark.parametrize("stream", [True, False])
def test_model_not_found(anteroom, anthropic_client, stream):
    proxy = anteroom(sim_route())
    with pytest.raises(anthropic.NotFoundError) as error:
        anthropic_client(proxy).messages.create(**ask("unheard-of"), stream=stream)
    assert types_of(error) == (404, "not_found_error", "model_not_found")
    assert error.value.request_id == error.value.body["request_id"]
    assert "unheard-of" in error.value.body["error"]["message"]
    assert proxy.starts() == 0


def test_model_not_found_by_name(anteroom, anthropic_client):
    proxy = anteroom(sim_route())
    with pytest.raises(anthropic.NotFoundError) as error:
        anthropic_client(proxy).models.retrieve("unheard-of")
    assert types_of(error) == (404, "not_found_error", "model_not_found")


def test_count_tokens_of_an_unknown_model(anteroom, anthropic_client):
    proxy = anteroom(sim_route())
    with pytest.raises(anthropic.NotFoundError) as error:
        anthropic_client(proxy).messages.count_tokens(model="unheard-of", messages=PROMPT)
    assert types_of(error) == (404, "not_found_error", "model_not_found")


@pytest.mark.parametrize("stream", [True, False])
def test_hold_queue_full(anteroom, anthropic_client, stream):
    proxy = anteroom(sim_route("--load-time", "2s", hold={"maxRequests": 1}))
    held = threading.Thread(target=lambda: anthropic_client(proxy).messages.create(**ask()))
    held.start()
    proxy.wait_until_held(1)
    with pytest.raises(anthropic.InternalServerError) as error:
        anthropic_client(proxy, max_retries=0).messages.create(**ask(), stream=stream)
    assert types_of(error) == (503, "overloaded_error", "hold_queue_full")
    assert error.value.response.headers["x-should-retry"] == "true"
    held.join()
    assert proxy.stop() == {"completed": 1}


def test_cold_start_timeout(anteroom, anthropic_client):
    proxy = anteroom(sim_route(*HANG, hold={"timeout": "500ms"}))
    with pytest.raises(anthropic.APIStatusError) as error:
        anthropic_client(proxy, max_retries=0).messages.create(**ask())
    assert types_of(error) == (504, "timeout_error", "cold_start_timeout")


def test_cold_start_failed(anteroom, anthropic_client):
    """With the SDK's defaults: after two failures for the same reason, a third start is not attempted."""
    proxy = anteroom(sim_route("--load-time", "400ms", "--fail-load=3"))
    with pytest.raises(anthropic.InternalServerError) as error:
        anthropic_client(proxy).messages.create(**ask())
    assert types_of(error) == (503, "api_error", "cold_start_failed")
    assert "exited with code 3" in error.value.body["error"]["message"]
    assert error.value.response.headers["x-should-retry"] == "false"
    assert proxy.starts() == 2
    assert proxy.stop() == {"cold_start_failed": 2}


@pytest.mark.parametrize("mode", ["comment", "chunk"])
@pytest.mark.parametrize(
    ("flags", "policies", "kind", "code"),
    [
        (("--load-time", "1s", "--fail-load"), {}, "api_error", "cold_start_failed"),
        (HANG, {"hold": {"timeout": "500ms"}}, "timeout_error", "cold_start_timeout"),
    ],
    ids=["start-fails", "deadline"],
)
def test_failure_after_the_early_200(anteroom, anthropic_client, mode, flags, policies, kind, code):
    keepalive = {"mode": mode, "after": "50ms", "interval": "50ms"}
    proxy = anteroom(sim_route(*flags, keepalive=keepalive, **policies))
    # The stream begins normally, before the failure.
    stream = anthropic_client(proxy).messages.create(**ask(), stream=True)
    with pytest.raises(anthropic.APIStatusError) as error:
        list(stream)
    assert types_of(error) == (200, kind, code)
    assert proxy.stop() == {code: 1}, "it is counted as what it was, whatever status had gone out"


async def test_failure_after_the_early_200_async(anteroom):
    proxy = anteroom(sim_route(*HANG, hold={"timeout": "500ms"}))
    async with anthropic.AsyncAnthropic(base_url=proxy.url, api_key="none") as client:
        with pytest.raises(anthropic.APIStatusError) as error:
            async with client.messages.stream(**ask()) as stream:
                async for _ in stream:
                    pass
    assert types_of(error) == (200, "timeout_error", "cold_start_timeout")


def test_error_of_the_model_server_after_the_early_200(anteroom, anthropic_client):
    proxy = anteroom(sim_route("--load-time", "1s", "--error-rate", "1"))
    stream = anthropic_client(proxy).messages.create(**ask(), stream=True)
    with pytest.raises(anthropic.APIStatusError) as error:
        list(stream)
    assert "injected by --error-rate" in error.value.body["error"]["message"]
    assert proxy.stop() == {"completed": 1}


def test_server_that_breaks_its_answer_off_after_the_early_200(anteroom, anthropic_client):
    proxy = anteroom(sim_route("--load-time", "1s", "--reset-mid-stream", "1"))
    stream = anthropic_client(proxy).messages.create(**ask(), stream=True)
    with pytest.raises(anthropic.APIStatusError) as error:
        list(stream)
    assert types_of(error) == (200, "api_error", "upstream_error")
    eventually(lambda: proxy.count("anteroom_requests_total", outcome="upstream_error") == 1)
