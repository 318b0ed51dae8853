"""What the tests say to a model server, and what they expect of its answers."""

PROMPT = [{"role": "user", "content": "Who waits at the door?"}]


def ask(prompt=PROMPT, model="tiny", **more):
    return {"model": model, "messages": prompt, **more}


def text_of(chunks):
    """The text of a streamed answer."""
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def whole(completion):
    return completion.choices[0].message.content
