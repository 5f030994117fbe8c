#!/usr/bin/env bash
# Makes sapling from nothing: vocabulary, first weights, lessons, training, and what it then solves on the twin of the site.
# Usage: make.sh FOLDER_WITH_BINARIES OUT. A GPU takes a quarter of an hour, two cores take days. Broken off, it goes on where it was.
set -euo pipefail
bin=$1
data=$2
here=$(cd "$(dirname "$0")" && pwd)
tokens=${SAPLING_TOKENS:-250000000}
port=${SAPLING_PORT:-8137}
mkdir -p "$data"

source "$here/../practice/processes.sh"
trap stop_all EXIT

# once FILE COMMAND…: lets a command write a file or folder, which is there as a whole or not at all.
once() {
  local made=$data/$1
  shift
  [ -e "$made" ] || { rm -rf "$made.part" && "$@" "$made.part" && mv "$made.part" "$made"; }
}

once seedling "$bin/sapling" seedling
once rows.jsonl "$bin/sapling" rows --tokens "$tokens" --part 0 "$data/seedling"
once held-out.jsonl "$bin/sapling" rows --tokens 200000 --part 63 "$data/seedling"

# Nothing is asked of a model or of a browser here.
echo '{"mcpServers": {}}' >"$data/no-servers.json"
start up "$bin/espalier" up --data-dir "$data/up" --listen 127.0.0.1:0 --mcp "$data/no-servers.json" \
  --model-url http://127.0.0.1:9/v1 --model none --ready-file "$data/up.ready"
# The same batch again is the same training.
"$bin/espalier" train --data-dir "$data/up" --base "$data/seedling" --rows "$data/rows.jsonl" \
  --eval-rows "$data/held-out.jsonl" --config "$here/pretraining.toml" --name sapling --batch sapling
rm -rf "$data/model"
"$bin/espalier" adapters pull sapling --data-dir "$data/up" --output "$data/model"
stop_last

launch model "$bin/espalier-infer-worker" --model "$data/model" --served-model-name sapling --port "$port"
await model bash -c ": </dev/tcp/127.0.0.1/$port" 2>/dev/null
for seed in 3 5 7; do
  echo "site $seed"
  "$bin/sapling" probe "http://127.0.0.1:$port/v1" --seed "$seed" --hints
  "$bin/sapling" probe "http://127.0.0.1:$port/v1" --seed "$seed"
done
echo "the model is in $data/model"
