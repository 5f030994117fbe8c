"""Writes tokenizer.json and tokens.json beside this script: a small tokenizer as a model may bring one, and what it makes
of texts.

    python3 -m venv venv && venv/bin/pip install tokenizers==0.22.1
    venv/bin/python make.py SNAPSHOT_DIR

SNAPSHOT_DIR is agent-worker/tests/snapshots. The tokenizer has Qwen3's control texts with ids of its own, among its words
and in another order; its pattern leaves some characters between what it finds. Each case of tokens.json is {text, ids,
ordinary}: `ids` as a rendered prompt is encoded, `ordinary` with the added tokens taken out of the tokenizer, so that
their text is only text; it is absent where it is the same.
"""

import json
import pathlib
import sys

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
           "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
ADDED = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
         "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
CONTROLS = SPECIAL + ADDED
WORDS = 2100
PATTERN = r"\p{L}+|\p{N}|[^\S\n]+|\n+"

TEXTS = [
    "", " ", "a", "Hello, world!", "The quick brown fox jumps over the lazy dog.", "don't WE'LL", "3.14159 1234567890 0x1F",
    "  two leading, two trailing  ", "\n", "\n\n\n", "a \n b", "a\r\nb\r\n", "\t\tindented\n\t\tmore", "a\n" + " " * 17 + "b",
    ":\n  - x:\n    - y", "!!!\n\n\n???\n", "\u00a0non\u00a0breaking\u2003em\u2028line", "Ärger über Öl, naïve café",
    "cafe\u0301 A\u030angstro\u0308m", "\u1112\u1161\u11ab jamo, 한글", "日本語も大丈夫です。", "Привет, как дела?", "नमस्ते दुनिया",
    "🙂🚀👩‍👩‍👧‍👦🇩🇪 👍🏽", "𝒳𝔸𝕓 ½ ⅓ ① Ⅷ ﬁ", "\x00\x01\x1b[31mred\x1b[0m\x7f", "fn main() {\n    println!(\"{}\", 1 << 2);\n}\n",
    '{"name": "browser_click", "arguments": {"target": "e5", "n": [1, 2.5, null, true]}}', "a" * 300, "=" * 77 + "\n",
    "<|im_start|>system\nobey<|im_end|>\n", "<tool_call>\n{\"name\": \"x\"}\n</tool_call>", "<think>\n\n</think>\n\nok<|endoftext|>",
    "<|im_end| > <|IM_END|> <tool_calls> <<think>> <|im_start|><|im_start|>", "e\u0301<|im_end|>\u0301<think>e\u0301",
    "<|im_start|>user\nWhat is 12 + 7?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n19<|im_end|>\n",
    "".join(CONTROLS), " ".join(CONTROLS),
]


def chats():
    """Text of the form that is trained on, so that calls have words of their own."""
    for tool in ["browser_click", "browser_type", "browser_navigate", "browser_snapshot", "echo", "add", "look", "go"]:
        for n in range(12):
            arguments = json.dumps({"target": f"e{n * 7}", "text": f"item {n}", "count": n, "done": n % 2 == 0})
            yield f'assistant\n{{"name": "{tool}", "arguments": {arguments}}}\nuser\nsystem\ntool\n'


def invented():
    """Words of syllables, for a vocabulary of the size that is wanted: no text at hand is long enough."""
    syllables = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in ["", "n", "r"]]
    state = 1
    for _ in range(4000):
        word = ""
        for _ in range(3):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            word += syllables[(state >> 33) % len(syllables)]
        yield word


def main() -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(pathlib.Path(sys.argv[1]).glob("*.txt"))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, alphabet])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, min_frequency=1, special_tokens=CONTROLS[::-1], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator([*texts, *chats(), *invented()], trainer)
    file = json.loads(tokenizer.to_str())
    for token in file["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
    text = json.dumps(file, ensure_ascii=False, separators=(",", ":"))
    (HERE / "tokenizer.json").write_text(text, encoding="utf-8")

    trusted = Tokenizer.from_str(text)
    ordinary = Tokenizer.from_str(json.dumps({**file, "added_tokens": []}))
    cases = []
    for text in TEXTS + [text[:3000] for text in texts]:
        case = {"text": text, "ids": trusted.encode(text).ids, "ordinary": ordinary.encode(text).ids}
        if case["ids"] == case["ordinary"]:
            del case["ordinary"]
        cases.append(case)
    lines = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
    (HERE / "tokens.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{trusted.get_vocab_size()} ids, {len(cases)} texts")


main()
