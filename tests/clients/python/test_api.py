"""The rest of the API, and that responses are passed on byte by byte."""

import asyncio
import base64
import io
import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import openai
import pytest

from harness import eventually, sim_route
from talk import PROMPT, ask, text_of, whole

LOAD = ("--load-time", "1s")
FLAGS = ("--seed", "7", "--tokens", "24", "--inter-token-time", "2ms")

STREAMS = {
    "chat": ("/v1/chat/completions", ask(stream=True, stream_options={"include_usage": True})),
    "completion": ("/v1/completions", {"model": "tiny", "prompt": "Who waits?", "stream": True}),
    "response": ("/v1/responses", {"model": "tiny", "input": "Who waits?", "stream": True}),
    "message": ("/v1/messages", {"model": "tiny", "messages": PROMPT, "max_tokens": 9, "stream": True}),
}


@pytest.fixture(params=STREAMS)
def exchange(request, sim):
    """A streaming request, and the bytes of a fresh model server's response."""
    path, body = STREAMS[request.param]
    server = sim(*FLAGS)
    direct = httpx2.post(server.url + path, json=body, timeout=None)
    server.stop()
    return path, body, direct


def test_bytes_of_a_warm_stream(anteroom, exchange):
    path, body, direct = exchange
    proxy = anteroom(sim_route(*FLAGS))
    # This wakes the server without a generation: the next request is still the server's first.
    httpx2.post(f"{proxy.url}/tokenize", json={"model": "tiny", "prompt": "wake up"}, timeout=None).raise_for_status()
    through = httpx2.post(proxy.url + path, json=body, timeout=None)
    assert through.content == direct.content
    assert through.headers["content-type"] == direct.headers["content-type"]


def test_bytes_of_a_stream_that_was_kept_alive(anteroom, exchange):
    path, body, direct = exchange
    proxy = anteroom(sim_route(*FLAGS, *LOAD))
    through = httpx2.post(proxy.url + path, json=body, timeout=None)
    lines = through.content.splitlines(keepends=True)
    assert any(line.startswith(b":") for line in lines)
    events = b"".join(line for line in lines if not line.startswith(b":"))
    # The comments are followed by an event without content, in APIs that have one.
    empty, rest = events.split(b"\n\n", 1)
    if path == "/v1/messages":
        assert empty == b'event: ping\ndata: {"type": "ping"}'
    elif path != "/v1/responses":
        choice = json.loads(empty.removeprefix(b"data: "))["choices"][0]
        assert choice["finish_reason"] is None and (choice.get("delta") == {"content": ""} or choice.get("text") == "")
    assert (events if path == "/v1/responses" else rest) == direct.content
    assert through.headers["content-type"] == direct.headers["content-type"]


def test_bytes_of_a_whole_answer_after_a_cold_start(anteroom, sim):
    server = sim(*FLAGS)
    direct = httpx2.post(f"{server.url}/v1/chat/completions", json=ask(), timeout=None)
    server.stop()
    proxy = anteroom(sim_route(*FLAGS, *LOAD))
    through = httpx2.post(f"{proxy.base_url}/chat/completions", json=ask(), timeout=None)
    assert through.content == direct.content
    ours = {"x-anteroom-cold-start", "x-keda-http-cold-start", "server-timing", "x-request-id"}
    assert set(through.headers) - ours == set(direct.headers) - ours | {"via", "keep-alive"} & set(through.headers)


def test_bytes_from_a_server_that_someone_else_starts(anteroom, exchange, sim):
    path, body, direct = exchange
    server = sim(*FLAGS)
    route = {**sim_route(), "target": {"url": server.url}}
    proxy = anteroom(route)
    assert httpx2.post(proxy.url + path, json=body, timeout=None).content == direct.content
    server.stop()


def test_models_are_listed_and_wake_nothing(anteroom, client):
    proxy = anteroom(
        sim_route(models=["tiny", "tiny-lora"]), sim_route(name="other", models=["org/other"])
    )
    api = client(proxy)
    assert {model.id for model in api.models.list()} == {"tiny", "tiny-lora", "org/other"}
    assert api.models.retrieve("tiny-lora").id == "tiny-lora"
    assert api.models.retrieve("org/other").id == "org/other"
    with pytest.raises(openai.NotFoundError) as error:
        api.models.retrieve("unheard-of")
    assert error.value.code == "model_not_found"
    for path in ("/health", "/v1/models", "/", "/favicon.ico", "/metrics"):
        httpx2.get(proxy.url + path)
    assert proxy.starts() == 0
    assert {route["state"] for route in proxy.get("/api/v1/routes")["routes"]} == {"idle"}


