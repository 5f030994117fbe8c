"""Drives an inference worker through the official openai package: every answer goes through the package's own types.

Called as openai_client.py URL KEY by tests/tests/serving.rs, on a model that knows nothing."""

import json
import sys

import openai
from openai import OpenAI

MODEL = "tiny"
HELLO = [{"role": "user", "content": "hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "go",
            "description": "Goes.",
            "parameters": {
                "type": "object",
                "properties": {"to": {"enum": ["north", "south"]}},
                "required": ["to"],
                "additionalProperties": False,
            },
        },
    }
]
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}


def models(client):
    assert [model.id for model in client.models.list()] == [MODEL]


def chat(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert len(answer.choices[0].logprobs.content) == 8
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2


def streamed_chat(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=8, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body=NO_THINKING,
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=8, temperature=0, extra_body=NO_THINKING
    )
    assert text == whole.choices[0].message.content, (text, whole)
    assert chunks[-1].usage.completion_tokens == 8


def tool_call(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, tools=TOOLS, max_tokens=200, temperature=1, seed=1,
        tool_choice={"type": "function", "function": {"name": "go"}}, extra_body=NO_THINKING,
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls", choice
    call = choice.message.tool_calls[0]
    assert call.function.name == "go"
    assert json.loads(call.function.arguments)["to"] in ("north", "south")
    # The answer goes back as the package has it.
    turns = HELLO + [
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    client.chat.completions.create(model=MODEL, messages=turns, tools=TOOLS, max_tokens=4)


def streamed_tool_call(client):
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, tools=TOOLS, max_tokens=200, temperature=1, seed=2,
        tool_choice="required", parallel_tool_calls=False, extra_body=NO_THINKING,
    ) as stream:
        for _ in stream:
            pass
        call = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments)["to"] in ("north", "south")


def json_schema(client):
    schema = {
        "type": "object", "properties": {"good": {"type": "boolean"}}, "required": ["good"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=100, temperature=1, seed=3, extra_body=NO_THINKING,
        response_format={"type": "json_schema", "json_schema": {"name": "g", "schema": schema, "strict": True}},
    )
    assert json.loads(answer.choices[0].message.content)["good"] in (True, False)


def completion(client):
    answer = client.completions.create(model=MODEL, prompt=["a b c", "d"], max_tokens=5, n=2, seed=4, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len(answer.choices[0].logprobs.tokens) == 5
    stream = client.completions.create(model=MODEL, prompt="a b c", max_tokens=5, stream=True)
    assert list(stream)[-1].choices[0].finish_reason == "length"


def wrong_model(client):
    try:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error
    else:
        raise AssertionError("an unknown model answered")


def wrong_value(client):
    try:
        client.chat.completions.create(model=MODEL, messages=HELLO, top_p=0)
    except openai.BadRequestError as error:
        assert error.param == "top_p", error
    else:
        raise AssertionError("a wrong value was taken")


def main():
    url, key = sys.argv[1:]
    try:
        OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
    except openai.AuthenticationError:
        pass
    client = OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)
    checks = [
        models, chat, streamed_chat, tool_call, streamed_tool_call, json_schema, completion, wrong_model, wrong_value,
    ]
    for check in checks:
        check(client)
    print(len(checks), "checks passed")


main()
