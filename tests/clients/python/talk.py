"""Requests of the tests to a model server, and helpers for the responses."""

PROMPT = [{"role": "user", "content": "Who waits at the door?"}]


def ask(prompt=PROMPT, model="tiny", **more):
    return {"model": model, "messages": prompt, **more}


def text_of(chunks):
    """Returns the text of a streamed response."""
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def whole(completion):
    return completion.choices[0].message.content
