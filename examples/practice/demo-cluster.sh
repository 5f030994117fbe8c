#!/usr/bin/env bash
# Runs the practice tasks on a small cluster on this machine: Redis, an S3 server, two coordinators, three agent
# workers, each a process of its own. On the way one worker and one coordinator are killed.
# Usage: demo-cluster.sh FOLDER_WITH_BINARIES S3_SERVER [TASKS.jsonl]
set -euo pipefail
bin=$1
weed=$2
here=$(cd "$(dirname "$0")" && pwd)
tasks=${3:-$here/tasks.jsonl}
data=${ESPALIER_DEMO_DIR:-$PWD/.espalier-demo-cluster}
# A cluster is new each time: what an earlier one left belongs to other tokens.
rm -rf "$data"
mkdir -p "$data"

source "$here/processes.sh"
trap stop_all EXIT

# free_ports N: a first port such that it, the N - 1 behind it and those 10,000 above are free.
free_ports() {
  local base port
  for _ in {1..100}; do
    base=$((20000 + RANDOM % 10000))
    for ((port = base; port < base + $1; port++)); do
      for offset in 0 10000; do
        ! (exec 3<>"/dev/tcp/127.0.0.1/$((port + offset))") 2>/dev/null || continue 3
      done
    done
    echo "$base"
    return
  done
  echo "no free ports" >&2
  exit 1
}

secret() { head -c 32 /dev/urandom | sha256sum | cut -d ' ' -f 1; }
digest() { printf %s "$1" | sha256sum | cut -d ' ' -f 1; }
reaches() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
serves_s3() {
  (exec 3<>"/dev/tcp/127.0.0.1/$s3" && printf 'GET /healthz HTTP/1.0\r\n\r\n' >&3 && grep -q ' 200 ' <&3) 2>/dev/null
}

# --- what the cluster stands on --------------------------------------------------------------------------------------

base=$(free_ports 10)
redis=$base s3=$((base + 1)) coordinator_a=$((base + 6)) coordinator_b=$((base + 7))
export AWS_ACCESS_KEY_ID=demo AWS_SECRET_ACCESS_KEY AWS_REGION=us-east-1 AWS_ENDPOINT_URL=http://127.0.0.1:$s3
AWS_SECRET_ACCESS_KEY=$(secret)

mkdir "$data/redis" "$data/s3"
launch redis redis-server --port "$redis" --bind 127.0.0.1 --dir "$data/redis" --appendonly yes --save '' >"$data/redis.out"
await redis reaches "$redis"
launch s3 "$weed" mini -dir="$data/s3" -ip=127.0.0.1 -ip.bind=127.0.0.1 -bucket=espalier \
  -master.telemetry=false -admin.ui=false -webdav=false -s3.port.iceberg=0 -s3.port.lance=0 \
  -filer.localSocket="$data/filer.sock" -s3.port="$s3" -master.port=$((s3 + 1)) -volume.port=$((s3 + 2)) \
  -filer.port=$((s3 + 3)) -admin.port=$((s3 + 4)) >"$data/s3.out"
await s3 serves_s3

start site "$bin/espalier" practice site --listen 127.0.0.1:0 --seed 7 --ready-file "$data/site.ready"
start model "$bin/scripted-model" --listen 127.0.0.1:0 --seed 7 --mistakes 0.15 --ready-file "$data/model.ready"

# --- coordinators and workers ----------------------------------------------------------------------------------------

client_token=$(secret) worker_token=$(secret)
cat >"$data/coordinator.toml" <<TOML
queue = "redis://127.0.0.1:$redis"
store_url = "s3://espalier/demo"
lease_ttl_ms = 10000
mcp_servers = ["browser"]
[[tokens]]
name = "client"
sha256 = "$(digest "$client_token")"
project = "demo"
roles = ["submit", "read"]
[[tokens]]
name = "workers"
sha256 = "$(digest "$worker_token")"
project = "*"
roles = ["worker"]
TOML

# coordinate NAME PORT
coordinate() {
  launch "$1" "$bin/espalier-coordinator" --config "$data/coordinator.toml" --listen "127.0.0.1:$2"
  await "$1" reaches "$2"
}
coordinate coordinator-a "$coordinator_a"
coordinate coordinator-b "$coordinator_b"
victim_b=${pids[-1]}

for n in 1 2 3; do
  cat >"$data/worker-$n.toml" <<TOML
coordinator_url = ["http://127.0.0.1:$coordinator_a", "http://127.0.0.1:$coordinator_b"]
token = "$worker_token"
data_dir = "$data/worker-$n"
store_url = "s3://espalier/demo"
model_name = "scripted"
slots = 3
playwright_dir = "$here/../../agent-worker/playwright"
[model]
base_url = "$(cat "$data/model.ready")/v1"
[mcp_servers.browser]
preset = "playwright"
TOML
  launch "worker-$n" "$bin/espalier-agent-worker" --config "$data/worker-$n.toml"
done
victim_worker=${pids[-1]}

# --- the job, and what happens meanwhile -----------------------------------------------------------------------------

export ESPALIER_URL=http://127.0.0.1:$coordinator_a ESPALIER_TOKEN=$client_token
batch=demo-cluster-$(date +%H%M%S)

# after N: waits until at least N jobs have succeeded, or the batch is over.
after() {
  while kill -0 "$watcher" 2>/dev/null; do
    (($("$bin/espalier" jobs "$batch" --state succeeded --json 2>/dev/null | grep -c '"id"' || true) < $1)) || return 0
    sleep 0.5
  done
}

# murder NAME PID: SIGKILL, of which the shell need not report.
murder() {
  echo "--- $1 is killed" >&2
  disown "$2"
  kill -9 "$2" 2>/dev/null || true
}

site=$(sed 's/127\.0\.0\.1/localhost/' "$data/site.ready")
"$bin/espalier" submit "$tasks" --batch "$batch" --var "site=$site" --watch &
watcher=$!
after 6
murder worker-3 "$victim_worker"
after 16
murder coordinator-b "$victim_b"
wait "$watcher"
