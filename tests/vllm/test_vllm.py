"""A real vLLM as the target: held at zero, started, streamed, stopped when idle, started again.

The configuration is the one of docs/worked-example.md, as it stands there. `ANTEROOM_VLLM_DIR` is the folder that
`install` filled; `ANTEROOM_VLLM_REPORT` may name a file for the cold starts as `GET /api/v1/cold-starts` tells them,
and `ANTEROOM_VLLM_STREAM` one for a stream as it came.
"""

import json
import os
import re
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest

from harness import BINARY, ROOT, Anteroom, eventually

FOLDER = Path(os.environ["ANTEROOM_VLLM_DIR"]).resolve()
EXAMPLE = ROOT / "docs/worked-example.yaml"
ENV = {
    "ANTEROOM_VLLM_DIR": str(FOLDER),
    "PATH": f"{Path(__file__).parent / 'bin'}:{os.environ['PATH']}",
}
# On two cores that others use as well, a start takes half a minute to two.
STARTING = 600

ASK = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Who waits at the door?"}],
    "max_tokens": 32,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}
RAW = {**ASK, **ASK["extra_body"]}
del RAW["extra_body"]


@pytest.fixture
def start(tmp_path):
    """Starts proxies where the model is, with what `vllm` is on their PATH."""
    started = []

    def start(config=EXAMPLE):
        folder = tmp_path / f"proxy-{len(started)}"
        folder.mkdir()
        proxy = Anteroom(config, folder, cwd=FOLDER, env=ENV)
        started.append(proxy)
        return proxy

    try:
        yield start
        for proxy in started:
            proxy.stop()
    finally:
        for proxy in started:
            if proxy.running:
                proxy.kill()
            print(proxy.log())


def test_the_example_is_valid():
    done = subprocess.run(
        [BINARY, "check", "--config", EXAMPLE], cwd=FOLDER, env={**os.environ, **ENV}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "ok: 1 route\n" in done.stdout, "and nothing to warn of"


def text_of(stream):
    return "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)


def essence(events):
    """What two streams of the same answer have in common: not the ids, nor how vLLM spreads the text over chunks."""
    data = [line.removeprefix("data: ") for line in events.splitlines() if line and not line.startswith(":")]
    assert data.pop() == "[DONE]"
    chunks = [json.loads(each) for each in data]
    # Behind comments there is one with no content, of the same completion.
    if chunks[0]["choices"][0]["delta"] == {"content": ""}:
        assert chunks.pop(0)["id"] == chunks[0]["id"]
    choices = [chunk["choices"][0] for chunk in chunks]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    keys = [{key: sorted(each[key]) if key == "delta" else None for key in each} for each in (choices[0], choices[-1])]
    return text, keys, choices[-1]["finish_reason"], len({chunk["id"] for chunk in chunks})


def test_from_zero_and_back_and_again(start):
    proxy = start()
    client = openai.OpenAI(base_url=proxy.base_url, api_key="none", max_retries=0)

    # At zero: the model is known, and nothing runs.
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**ASK, "model": "unheard-of"})
    assert proxy.family() == {} and proxy.route()["state"] == "idle"

    # Four requests of four kinds are held, and start it once.
    def streamed():
        with client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}) as stream:
            chunks = list(stream)
        assert chunks[-1].usage.completion_tokens == 32
        return text_of(chunks)

    def whole():
        return client.chat.completions.create(**ASK).choices[0].message.content

    def raw():
        return httpx2.post(f"{proxy.base_url}/chat/completions", json={**RAW, "stream": True}, timeout=STARTING)

    def response():
        with client.responses.create(model="tiny", input="Who waits?", max_output_tokens=16, stream=True) as stream:
            return [event.type for event in stream]

    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(each) for each in (streamed, whole, raw, response)]
        proxy.wait_until_held(4)
        assert proxy.route()["state"] == "starting" and proxy.family()
        text, same, stream, events = (each.result(STARTING) for each in waiting)
    assert text == same and text
    assert events[0] == "response.created" and events[-1] in ("response.completed", "response.incomplete")
    assert proxy.starts() == 1

    # The raw one was kept informed, and then got what vLLM says.
    lines = stream.text.splitlines()
    comments = [line for line in lines if line.startswith(":")]
    assert comments and lines[: len(comments)] == comments
    *beats, timing = comments
    assert all("phase=" in line and "position=" in line for line in beats)
    assert timing.startswith(": server-timing: hold;dur=") and " load;dur=" in timing
    (endpoint,) = proxy.route()["endpoints"]
    assert endpoint["ready"] and proxy.route()["state"] == "ready"
    url = f"http://{endpoint['address']}/v1/chat/completions"
    direct = httpx2.post(url, json={**RAW, "stream": True}, timeout=None)
    assert essence(stream.text) == essence(direct.text)
    assert stream.headers["content-type"] == direct.headers["content-type"]
    keep("ANTEROOM_VLLM_STREAM", stream.text)

    # Warm: what vLLM refuses is vLLM's word, what does not exist is ours.
    assert streamed() == text
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{**ASK, "max_tokens": 5000})
    assert "1024" in error.value.message
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(**{**ASK, "model": "unheard-of"})
    assert error.value.code == "model_not_found"
    counted = httpx2.post(f"{proxy.url}/tokenize", json={"model": "tiny", "prompt": "door"}).json()
    assert counted["count"] >= 4

    # A client that hangs up stops the generation.
    def running():
        metrics = httpx2.get(f"http://{endpoint['address']}/metrics").text
        (sample,) = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", metrics, re.M)
        return float(sample)

    long = client.chat.completions.create(**{**ASK, "max_tokens": 900}, stream=True)
    assert next(iter(long))
    long.close()
    proxy.wait_for_route(lambda route: route["in_flight"] == 0)
    eventually(lambda: running() == 0)

    # Idle: it is stopped, and all that it had started is gone. The model is still known.
    proxy.wait_until("idle")
    assert proxy.family() == {}
    assert [model.id for model in client.models.list()] == ["tiny"]

    # The next request starts it again, and the model says the same.
    assert streamed() == text
    assert proxy.starts() == 2

    cold_starts = proxy.cold_starts()
    assert [each["outcome"] for each in cold_starts] == ["completed", "completed"]
    assert [each["held_peak"] for each in cold_starts] == [4, 1]
    for each in cold_starts:
        phases = {phase["name"]: phase for phase in each["phases"]}
        assert list(phases)[:5] == ["signal", "start", "load", "dispatch", "first_byte"]
        assert abs(sum(phase["duration_ms"] for phase in each["phases"]) - each["total_ms"]) < 1
        assert phases["load"]["duration_ms"] == max(phase["duration_ms"] for phase in each["phases"])
        # Random weights, so that nothing is downloaded; --enforce-eager, so that nothing is compiled.
        parts = phases["load"]["parts"]
        assert [part["name"] for part in parts] == ["engine_start", "weights", "warmup", "server_start"]
        assert 0.9 < sum(part["duration_ms"] for part in parts) / phases["load"]["duration_ms"] <= 1
    # Of the four, the one that is not streamed may have been first; the second time there was one, streamed.
    assert [phase["name"] for phase in cold_starts[1]["phases"][5:]] == ["first_token"]
    keep("ANTEROOM_VLLM_REPORT", json.dumps({"cold_starts": cold_starts}, indent=2))

    # A stream under way when we are told to stop is finished, and then vLLM is stopped too.
    last = client.chat.completions.create(**{**ASK, "max_tokens": 300}, stream=True)
    events = iter(last)
    text = text_of([next(events)])
    proxy.signal()
    text += text_of(events)
    assert text
    ended = proxy.settle()
    assert ended["client_gone"] == 1 and set(ended) == {"client_gone", "completed"}