def test_each_model_has_its_own_server(anteroom, client):
    proxy = anteroom(
        sim_route("--seed", "1", name="one", models=["one"]), sim_route("--seed", "2", name="two", models=["two"])
    )
    api = client(proxy)
    one, two = (whole(api.chat.completions.create(**ask(model=model))) for model in ("one", "two"))
    assert one != two
    assert sorted(event["route"] for event in proxy.events("starting")) == ["one", "two"]


def test_embeddings(anteroom, client):
    proxy = anteroom(sim_route(*LOAD))
    cold = client(proxy).embeddings.create(model="tiny", input=["one", "two"])
    warm = client(proxy).embeddings.create(model="tiny", input="two", encoding_format="float")
    assert len(cold.data) == 2 and cold.data[1].embedding == warm.data[0].embedding


def test_responses(anteroom, client):
    route = sim_route(*LOAD, "--tokens", "100000", "--inter-token-time", "10ms", process={"idleTimeout": "300ms"})
    proxy = anteroom(route)
    api = client(proxy, max_retries=0)
    # The server is not idle while this stream lasts.
    with api.completions.create(model="tiny", prompt="Go on.", stream=True) as lasting:
        next(iter(lasting))
        with api.responses.create(model="tiny", input="Who waits?", max_output_tokens=16, stream=True) as stream:
            events = list(stream)
        assert events[0].type == "response.created"
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        response = events[-1].response
        assert response.output_text == text and len(text.split()) == 16
        # The server stores responses as long as it runs.
        assert api.responses.retrieve(response.id).output_text == text
    proxy.wait_until("idle")
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(response.id)
    assert proxy.starts() == 1, "and it is no reason to start one"


@pytest.mark.parametrize("model", ["tiny", "unheard-of"])
def test_audio_names_its_model_in_a_form(anteroom, client, model):
    proxy = anteroom(sim_route(*LOAD))
    recording = io.BytesIO(b"RIFF" + bytes(200_000))
    recording.name = "speech.wav"
    transcribe = client(proxy).audio.transcriptions.create
    if model == "tiny":
        assert transcribe(model=model, file=recording).text
    else:
        with pytest.raises(openai.NotFoundError) as error:
            transcribe(model=model, file=recording)
        assert error.value.code == "model_not_found" and proxy.starts() == 0


