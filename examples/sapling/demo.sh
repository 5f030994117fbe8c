#!/usr/bin/env bash
# The closed loop on this machine: sapling is measured on held-out tasks, does others with hints, learns from what it
# solved without them, and is measured again, all in real browsers.
# Usage: demo.sh FOLDER_WITH_BINARIES [SEED OF THE SITE]
set -euo pipefail
bin=$1
seed=${2:-3}
here=$(cd "$(dirname "$0")" && pwd)
data=${ESPALIER_DEMO_DIR:-$PWD/.espalier-demo}/site-$seed
mkdir -p "$data"

source "$here/../practice/processes.sh"
trap stop_all EXIT

# tasks SPLIT COUNT-OF-THE-DEPOT COUNT-OF-OTHERS
tasks() {
  "$bin/espalier" practice tasks --seed "$seed" --split "$1" --count "$2" \
    --kind depot_find --kind depot_code --kind depot_sign
  "$bin/espalier" practice tasks --seed "$seed" --split "$1" --count "$3" \
    --kind shop_price --kind login --kind slow_page | sed 's/"id":"practice-/"id":"other-/'
}
tasks train 90 24 >"$data/train.jsonl"
tasks eval 63 24 >"$data/eval.jsonl"
cp "$here/improve.toml" "$data/improve.toml"

# The site's address is part of every task: given again, the demonstration goes on where it was.
port=$(cat "$data/site.port" 2>/dev/null || echo 0)
start site "$bin/espalier" practice site --listen "127.0.0.1:$port" --seed "$seed" --ready-file "$data/site.ready"
start up "$bin/espalier" up --data-dir "$data/up" --listen 127.0.0.1:0 --model examples/sapling/model --slots 4 \
  --ready-file "$data/up.ready"

sed -E 's/.*:([0-9]+).*/\1/' "$data/site.ready" >"$data/site.port"
# Pages are reached as `localhost`, as a person would type it.
site=$(sed 's/127\.0\.0\.1/localhost/' "$data/site.ready")
"$bin/espalier" run "$data/improve.toml" --data-dir "$data/up" --var "site=$site" --out "$data/report"

# What it is for: tasks of the depot are learned, and what was known is not forgotten.
node - "$data/report/report.json" <<'CHECK'
const {kinds, pooled} = JSON.parse(require("fs").readFileSync(process.argv[2])).report.comparison.comparison;
const rises = (wanted) => Object.entries(kinds).filter(([kind]) => kind.startsWith("depot_") == wanted).map(([, kind]) => kind.difference.value);
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const [learned, known] = [mean(rises(true)), mean(rises(false))];
if (!(learned >= 0.3 && pooled.difference.low > 0 && known > -0.1)) {
  console.error(`the adapter does not do what it should: depot ${learned}, other kinds ${known}, all from ${pooled.difference.low}`);
  process.exit(1);
}
CHECK