# The tokens of a to z: tiny_model.py has three special tokens, then the visible letters from `!` on. Without this, random
# weights answer random words with bytes that are no text, and a token that is lost would not be missed.
LETTERS = [3 + ord(letter) - ord("!") for letter in "abcdefghijklmnopqrstuvwxyz"]


def bench(url, folder, backend):
    """Runs `vllm bench serve` against this, one request, and gives what it measured."""
    path = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}[backend]
    options = {
        "backend": backend, "base-url": url, "endpoint": path, "model": FOLDER / "tiny", "served-model-name": "tiny",
        "dataset-name": "random", "random-input-len": 24, "random-output-len": 32, "num-prompts": 1, "seed": 7,
        "temperature": 0, "ready-check-timeout-sec": 0, "result-dir": folder, "result-filename": f"{backend}.json",
        "extra-body": json.dumps({"allowed_token_ids": LETTERS}),
    }  # fmt: skip
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    command = ["vllm", "bench", "serve", *flags, "--ignore-eos", "--save-result", "--save-detailed", "--disable-tqdm"]
    env = {**os.environ, **ENV, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_TARGET_DEVICE": "cpu"}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=STARTING)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / f"{backend}.json").read_text())


@pytest.mark.parametrize("backend", ["openai-chat", "openai"])
def test_vllm_bench_measures_a_cold_start_rightly(start, tmp_path, backend):
    """Its parser takes comments together with the event after them for one comment: it has to lose nothing by that."""
    config = tmp_path / "lasting.yaml"
    text = EXAMPLE.read_text()
    assert "idleTimeout: 15s" in text
    # Longer than the second run of the instrument takes to begin.
    config.write_text(text.replace("idleTimeout: 15s", "idleTimeout: 10m"))
    proxy = start(config)
    cold = bench(proxy.url, tmp_path, backend)
    (endpoint,) = proxy.route()["endpoints"]
    direct = bench(f"http://{endpoint['address']}", tmp_path, backend)
    assert cold["errors"] == direct["errors"] == [""]
    assert cold["generated_texts"] == direct["generated_texts"] and cold["generated_texts"] != [""]
    assert cold["output_lens"] == direct["output_lens"] == [32]
    (record,) = proxy.cold_starts()
    # Heartbeats came, and none of them is taken for the token.
    assert record["total_ms"] > 5000 and record["phases"][-1]["name"] == "first_token"
    assert cold["ttfts"][0] * 1000 == pytest.approx(record["total_ms"], rel=0.05)


def test_a_start_that_fails_says_why(start, tmp_path):
    """What vLLM prints last is that the cause stands above; clients that may read its output read the cause."""
    config = tmp_path / "wrong.yaml"
    text = EXAMPLE.read_text()
    assert "--max-model-len=1024" in text
    text = text.replace("  - name: tiny\n", "  - name: tiny\n    failure: { detail: full }\n")
    config.write_text(text.replace("--max-model-len=1024", "--max-model-len=999999"))
    proxy = start(config)
    with openai.OpenAI(base_url=proxy.base_url, api_key="none", max_retries=0) as client:
        with pytest.raises(openai.APIError) as error:
            list(client.chat.completions.create(**ASK, stream=True))
    assert error.value.code == "cold_start_failed"
    assert "max_model_len" in error.value.message and "999999" in error.value.message
    assert proxy.family() == {}
    assert proxy.stop() == {"cold_start_failed": 1}


@pytest.mark.parametrize("level", [1, 2])
def test_asleep_and_awake_again(start, tmp_path, level):
    """vLLM's own routes of sleep mode. On a CPU it refuses --enable-sleep-mode; without it, it pauses and frees nothing."""
    config = tmp_path / "sleep.yaml"
    text = EXAMPLE.read_text()
    for found, more in (
        ("idleTimeout: 15s", f"idleTimeout: 1s\n        whenIdle: sleep\n        sleepLevel: {level}"),
        ('VLLM_NO_USAGE_STATS: "1"', 'VLLM_NO_USAGE_STATS: "1"\n          VLLM_SERVER_DEV_MODE: "1"'),
    ):
        assert found in text
        text = text.replace(found, more)
    if level == 2:
        # There must be weights to read again.
        text = text.replace("          - --load-format=dummy\n", "").replace("./tiny\n", f"{with_weights(tmp_path)}\n")
    config.write_text(text)
    proxy = start(config)
    client = openai.OpenAI(base_url=proxy.base_url, api_key="none", max_retries=0)

    def says():
        return client.chat.completions.create(**ASK).choices[0].message.content

    before = says()
    for _ in range(2):
        proxy.wait_until("sleeping")
        (endpoint,) = proxy.route()["endpoints"]
        asleep = httpx2.get(f"http://{endpoint['address']}/is_sleeping").json()
        assert asleep == {"is_sleeping": True} and not endpoint["ready"]
        assert says() == before
    assert proxy.starts() == 1
    records = proxy.cold_starts()
    assert [each["kind"] for each in records] == ["cold_start", "wake", "wake"]
    for wake in records[1:]:
        assert wake["outcome"] == "completed" and wake["total_ms"] < records[0]["total_ms"]
        assert [phase["name"] for phase in wake["phases"]] == ["signal", "load", "dispatch", "first_byte"]
    proxy.stop()
    assert proxy.family() == {}


def with_weights(folder):
    """The tiny model with random weights that are written down."""
    model = folder / "weights"
    script = "import sys\nfrom transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n" \
        "source, folder = sys.argv[1:]\n" \
        "AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).bfloat16().save_pretrained(folder)\n" \
        "AutoTokenizer.from_pretrained(source).save_pretrained(folder)\n"
    subprocess.run([FOLDER / "venv/bin/python", "-c", script, FOLDER / "tiny", model], check=True, capture_output=True)
    return model


def test_nothing_is_left_when_the_proxy_is_killed_while_it_starts(start, tmp_path):
    """Our SIGKILL as well: the guardian ends vLLM and what vLLM has started, which while it starts is deaf to SIGTERM."""
    config = tmp_path / "brief.yaml"
    text = EXAMPLE.read_text()
    assert "idleTimeout: 15s" in text
    config.write_text(text.replace("idleTimeout: 15s", "stopTimeout: 2s"))
    proxy = start(config)

    def ask():
        try:
            httpx2.post(f"{proxy.base_url}/chat/completions", json=RAW, timeout=STARTING)
        except httpx2.HTTPError:
            pass

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: any("multiprocessing" in command or "EngineCore" in command for command in proxy.family().values()))
    proxy.kill()
    asking.join()
    eventually(lambda: proxy.family() == {})
    proxy.stopped = {}


def keep(variable, text):
    if path := os.environ.get(variable):
        Path(path).write_text(text)