def test_large_prompt_is_held_whole(anteroom, client, sim):
    image = base64.b64encode(bytes(range(256)) * 12_000).decode()
    prompt = [
        {"role": "user", "content": [
            {"type": "text", "text": "Who waits at this door?"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        ]}
    ]
    proxy = anteroom(sim_route(*LOAD))
    answer = client(proxy).chat.completions.create(**ask(prompt))
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens == 5


def test_a_second_route_takes_what_the_first_does_not_name(anteroom, client):
    anything = sim_route("--seed", "2", name="anything")
    del anything["match"]
    proxy = anteroom(sim_route("--seed", "1"), anything)
    api = client(proxy)
    assert whole(api.chat.completions.create(**ask())) != whole(api.chat.completions.create(**ask(model="other")))


@pytest.fixture
def unfinished():
    """A model server that sends a whole stream, but ends it only when its client disconnects."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for data in (b'{"choices":[{"index":0,"delta":{"content":"here"}}]}', b"[DONE]"):
                event = b"data: " + data + b"\n\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            self.rfile.read(1)
            self.close_connection = True

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_client_that_hangs_up_after_the_last_event_has_its_answer(anteroom, client, unfinished):
    """The SDKs close a stream at `[DONE]`, without waiting for the end of the body."""
    proxy = anteroom({**sim_route(), "target": {"url": unfinished}})
    with client(proxy).chat.completions.create(**ask(stream=True)) as stream:
        assert text_of(stream) == "here"
    proxy.wait_for_route(lambda route: route["in_flight"] == 0)
    assert proxy.stop() == {"completed": 1}


# Other clients.


async def test_langchain_in_chunk_mode_outlasts_its_patience(anteroom):
    """langchain-openai limits the time between chunks, and comments do not count: it needs the chunk mode."""
    from langchain_openai import ChatOpenAI
    from langchain_openai.chat_models._client_utils import StreamChunkTimeoutError

    async def run(mode, patience):
        keepalive = {"mode": mode, "after": "100ms", "interval": "200ms"}
        proxy = anteroom(sim_route("--load-time", "4s", keepalive=keepalive))
        options = {"base_url": proxy.base_url, "api_key": "none", "model": "tiny", "max_retries": 0}
        chat = ChatOpenAI(**options, stream_chunk_timeout=patience)
        parts = [part.content async for part in chat.astream("Who waits?")]
        assert len("".join(parts).split()) == 16, parts

    await run("chunk", 2)
    await run("comment", 120)
    with pytest.raises(StreamChunkTimeoutError):
        await run("comment", 2)


async def test_langchain_whole_answer(anteroom):
    from langchain_openai import ChatOpenAI

    proxy = anteroom(sim_route(*LOAD))
    chat = ChatOpenAI(base_url=proxy.base_url, api_key="none", model="tiny")
    assert len((await chat.ainvoke("Who waits?")).content.split()) == 16


def curl(*arguments, body):
    command = ["curl", "--silent", "--show-error", "--no-buffer", "--verbose", "--data-binary", "@-", *arguments]
    done = subprocess.run(command, input=body, capture_output=True, check=True)
    return done.stdout, done.stderr.decode(errors="replace")


CHAT = b'{"model": "tiny", "stream": true, "messages": [{"role": "user", "content": "Who waits?"}]}'


@pytest.mark.parametrize("load", [LOAD, ()], ids=["cold", "at once"])
def test_curl_over_http2_with_prior_knowledge(anteroom, load):
    proxy = anteroom(sim_route(*load))
    out, said = curl("--http2-prior-knowledge", f"{proxy.base_url}/chat/completions", body=CHAT)
    assert "< HTTP/2 200" in said
    assert out.endswith(b"data: [DONE]\n\n")


def test_curl_upgrading_to_http2(anteroom):
    """curl sends an upgrade with its HTTP/1.1 request; a proxy may ignore it, but must respond."""
    proxy = anteroom(sim_route(*LOAD))
    out, said = curl("--http2", f"{proxy.base_url}/chat/completions", body=CHAT)
    assert "< HTTP/1.1 200" in said or "< HTTP/2 200" in said
    assert out.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("models", [["tiny"], []], ids=["by model", "by path alone"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_curl_that_waits_for_100_continue(anteroom, models, warm):
    proxy = anteroom(sim_route(*LOAD, models=models))
    url = f"{proxy.base_url}/chat/completions"
    if warm:
        curl(url, body=CHAT)
    body = CHAT.replace(b"Who waits?", b"wait " * 400_000)
    # curl waits for the 100 for an hour, longer than the test.
    out, said = curl("--expect100-timeout", "3600", "--header", "Expect: 100-continue", url, body=body)
    assert "< HTTP/1.1 100 Continue" in said and "< HTTP/1.1 200" in said
    assert out.endswith(b"data: [DONE]\n\n")


def test_curl_that_is_refused_instead_of_100_continue(anteroom):
    """Requests that can be rejected by their head are rejected before the body is sent."""
    proxy = anteroom(sim_route(*LOAD), limits={"maxBodyBytes": "64KiB"})
    body = CHAT.replace(b"Who waits?", b"wait " * 400_000)
    out, said = curl(
        "--expect100-timeout", "3600", "--header", "Expect: 100-continue", f"{proxy.base_url}/chat/completions",
        body=body,
    )
    assert "100 Continue" not in said and "< HTTP/1.1 413" in said
    assert b'"code":"request_too_large"' in out


async def test_a_reload_drops_nobody(anteroom, async_client):
    route = sim_route("--load-time", "2s", "--inter-token-time", "20ms")
    proxy = anteroom(route)
    client = async_client(proxy)
    streams = [asyncio.create_task(client.chat.completions.create(**ask(stream=True))) for _ in range(5)]
    await asyncio.to_thread(proxy.wait_until_held, 5)
    proxy.write({"routes": [{**route, "hold": {"maxRequests": 7}}, sim_route(name="new", models=["new"])]})
    await asyncio.to_thread(proxy.wait_for_event, "configuration reloaded")
    assert whole(await client.chat.completions.create(**ask(model="new")))
    for stream in streams:
        assert len(text_of([chunk async for chunk in await stream]).split()) == 16
    eventually(lambda: proxy.route("tiny")["limits"]["hold_max_requests"] == 7)
    assert [event["route"] for event in proxy.events("starting")].count("tiny") == 1
    assert proxy.stop() == {"completed": 6}
