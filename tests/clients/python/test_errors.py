"""Failures, as exceptions of the official SDK."""

import contextlib
import threading

import httpx2
import openai
import pytest

from harness import eventually, sim_route
from talk import ask, text_of, whole

HANG = ("--load-time", "1h", "--hang-load")

# Clients get the output of the model server.
FULL = {"detail": "full"}


@contextlib.contextmanager
def held(proxy, **request):
    """A request that is held for the duration of the context; its client then disconnects."""
    before = proxy.route()["held"]
    with httpx2.Client(timeout=None) as raw:
        request = raw.build_request("POST", f"{proxy.base_url}/chat/completions", json=ask(stream=True, **request))
        # A request with a 200 and a heartbeat is held.
        answer = raw.send(request, stream=True)
        events = answer.iter_raw()
        next(events)
        assert proxy.route()["held"] == before + 1
        try:
            yield answer
        finally:
            answer.close()
    proxy.wait_until_held(before)


def code_of(error):
    return error.value.status_code, error.value.code


@pytest.mark.parametrize("stream", [True, False])
def test_model_not_found(anteroom, client, stream):
    proxy = anteroom(sim_route())
    with pytest.raises(openai.NotFoundError) as error:
        client(proxy).chat.completions.create(**ask(model="unheard-of", stream=stream))
    assert code_of(error) == (404, "model_not_found")
    assert error.value.param == "model" and error.value.type == "invalid_request_error"
    assert "unheard-of" in error.value.message
    assert proxy.starts() == 0, "an unknown model wakes nothing"
    assert proxy.count("anteroom_refused_requests_total", reason="model_not_found", code="404") == 1
    assert proxy.stop() == {}


def test_unknown_path(anteroom, client):
    proxy = anteroom(sim_route())
    with pytest.raises(openai.NotFoundError) as error:
        client(proxy).post("/no-such-thing", body=ask(), cast_to=object)
    assert code_of(error) == (404, "unknown_path")
    assert proxy.starts() == 0


def test_hold_queue_full(anteroom, client):
    proxy = anteroom(sim_route(*HANG, hold={"maxRequests": 1}))
    with held(proxy):
        with pytest.raises(openai.InternalServerError) as error:
            client(proxy, max_retries=0).chat.completions.create(**ask())
    assert code_of(error) == (503, "hold_queue_full")
    headers = error.value.response.headers
    assert headers["x-should-retry"] == "true" and 1 <= int(headers["retry-after"]) <= 60
    assert proxy.stop() == {"client_gone": 1}


def test_retries_survive_a_full_queue_that_clears(anteroom, client):
    proxy = anteroom(sim_route("--load-time", "1s", hold={"maxRequests": 1}))
    with contextlib.ExitStack() as first:
        first.enter_context(held(proxy))
        # The SDK's defaults: two retries, after the time in Retry-After.
        answer = client(proxy).chat.completions.with_raw_response.create(**ask())
    assert 1 <= answer.retries_taken <= 2 and whole(answer.parse())
    assert proxy.count("anteroom_refused_requests_total", reason="hold_queue_full") == answer.retries_taken


def test_saturated(anteroom, client):
    route = sim_route(
        "--tokens", "100000", "--inter-token-time", "20ms", concurrency={"max": 1}, hold={"maxRequests": 1}
    )
    proxy = anteroom(route)
    running = client(proxy).chat.completions.create(**ask(stream=True))
    next(iter(running))
    with held(proxy):
        with pytest.raises(openai.RateLimitError) as error:
            client(proxy, max_retries=0).chat.completions.create(**ask())
    assert code_of(error) == (429, "saturated")
    assert error.value.response.headers["x-should-retry"] == "true"
    running.close()
    assert proxy.stop() == {"client_gone": 2}


@pytest.mark.parametrize("mode", ["off", "comment"])
def test_cold_start_failed(anteroom, client, mode):
    keepalive = {"mode": mode, "after": "1h"}
    proxy = anteroom(sim_route("--load-time", "400ms", "--fail-load=3", keepalive=keepalive))
    with pytest.raises(openai.InternalServerError) as error:
        client(proxy, max_retries=0).chat.completions.create(**ask(stream=True))
    assert code_of(error) == (503, "cold_start_failed")
    assert "exited with code 3" in error.value.message
    assert "CUDA out of memory" not in error.value.message, "what a server prints is for its operators"
    assert int(error.value.response.headers["retry-after"]) >= 1
    (cold_start,) = proxy.cold_starts()
    assert cold_start["outcome"] == "failed"
    eventually(lambda: proxy.cold_starts()[0]["failed"] == 1)
    assert any("CUDA out of memory" in line for line in cold_start["last_lines"])
    assert proxy.stop() == {"cold_start_failed": 1}


