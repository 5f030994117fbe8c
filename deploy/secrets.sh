#!/usr/bin/env bash
# Makes the secrets of deploy/compose.yaml, once: tokens, their digests, and passwords, in deploy/.env for you alone.
# Usage: secrets.sh [FILE]
# What a client needs of them:
#   source deploy/.env; ESPALIER_URL=http://127.0.0.1:7411 ESPALIER_TOKEN=$CLIENT_TOKEN espalier watch
set -euo pipefail
file=${1:-$(dirname "$0")/.env}
[[ ! -e $file ]] || { echo "$file is there already; remove it, and the volumes, to begin anew" >&2; exit 1; }
umask 077
secret() { head -c 32 /dev/urandom | sha256sum | cut -d ' ' -f 1; }
digest() { printf %s "$1" | sha256sum | cut -d ' ' -f 1; }
worker=$(secret) operator=$(secret) client=$(secret)
cat >"$file" <<ENV
WORKER_TOKEN=$worker
WORKER_SHA256=$(digest "$worker")
OPERATOR_TOKEN=$operator
OPERATOR_SHA256=$(digest "$operator")
CLIENT_TOKEN=$client
CLIENT_SHA256=$(digest "$client")
REDIS_PASSWORD=$(secret)
S3_SECRET=$(secret)
GRAFANA_PASSWORD=$(secret)
ENV
echo "$file is written" >&2
