#!/usr/bin/env bash
# Runs the practice tasks on this machine: site, scripted model, `espalier up`, submit, table.
# Usage: demo.sh FOLDER_WITH_BINARIES [TASKS.jsonl]
set -euo pipefail
bin=$1
here=$(cd "$(dirname "$0")" && pwd)
tasks=${2:-$here/tasks.jsonl}
data=${ESPALIER_DEMO_DIR:-$PWD/.espalier-demo}
mkdir -p "$data"

source "$here/processes.sh"
trap stop_all EXIT

start site "$bin/espalier" practice site --listen 127.0.0.1:0 --seed 7 --ready-file "$data/site.ready"
start model "$bin/scripted-model" --listen 127.0.0.1:0 --seed 7 --mistakes 0.15 --ready-file "$data/model.ready"
start up "$bin/espalier" up --data-dir "$data" --listen 127.0.0.1:0 \
  --model-url "$(cat "$data/model.ready")/v1" --model scripted --ready-file "$data/up.ready"

# Pages are reached as `localhost`, as a person would type it.
site=$(sed 's/127\.0\.0\.1/localhost/' "$data/site.ready")
"$bin/espalier" submit "$tasks" --data-dir "$data" --var "site=$site" --watch