def test_command_that_does_not_exist(anteroom, client):
    route = sim_route(process={"command": ["/no/such/model-server", "{port}"]})
    proxy = anteroom(route)
    with pytest.raises(openai.InternalServerError) as error:
        client(proxy, max_retries=0).chat.completions.create(**ask())
    assert code_of(error) == (503, "cold_start_failed")
    assert "/no/such/model-server" in error.value.message


@pytest.mark.parametrize(
    ("policies", "headers", "says"),
    [
        ({"hold": {"timeout": "500ms"}}, {}, "hold.timeout"),
        ({}, {"x-anteroom-max-wait": "0.5"}, "x-anteroom-max-wait"),
        ({}, {"x-anteroom-max-wait": "500ms"}, "x-anteroom-max-wait"),
    ],
    ids=["hold.timeout", "header-in-seconds", "header-as-duration"],
)
def test_cold_start_timeout(anteroom, client, policies, headers, says):
    proxy = anteroom(sim_route(*HANG, **policies))
    with pytest.raises(openai.InternalServerError) as error:
        client(proxy, max_retries=0).chat.completions.create(**ask(), extra_headers=headers)
    assert code_of(error) == (504, "cold_start_timeout")
    assert says in error.value.message
    assert proxy.stop() == {"cold_start_timeout": 1}


def test_activation_that_takes_too_long(anteroom, client):
    proxy = anteroom(sim_route(*HANG, readiness={"interval": "50ms", "activationTimeout": "500ms"}))
    with pytest.raises(openai.InternalServerError) as error:
        client(proxy, max_retries=0).chat.completions.create(**ask())
    assert code_of(error) == (503, "cold_start_failed")
    assert "not ready within 500ms" in error.value.message


