"""Starts `anteroom serve` and `anteroom sim`, waits for their log messages, and checks that they leave
nothing behind.

No test relies on fixed sleeps: every wait is for an event, and `PATIENCE` (in seconds) only limits the
duration of a hanging test.
"""

import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.request
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
BINARY = os.environ.get("ANTEROOM_BIN") or str(ROOT / "target/debug/anteroom")
PATIENCE = float(os.environ.get("ANTEROOM_TEST_PATIENCE", "120"))

# Environment variable of every process that a test starts, which their descendants inherit.
MARK = "ANTEROOM_TEST_RUN"


class Process:
    """A process with its log, read line by line."""

    def __init__(self, command, cwd=None, env=None):
        self.mark = uuid.uuid4().hex
        self.lines = []
        self._news = threading.Condition()
        self._popen = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(env or {}), MARK: self.mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self):
        return self._popen.pid

    def _read(self):
        for line in self._popen.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def wait_for_line(self, found, timeout=PATIENCE):
        """Returns the first `found(line)` that is not None, for all lines so far and to come."""
        deadline = time.monotonic() + timeout
        seen = 0
        with self._news:
            while True:
                for line in self.lines[seen:]:
                    if (result := found(line)) is not None:
                        return result
                seen = len(self.lines)
                if not self._reader.is_alive():
                    raise AssertionError(f"it ended without saying so; its log:\n{self.log()}")
                if not self._news.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    raise AssertionError(f"it did not say so in {timeout} s; its log:\n{self.log()}")

    def log(self):
        return "\n".join(self.lines)

    def signal(self, what=signal.SIGTERM):
        self._popen.send_signal(what)

    def wait(self, timeout=PATIENCE):
        """Waits for the exit, and returns the exit code."""
        try:
            code = self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it did not stop in {timeout} s; its log:\n{self.log()}") from None
        self._reader.join(PATIENCE)
        return code

    def kill(self):
        self._popen.kill()
        self._popen.wait()
        self._reader.join(PATIENCE)

    @property
    def running(self):
        return self._popen.poll() is None

    def family(self):
        """Returns the descendants that are still running: `{pid: command line}`."""
        mark = f"{MARK}={self.mark}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.pid:
                continue
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(entry.name)] = command.strip()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found


class Sim(Process):
    """A stand-alone `anteroom sim`."""

    def __init__(self, *flags):
        super().__init__([BINARY, "sim", "--port", "0", *flags])
        address = re.compile(r"Starting vLLM server on http://(\S+)")
        self.url = "http://" + self.wait_for_line(lambda line: (m := address.search(line)) and m[1])
        self.wait_for_line(lambda line: "Application startup complete" in line or None)

    def stop(self):
        self.signal()
        assert self.wait() == 0, self.log()


class Anteroom(Process):
    """`anteroom serve` with this configuration (or this file), on free ports."""

    def __init__(self, config, folder, **options):
        if isinstance(config, dict):
            self.path = Path(folder) / "anteroom.yaml"
            self.write(config)
        else:
            self.path = config
        free = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--drain-delay", "0s", "--log-format", "json")
        super().__init__([BINARY, "serve", "--config", str(self.path), *free], **options)
        said = self.wait_for_event("listening")
        self.url = f"http://{said['address']}"
        self.admin = f"http://{said['admin']}"
        self.stopped = None

    def write(self, config):
        """Writes the configuration as JSON, which is valid YAML."""
        self.path.write_text(json.dumps(config, indent=2))

    @property
    def base_url(self):
        return f"{self.url}/v1"

    def events(self, message):
        """Returns the events logged with this message so far."""
        return [event for line in self.lines if (event := parse_event(line, message))]

    def wait_for_event(self, message, timeout=PATIENCE):
        return self.wait_for_line(lambda line: parse_event(line, message), timeout)

    def starts(self):
        """Returns the number of model server starts."""
        return len(self.events("starting"))

    def get(self, path):
        """Returns JSON from the admin listener."""
        with urllib.request.urlopen(self.admin + path, timeout=PATIENCE) as response:
            return json.load(response)

    def metrics(self, name):
        """Returns the samples of a metric: `[(labels, value)]`."""
        with urllib.request.urlopen(self.admin + "/metrics", timeout=PATIENCE) as response:
            text = response.read().decode()
        sample = re.compile(rf"{re.escape(name)}(?:\{{(.*)\}})? (\S+)")
        found = (sample.fullmatch(line) for line in text.splitlines())
        label = re.compile(r'(\w+)="([^"]*)"')
        return [(dict(label.findall(m[1] or "")), float(m[2])) for m in found if m]

    def count(self, name, **labels):
        """Returns the sum of the samples with these labels."""
        return sum(value for found, value in self.metrics(name) if labels.items() <= found.items())

    def route(self, name=None):
        routes = self.get("/api/v1/routes")["routes"]
        return next(route for route in routes if name is None or route["name"] == name)

    def cold_starts(self):
        """Returns the finished cold starts, oldest first."""
        return self.get("/api/v1/cold-starts?limit=100")["cold_starts"][::-1]

    def wait_for_route(self, fits, name=None, timeout=PATIENCE):
        """Polls the route until it fits, and returns it."""
        return eventually(lambda: (route := self.route(name)) and fits(route) and route, timeout)

    def wait_until_held(self, count):
        return self.wait_for_route(lambda route: route["held"] == count)

    def wait_until(self, state):
        return self.wait_for_route(lambda route: route["state"] == state)

    def stop(self, sig=signal.SIGTERM):
        """Stops the proxy like an operator, and checks its account and that nothing is left behind. Returns
        the number of requests by outcome."""
        if self.stopped is not None:
            return self.stopped
        if self.running:
            self.signal(sig)
        return self.settle()

    def settle(self):
        """Waits for the end of a proxy that was told to stop, and checks it."""
        code = self.wait()
        log = self.log()
        assert code == 0, f"exit code {code}; its log:\n{log}"
        assert "panicked" not in log, log
        account = parse_event(self.lines[-1], "stopped")
        assert account, f"the last line of the log is no account:\n{log}"
        outcomes = {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", account["outcomes"])}
        assert (account["held"], account["in_flight"]) == (0, 0), account
        assert account["admitted"] == sum(outcomes.values()), account
        assert self.family() == {}, f"it left processes behind; its log:\n{log}"
        self.stopped = {name: count for name, count in outcomes.items() if count}
        return self.stopped


def parse_event(line, message):
    """Returns the fields of a line of the JSON log, if it has this message."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and event.get("message") == message else None


def eventually(look, timeout=PATIENCE):
    """Returns the first truthy result of `look()`."""
    deadline = time.monotonic() + timeout
    while True:
        if found := look():
            return found
        assert time.monotonic() < deadline, f"it did not come to that in {timeout} s"
        time.sleep(0.02)


def sim_route(*flags, name="tiny", models=("tiny",), **policies):
    """Returns a route with `anteroom sim` as its target, and with early heartbeats."""
    process = {"command": [BINARY, "sim", "--port", "{port}", *flags], "idleTimeout": "1h", "stopTimeout": "10s"}
    process.update(policies.pop("process", {}))
    return {
        "name": name,
        "match": {"models": list(models)},
        "target": {"process": process},
        "readiness": {"interval": "50ms"},
        "keepalive": {"mode": "comment", "after": "100ms", "interval": "100ms"},
        **policies,
    }
