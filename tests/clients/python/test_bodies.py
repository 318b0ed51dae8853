"""Bodies that are almost JSON: the fields for routing are parsed like in Python, or the request is
rejected."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pydantic
import pytest

from harness import ROOT

sys.path.append(str(ROOT / "tests/readings"))
import readings  # noqa: E402

FLAG = pydantic.TypeAdapter(bool | None)


class Echo(BaseHTTPRequestHandler):
    """A model server that responds with its name and the parsed body."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.answer({"server": self.server.name, "reads": readings.read(body)})

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def servers():
    started = {}
    for name in ("tiny", "big", "rest"):
        started[name] = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
        started[name].name = name
        threading.Thread(target=started[name].serve_forever, daemon=True).start()
    yield started
    for server in started.values():
        server.shutdown()
        server.server_close()


def test_bodies_go_where_python_says(anteroom, servers):
    def route(name, **match):
        return {"name": name, "match": match, "target": {"url": f"http://127.0.0.1:{servers[name].server_port}"}}

    proxy = anteroom(route("tiny", models=["tiny"]), route("big", models=["big"]), route("rest"))
    passed = refused = 0
    with httpx2.Client() as client:
        for body in readings.bodies(seed=20261129, count=2000):
            answer = client.post(f"{proxy.base_url}/chat/completions", content=body)
            expected = readings.read(body)
            if answer.status_code == 400:
                assert not isinstance(expected, dict) or expected["stream"] is None, body
                refused += 1
                continue
            assert answer.status_code == 200, (body, answer.text)
            echo = answer.json()
            assert echo["reads"] == expected, "the body came as it was sent"
            if isinstance(expected, dict):
                model = expected["model"]
                assert echo["server"] == (model if model in ("tiny", "big") else "rest"), body
                passed += 1
            else:
                # The server rejects it, too.
                assert expected == "no", body
    assert passed > 500 and refused > 300
    assert proxy.stop() == {"completed": 2000 - refused}


def test_flags_are_pydantics():
    for value in [True, False, None, 0, 1, 2, -1, 1.0, 0.5, "true", "True", "t", "Y", "yes", "on", "1", "0", "off", "maybe", "", [], {}]:
        try:
            expected = bool(FLAG.validate_python(value))
        except pydantic.ValidationError:
            expected = None
        assert readings.read_flag(value) == expected, value
