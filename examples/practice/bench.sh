#!/usr/bin/env bash
# Measures this machine: the queue, embedded and in Redis beside other queues, the model server beside llama.cpp's,
# training, the loop over a toy tool server, eight browsers at once, memory.
# JSON lines on standard output, a table on standard error. Everything lives in a temporary folder.
# Usage: bench.sh FOLDER_WITH_BINARIES FOLDER_WITH_OTHERS
set -euo pipefail
bin=$(cd "$1" && pwd)
others=$(cd "$2" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
data=$(mktemp -d)
figures=$data/figures.jsonl

source "$here/processes.sh"
finish() {
  local status=$?
  stop_all
  # What the processes said is worth keeping only where something went wrong.
  if ((status == 0)); then rm -rf "$data"; else echo "logs: $data" >&2; fi
}
trap finish EXIT

# Services that speak on standard output would speak between the figures.
serve() { start "$@" >>"$data/output.log"; }

measure() {
  echo "measuring: $*" >&2
  "$bin/espalier" bench --json "$@" | tee -a "$figures"
}

# serve_model MISTAKES: a scripted model that makes this share of mistakes.
serve_model() {
  serve model "$bin/scripted-model" --listen 127.0.0.1:0 --seed 7 --mistakes "$1" --ready-file "$data/model.ready"
}

# serve_up FOLDER OPTIONS…: an `espalier up` of its own on $data/FOLDER.
serve_up() {
  local folder=$data/$1
  shift
  serve up "$bin/espalier" up --data-dir "$folder" --listen 127.0.0.1:0 \
    --model-url "$(cat "$data/model.ready")/v1" --model scripted --ready-file "$data/up.ready" "$@"
}

# toy_jobs N: jobs that add two numbers with the toy server, nothing but the loop itself.
toy_jobs() {
  local n
  for ((n = 0; n < $1; n++)); do
    printf '{"id":"sum-%d","task_kind":"toy","mcp":["toy"],"prompt":"Do it.\\nSCRIPT: %s","verify":{"answer":{"equals":"%d"}}}\n' \
      "$n" "[{\\\"tool\\\":\\\"add\\\",\\\"arguments\\\":{\\\"a\\\":$n,\\\"b\\\":1}},{\\\"answer\\\":\\\"{{last}}\\\"}]" "$((n + 1))"
  done
}

measure submit
measure queue
# Celery is given fewer jobs: it is ten times slower, and no faster with more.
measure redis --bullmq "node $others/bullmq/cycle.mjs 50000" \
  --celery "$others/celery/bin/python $here/../bench/celery/cycle.py 10000"
measure infer --llama "$others/llama/llama-server" --models "$others/llama/models"
measure train

# An idle coordinator, with a token that nobody uses.
mkdir "$data/coordinator"
cat >"$data/coordinator.toml" <<TOML
listen = "127.0.0.1:0"
data_dir = "$data/coordinator"
store_url = "file://$data/coordinator/store"
[[tokens]]
name = "nobody"
sha256 = "$(head -c 32 /dev/urandom | sha256sum | cut -d ' ' -f 1)"
project = "*"
roles = ["worker"]
TOML
launch coordinator "$bin/espalier-coordinator" --config "$data/coordinator.toml"
await coordinator grep -q "coordinator serves" "$data/coordinator.log"
measure memory "${pids[-1]}"
stop_last

# measure_toy SLOTS JOBS OPTIONS…
measure_toy() {
  local slots=$1
  toy_jobs "$2" >"$data/toy.jsonl"
  shift 2
  serve_up "toy-$slots" --slots "$slots" --mcp "$data/toy-mcp.json"
  measure rollouts "$data/toy.jsonl" --name "toy, $slots at once" --data-dir "$data/toy-$slots" "$@"
  stop_last
}

printf '{"mcpServers": {"toy": {"command": "%s"}}}' "$bin/toy-mcp" >"$data/toy-mcp.json"
serve_model 0
measure_toy 1 100
measure_toy 64 500 --saturating
stop_last

serve_model 0.15
serve site "$bin/espalier" practice site --listen 127.0.0.1:0 --seed 7 --ready-file "$data/site.ready"
serve_up browsers --slots 8
measure rollouts "$here/tasks.jsonl" --name "browsers, 8 at once" --data-dir "$data/browsers" \
  --var "site=$(sed 's/127\.0\.0\.1/localhost/' "$data/site.ready")"

"$bin/espalier" bench table "$figures" >&2