def test_no_wait(anteroom, client):
    proxy = anteroom(sim_route("--load-time", "300ms"))
    with pytest.raises(openai.InternalServerError) as error:
        client(proxy, max_retries=0).chat.completions.create(**ask(), extra_headers={"x-anteroom-max-wait": "0"})
    assert code_of(error) == (503, "no_wait")
    # The model is being started nevertheless, so a later request does not wait either.
    proxy.wait_until("ready")
    assert whole(client(proxy).chat.completions.create(**ask(), extra_headers={"x-anteroom-max-wait": "0"}))
    assert proxy.stop() == {"completed": 1}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"model": "tiny", ', "not a JSON object"),
        (b"", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b'{"messages": []}', "no `model`"),
        (b'{"model": "tiny", "model": "other"}', "`model` occurs more than once"),
        (b'{"model": "tiny", "\\u006dodel": "tiny"}', "`model` occurs more than once"),
        (b'{"model": 1}', "`model` in the body is not a string"),
        ('{"model": "tiny"}'.encode("utf-16"), "UTF-16"),
    ],
)
def test_invalid_request(anteroom, body, says):
    proxy = anteroom(sim_route())
    answer = httpx2.post(f"{proxy.base_url}/chat/completions", content=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "invalid_request" and error["type"] == "invalid_request_error"
    assert says in error["message"], error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-should-retry"] == "false"
    assert proxy.starts() == 0


def test_unreadable_max_wait(anteroom, client):
    proxy = anteroom(sim_route())
    with pytest.raises(openai.BadRequestError) as error:
        client(proxy).chat.completions.create(**ask(), extra_headers={"x-anteroom-max-wait": "soon"})
    assert code_of(error) == (400, "invalid_request") and "soon" in error.value.message
    assert proxy.starts() == 0


@pytest.mark.parametrize("told", [True, False], ids=["content-length", "chunked"])
def test_request_too_large(anteroom, client, told):
    proxy = anteroom(sim_route(), limits={"maxBodyBytes": "64KiB"})
    prompt = [{"role": "user", "content": "wait " * 20_000}]
    if told:
        with pytest.raises(openai.APIStatusError) as error:
            client(proxy).chat.completions.create(**ask(prompt))
        assert code_of(error) == (413, "request_too_large")
    else:
        parts = (b'{"model": "tiny", "messages": "', *[b"wait " * 4_000] * 5, b'"}')
        answer = httpx2.post(f"{proxy.base_url}/chat/completions", content=iter(parts))
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert proxy.starts() == 0


@pytest.mark.parametrize("mode", ["comment", "chunk"])
def test_failure_after_the_early_200(anteroom, client, mode):
    keepalive = {"mode": mode, "after": "50ms", "interval": "50ms"}
    proxy = anteroom(sim_route("--load-time", "1s", "--fail-load", keepalive=keepalive, failure=FULL))
    # The stream begins normally, before the failure.
    stream = client(proxy).chat.completions.create(**ask(stream=True))
    with pytest.raises(openai.APIError) as error:
        list(stream)
    assert type(error.value) is openai.APIError
    assert error.value.code == "cold_start_failed" and error.value.type == "server_error"
    assert "CUDA out of memory" in error.value.message
    assert proxy.stop() == {"cold_start_failed": 1}, "it is counted as what it was, whatever status had gone out"


async def test_failure_after_the_early_200_async(anteroom, async_client):
    proxy = anteroom(sim_route(*HANG, hold={"timeout": "500ms"}))
    stream = await async_client(proxy).chat.completions.create(**ask(stream=True))
    with pytest.raises(openai.APIError) as error:
        async for _ in stream:
            pass
    assert error.value.code == "cold_start_timeout"


def test_failure_after_the_early_200_in_whitespace_mode(anteroom):
    keepalive = {"mode": "whitespace", "after": "50ms", "interval": "50ms"}
    proxy = anteroom(sim_route("--load-time", "1s", "--fail-load", keepalive=keepalive))
    answer = httpx2.post(f"{proxy.base_url}/chat/completions", json=ask(), timeout=None)
    assert answer.status_code == 200, "which is why this mode is opt-in: the SDKs look at the status alone"
    assert answer.json()["error"]["code"] == "cold_start_failed"


def test_failure_after_the_early_200_of_responses(anteroom, client):
    proxy = anteroom(sim_route("--load-time", "1s", "--fail-load", failure=FULL))
    stream = client(proxy).responses.create(model="tiny", input="Who waits?", stream=True)
    with pytest.raises(openai.APIError) as error:
        list(stream)
    assert error.value.code == "cold_start_failed" and "CUDA out of memory" in error.value.message


def test_start_that_fails_twice_alike(anteroom, client):
    """With the SDK's defaults: the first retry waits for the next start, and no second one follows."""
    proxy = anteroom(sim_route("--load-time", "400ms", "--fail-load=3", keepalive={"mode": "off"}, failure=FULL))
    with pytest.raises(openai.InternalServerError) as error:
        client(proxy).chat.completions.create(**ask())
    assert code_of(error) == (503, "cold_start_failed")
    assert "twice for the same reason" in error.value.message and "CUDA out of memory" in error.value.message
    headers = error.value.response.headers
    assert headers["x-should-retry"] == "false" and "retry-after" not in headers
    assert proxy.starts() == 2
    assert proxy.stop() == {"cold_start_failed": 2}


def test_error_of_the_model_server_is_passed_on(anteroom, client):
    proxy = anteroom(sim_route("--error-rate", "1", "--error-status", "429"))
    with pytest.raises(openai.RateLimitError) as error:
        client(proxy, max_retries=0).chat.completions.create(**ask())
    assert error.value.status_code == 429 and str(error.value.code) == "429", "vLLM's code is the status"
    assert proxy.stop() == {"completed": 1}


def test_error_of_the_model_server_after_the_early_200(anteroom, client):
    proxy = anteroom(sim_route("--load-time", "1s", "--error-rate", "1"))
    stream = client(proxy).chat.completions.create(**ask(stream=True))
    with pytest.raises(openai.APIError) as error:
        list(stream)
    assert "injected by --error-rate" in error.value.message


def test_server_that_resets_every_request(anteroom, client):
    proxy = anteroom(sim_route("--reset-before-head", "1"))
    with pytest.raises(openai.InternalServerError) as error:
        client(proxy).chat.completions.create(**ask())
    assert code_of(error) == (502, "upstream_error")
    assert error.value.response.headers["x-should-retry"] == "false"
    # The proxy has sent it twice, and the SDK has not retried.
    assert proxy.stop() == {"upstream_error": 1}


def test_server_that_breaks_its_answer_off(anteroom, client):
    """The head has been sent, so the proxy can only abort the response as well."""
    proxy = anteroom(sim_route("--reset-mid-stream", "1"))
    proxy_client = client(proxy, max_retries=0)
    httpx2.post(f"{proxy.url}/tokenize", json={"model": "tiny", "prompt": "wake up"}, timeout=None)
    with pytest.raises((openai.APIConnectionError, httpx2.RemoteProtocolError)):
        list(proxy_client.chat.completions.create(**ask(stream=True)))
    assert proxy.stop() == {"completed": 1, "upstream_error": 1}


def test_server_that_breaks_its_answer_off_after_the_early_200(anteroom, client):
    proxy = anteroom(sim_route("--load-time", "1s", "--reset-mid-stream", "1"))
    stream = client(proxy).chat.completions.create(**ask(stream=True))
    with pytest.raises(openai.APIError) as error:
        list(stream)
    assert error.value.code == "upstream_error"
    assert proxy.stop() == {"upstream_error": 1}


# Timeouts of the SDK.


def test_answered_just_before_the_client_gives_up(anteroom, client):
    """The SDK announces a timeout of 4 s; the proxy responds before that."""
    proxy = anteroom(sim_route(*HANG, keepalive={"mode": "off"}))
    for stream in (True, False):
        with pytest.raises(openai.APIStatusError) as error:
            client(proxy, max_retries=0, timeout=4).chat.completions.create(**ask(stream=stream))
        assert code_of(error) == (504, "cold_start_timeout"), "no time-out of the client itself"
        assert "the client's own time-out" in error.value.message
    assert proxy.stop() == {"cold_start_timeout": 2}


def test_comments_do_not_help_an_answer_that_is_no_stream(anteroom, client):
    proxy = anteroom(sim_route(*HANG))
    with pytest.raises(openai.APIStatusError) as error:
        client(proxy, max_retries=0, timeout=4).chat.completions.create(**ask())
    assert code_of(error) == (504, "cold_start_timeout")


@pytest.mark.parametrize("keepalive", [{}, {"mode": "comment", "after": "100ms", "interval": "500ms"}])
def test_kept_alive_beyond_its_time_out(anteroom, client, keepalive):
    """Loading takes longer than the client's timeout. By default the first heartbeat is sent after 20 s; a
    client that announces a shorter timeout gets it earlier."""
    proxy = anteroom(sim_route("--load-time", "6s", keepalive=keepalive))
    with client(proxy, max_retries=0, timeout=4).chat.completions.create(**ask(stream=True)) as stream:
        assert len(text_of(stream).split()) == 16


def test_kept_alive_beyond_its_time_out_without_a_stream(anteroom, client):
    proxy = anteroom(sim_route("--load-time", "6s", keepalive={"mode": "whitespace"}))
    assert whole(client(proxy, max_retries=0, timeout=4).chat.completions.create(**ask()))


# Shutdown.


def test_held_requests_when_we_are_told_to_stop(anteroom, client):
    proxy = anteroom(sim_route(*HANG, keepalive={"mode": "off"}), drainTimeout="1s")
    errors = []

    def one():
        try:
            client(proxy, max_retries=0).chat.completions.create(**ask())
        except openai.APIError as error:
            errors.append(error)

    waiting = threading.Thread(target=one)
    waiting.start()
    proxy.wait_until_held(1)
    proxy.signal()
    waiting.join()
    (error,) = errors
    assert (error.status_code, error.code) == (503, "draining")
    assert error.response.headers["x-should-retry"] == "true" and error.response.headers["retry-after"] == "1"
    assert proxy.settle() == {"draining": 1}


def test_stream_under_way_when_we_are_told_to_stop(anteroom, client):
    proxy = anteroom(sim_route("--tokens", "50", "--inter-token-time", "20ms"))
    stream = client(proxy).chat.completions.create(**ask(stream=True))
    chunks = [next(iter(stream))]
    proxy.signal()
    chunks += stream
    assert len(text_of(chunks).split()) == 50
    assert proxy.settle() == {"completed": 1}


def test_target_that_comes_up_while_we_drain(anteroom, client):
    proxy = anteroom(sim_route("--load-time", "1s"))
    stream = client(proxy).chat.completions.create(**ask(stream=True))
    proxy.signal()
    assert len(text_of(stream).split()) == 16
    assert proxy.settle() == {"completed": 1}

