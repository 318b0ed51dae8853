"""Requests to a model that is not running, through the official SDK: held, and served after the start."""

import asyncio

import httpx2
import openai
import pytest

from harness import eventually, sim_route
from talk import ask, text_of, whole

LOAD = ("--load-time", "1500ms")


@pytest.fixture
def truth(sim):
    """Returns the response of a model server without a proxy."""

    def direct(*flags, **request):
        server = sim(*flags)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answer = whole(client.chat.completions.create(**ask(**request)))
        server.stop()
        return answer

    return direct


def test_stream(anteroom, client, truth):
    proxy = anteroom(sim_route(*LOAD))
    request = ask(stream=True, stream_options={"include_usage": True})
    with client(proxy).chat.completions.create(**request) as stream:
        chunks = list(stream)
    assert text_of(chunks) == truth()
    # The comments are followed by a chunk without content, with the same id.
    assert chunks[0].choices[0].delta.content == "" and chunks[0].choices[0].delta.role is None
    assert chunks[1].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 16
    assert proxy.starts() == 1
    (cold_start,) = proxy.cold_starts()
    assert cold_start["outcome"] == "completed" and cold_start["released"] == 1
    assert proxy.stop() == {"completed": 1}


def test_whole_answer_and_what_its_headers_say(anteroom, client, truth):
    proxy = anteroom(sim_route(*LOAD))
    raw = client(proxy).chat.completions.with_raw_response
    cold = raw.create(**ask())
    assert whole(cold.parse()) == truth()
    assert cold.headers["x-anteroom-cold-start"] == "true"
    assert cold.headers["x-keda-http-cold-start"] == "true"
    assert "hold;dur=" in cold.headers["server-timing"] and "upstream;dur=" in cold.headers["server-timing"]
    assert cold.headers["x-request-id"]
    # A warm response has no header about waiting.
    warm = raw.create(**ask())
    assert whole(warm.parse()) == whole(cold.parse())
    assert not {"x-anteroom-cold-start", "x-keda-http-cold-start", "server-timing"} & set(warm.headers)
    assert proxy.starts() == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_async(anteroom, async_client, truth, stream):
    proxy = anteroom(sim_route(*LOAD))
    answer = await async_client(proxy).chat.completions.create(**ask(stream=stream))
    text = text_of([chunk async for chunk in answer]) if stream else whole(answer)
    assert text == truth()


def test_heartbeats_are_comments_and_come_before_the_first_event(anteroom):
    proxy = anteroom(sim_route(*LOAD))
    with httpx2.Client(timeout=None) as raw:
        with raw.stream("POST", f"{proxy.base_url}/chat/completions", json=ask(stream=True)) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = list(answer.iter_lines())
    comments = [line for line in lines if line.startswith(":")]
    assert comments and lines[: len(comments)] == comments, "comments, and then events without any"
    assert lines[len(comments)].startswith("data: "), "no blank line in between: that would be an empty event"
    *beats, timing = comments
    assert timing.startswith(": server-timing: hold;dur=") and " load;dur=" in timing and " upstream;dur=" in timing
    for comment in beats:
        assert comment.startswith(": cold start phase=") and " waited=" in comment and " position=1" in comment


def test_estimate_in_the_heartbeat_once_there_is_history(anteroom, client):
    route = sim_route(*LOAD, process={"idleTimeout": "100ms"})
    proxy = anteroom(route)
    client(proxy).chat.completions.create(**ask())
    proxy.wait_until("idle")
    with httpx2.stream("POST", f"{proxy.base_url}/chat/completions", json=ask(stream=True), timeout=None) as answer:
        comments = [line for line in answer.iter_lines() if line.startswith(":")]
    assert any(" left=" in comment for comment in comments), comments
    assert proxy.starts() == 2


def test_chunk_mode(anteroom, client, truth):
    proxy = anteroom(sim_route(*LOAD, keepalive={"mode": "chunk", "after": "100ms", "interval": "100ms"}))
    with client(proxy).chat.completions.create(**ask(stream=True)) as stream:
        chunks = list(stream)
    role = next(index for index, chunk in enumerate(chunks) if chunk.choices[0].delta.role)
    assert role > 1, "chunks with no content came before the answer"
    for chunk in chunks[:role]:
        assert chunk.model == "tiny" and chunk.object == "chat.completion.chunk"
        assert chunk.choices[0].delta.content == "" and chunk.choices[0].finish_reason is None
    assert text_of(chunks) == truth()


def test_chunk_mode_for_completions(anteroom, client):
    proxy = anteroom(sim_route(*LOAD, keepalive={"mode": "chunk", "after": "100ms", "interval": "100ms"}))
    with client(proxy).completions.create(model="tiny", prompt="Who waits?", stream=True) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert chunks[0].choices[0].text == "" and chunks[0].object == "text_completion"
    assert text == client(proxy).completions.create(model="tiny", prompt="Who waits?").choices[0].text


