"""How Python reads request bodies: what a model server built on it takes, and which model that names.

`python3 tests/readings/readings.py` writes `readings.json`, which the tests of `src/openai/scan.rs` read. The suite in
`tests/clients/python` compares further bodies through a running proxy.
"""

import json
import random
import sys
from pathlib import Path

TRUE = ("1", "on", "t", "true", "y", "yes")
FALSE = ("0", "off", "f", "false", "n", "no")

KEYS = [
    '"model"', '"model"', '"stream"', '"messages"', '"\\u006dodel"', '"mod\\u0065l"', '"Model"', '"model "',
    '"strea\\u006d"', '"\\ud800"', '"model\\ud800"', '"m\\u00f6del"', '"möde\\/l"', '""',
]  # fmt: skip
NAMES = ['"tiny"', '"t\\u0069ny"', '"big"', "null"]
FLAGS = ["true", "false", "0", "1", "2", "1.0", "1e0", '"true"', '"True"', '"1"', '"YES"', '"off"', '"maybe"', "null"]
VALUES = [
    '""', "-0", "1e400", "NaN", "Infinity", "-Infinity", '"\\ud800"', '"\\ud83d\\ude00"', '"x\\udc00"', '"é"',
    '"NaN\\"Infinity\\\\"', '{"model":"inner","model":NaN}', '[NaN,{"a":"NaN"},[]]',
]  # fmt: skip
WRONG = ["01", "-NaN", "1NaN", "nan", '"\\x"', '"\\u12"', '"\x01"', "[", "{", "tru", "\u00a0", "model", ""]


def read(body):
    """What Python makes of a body: `no` where it takes none, else what is wrong with its model, or the model and the
    stream (None where pydantic refuses it)."""
    pairs = []
    try:
        # The hook is called for the top level last.
        value = json.loads(body, object_pairs_hook=lambda found: pairs.append(found) or dict(found))
    except (ValueError, RecursionError):
        return "no"
    if not isinstance(value, dict):
        return "no"
    if json.detect_encoding(body) not in ("utf-8", "utf-8-sig"):
        return "charset"
    models = [model for key, model in pairs[-1] if key == "model"]
    if len(models) > 1:
        return "twice"
    model = models[0] if models else None
    if model is not None and not isinstance(model, str):
        return "not_text"
    if model is not None and any(0xD800 <= ord(char) < 0xE000 for char in model):
        return "not_unicode"
    return {"model": model, "stream": read_flag(value.get("stream"))}


def read_flag(value):
    """pydantic's lax reading of `bool | None`; None where it refuses."""
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in TRUE + FALSE:
        return value.lower() in TRUE
    return None


def bodies(seed, count):
    """Bodies that are nearly what clients send."""
    rng = random.Random(seed)
    for _ in range(count):
        yield body(rng)


def body(rng):
    space = lambda: rng.choice(["", "", "", " ", "\n", "\t\r\n "])  # noqa: E731
    entries = []
    for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 4])):
        key = rng.choice(KEYS)
        usual = NAMES if key == '"model"' else FLAGS
        value = rng.choice(usual if rng.random() < 0.6 else VALUES)
        if rng.random() < 0.06:
            key, value = rng.choice([(key, rng.choice(WRONG)), (rng.choice(WRONG), value)])
        entries.append(f"{space()}{key}{space()}:{space()}{value}{space()}")
    text = f"{space()}{{{','.join(entries)}}}{space()}"
    if rng.random() < 0.05:
        text += rng.choice([",", "{}", "x", "\x00"])
    charset = rng.choice(["utf-8"] * 20 + ["utf-8-sig"] * 2 + ["utf-16", "utf-16-be", "utf-32-le"])
    made = bytearray(text.encode(charset, "surrogatepass"))
    if made and rng.random() < 0.15:
        at = rng.randrange(len(made))
        change = rng.randrange(3)
        if change == 0:
            made[at] = rng.randrange(256)
        elif change == 1:
            made.insert(at, rng.choice(b'"\\{}[],:\x00\xed\xff'))
        else:
            del made[at]
    return bytes(made)


def main():
    # A character for each byte, so that a person can read it.
    found = {made.decode("latin-1"): read(made) for made in bodies(11, 700)}
    lines = [json.dumps([made, reading]) for made, reading in found.items()]
    Path(__file__).with_name("readings.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    sys.stdout.write(f"{len(found)} readings\n")


if __name__ == "__main__":
    main()
