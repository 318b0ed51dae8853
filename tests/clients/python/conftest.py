import anthropic
import openai
import pytest

import harness


@pytest.fixture
def anteroom(tmp_path):
    """Starts proxies: `anteroom(route, ...)`. Each is stopped at the end of the test, and must then have
    accounted for every request and left no process behind."""
    started = []

    def start(*routes, **config):
        folder = tmp_path / f"proxy-{len(started)}"
        folder.mkdir()
        proxy = harness.Anteroom({"routes": list(routes), **config}, folder)
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
            for line in proxy.lines:
                print(line)


@pytest.fixture
def sim():
    """Starts model servers: `sim(flag, ...)`."""
    started = []

    def start(*flags):
        server = harness.Sim(*flags)
        started.append(server)
        return server

    try:
        yield start
    finally:
        for server in started:
            if server.running:
                server.kill()


@pytest.fixture
def client():
    """Creates clients with the SDK's defaults except for the given options: `client(proxy, ...)`."""
    made = []

    def make(proxy, **options):
        made.append(openai.OpenAI(base_url=proxy.base_url, api_key="none", **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def anthropic_client():
    """Creates clients of Anthropic's SDK: `anthropic_client(proxy, ...)`."""
    made = []

    def make(proxy, **options):
        made.append(anthropic.Anthropic(base_url=proxy.url, api_key="none", **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
async def async_client():
    made = []

    def make(proxy, **options):
        made.append(openai.AsyncOpenAI(base_url=proxy.base_url, api_key="none", **options))
        return made[-1]

    yield make
    for each in made:
        await each.close()