def test_chunk_mode_for_an_api_without_such_chunks_sends_comments(anteroom, client):
    proxy = anteroom(sim_route(*LOAD, keepalive={"mode": "chunk", "after": "100ms", "interval": "100ms"}))
    # The helper raises at any event before `response.created`; `create` passes on all events.
    with client(proxy).responses.stream(model="tiny", input="Who waits?") as stream:
        events = list(stream)
    assert events[0].type == "response.created" and events[-1].type == "response.completed"


def test_whitespace_mode(anteroom, client, truth):
    proxy = anteroom(sim_route(*LOAD, keepalive={"mode": "whitespace", "after": "100ms", "interval": "100ms"}))
    answer = client(proxy).chat.completions.with_raw_response.create(**ask())
    body = answer.http_response.content
    assert body.startswith(b"\n") and body.lstrip().startswith(b"{")
    assert answer.http_response.headers["content-type"] == "application/json"
    assert whole(answer.parse()) == truth()
    # A stream of the same route gets comments.
    with client(proxy).chat.completions.create(**ask(stream=True)) as stream:
        assert text_of(stream) == truth()


def test_off_says_nothing_until_the_answer(anteroom):
    proxy = anteroom(sim_route(*LOAD, keepalive={"mode": "off"}))
    answer = httpx2.post(f"{proxy.base_url}/chat/completions", json=ask(stream=True), timeout=None)
    assert not [line for line in answer.text.splitlines() if line.startswith(":")]
    assert answer.headers["x-anteroom-cold-start"] == "true", "the head was not sent early"


async def test_fifty_at_once(anteroom, async_client):
    proxy = anteroom(sim_route(*LOAD, "--inter-token-time", "5ms", concurrency={"max": 16, "rampStart": 4}))
    client = async_client(proxy)

    async def one(number):
        prompt = [{"role": "user", "content": f"Who waits at door {number}?"}]
        if number % 2:
            return whole(await client.chat.completions.create(**ask(prompt)))
        stream = await client.chat.completions.create(**ask(prompt, stream=True))
        return text_of([chunk async for chunk in stream])

    answers = await asyncio.gather(*map(one, range(50)))
    assert all(len(answer.split()) == 16 for answer in answers)
    # Each client got the response to its own prompt: now that the model is warm, the same prompts get the same
    # responses.
    assert answers == await asyncio.gather(*map(one, range(50)))
    assert proxy.starts() == 1
    (cold_start,) = proxy.cold_starts()
    assert (cold_start["held_peak"], cold_start["released"], cold_start["failed"]) == (50, 50, 0)
    ended = {"outcome": "completed", "code": "200"}
    eventually(lambda: proxy.count("anteroom_requests_total", **ended, cold_start="true") == 50)
    assert proxy.stop() == {"completed": 100}


async def test_fifty_at_once_over_one_http2_connection(anteroom, async_client):
    proxy = anteroom(sim_route(*LOAD))
    http = openai.DefaultAsyncHttpx2Client(http1=False, http2=True)
    client = async_client(proxy, http_client=http)

    async def one():
        stream = await client.chat.completions.create(**ask(stream=True))
        return text_of([chunk async for chunk in stream])

    answers = await asyncio.gather(*(one() for _ in range(50)))
    assert len(set(answers)) == 1 and len(answers[0].split()) == 16
    assert proxy.starts() == 1


def test_stopped_when_idle_and_started_by_the_next_request(anteroom, client):
    proxy = anteroom(sim_route("--load-time", "200ms", process={"idleTimeout": "300ms"}))
    first = whole(client(proxy).chat.completions.create(**ask()))
    proxy.wait_until("idle")
    assert proxy.family() == {}
    assert whole(client(proxy).chat.completions.create(**ask())) == first
    assert proxy.starts() == 2
    assert [cold_start["outcome"] for cold_start in proxy.cold_starts()] == ["completed"] * 2


async def test_client_that_hangs_up_leaves_the_queue(anteroom, async_client):
    proxy = anteroom(sim_route("--load-time", "1h", "--hang-load"))
    client = async_client(proxy)
    for request in (ask(stream=True), ask()):
        waiting = asyncio.create_task(client.chat.completions.create(**request))
        if request.get("stream"):
            # The client has its 200, and now waits for events.
            waiting = asyncio.create_task(first_event(await waiting))
        await asyncio.to_thread(proxy.wait_until_held, 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.to_thread(proxy.wait_until_held, 0)
    assert proxy.stop() == {"client_gone": 2}


async def first_event(stream):
    async with stream:
        return await anext(aiter(stream))


async def test_client_that_hangs_up_in_the_middle_of_a_stream_stops_the_generation(anteroom, async_client):
    proxy = anteroom(sim_route("--tokens", "100000", "--inter-token-time", "20ms"))
    stream = await async_client(proxy).chat.completions.create(**ask(stream=True))
    await anext(aiter(stream))
    address = proxy.route()["endpoints"][0]["address"]
    await stream.close()
    await asyncio.to_thread(proxy.wait_for_route, lambda route: route["in_flight"] == 0)

    async def running():
        async with httpx2.AsyncClient() as raw:
            metrics = (await raw.get(f"http://{address}/metrics")).text
        samples = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running")]
        return float(samples[0].split()[-1])

    while await running() > 0:
        await asyncio.sleep(0.02)
    assert proxy.stop() == {"client_gone": 1}


