# Sourced by demo.sh and bench.sh: processes that run beside the script and end with it.
# The caller sets `data`, a folder for logs and ready files, before it starts anything.

pids=()

# Ends what was started, in reverse order: who uses a service stops before the service does.
stop_all() {
  local i
  for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
    kill "${pids[i]}" 2>/dev/null && wait "${pids[i]}" 2>/dev/null || true
  done
  pids=()
}

# start NAME COMMAND…: runs a command and waits until it has written its address to $data/NAME.ready.
start() {
  rm -f "$data/$1.ready"
  launch "$@"
  await "$1" test -s "$data/$1.ready"
}

# launch NAME COMMAND…: runs a command whose remarks go to $data/NAME.log.
launch() {
  local name=$1
  shift
  "$@" 2>"$data/$name.log" &
  pids+=($!)
}

# await NAME CONDITION…: waits until a command succeeds, while what was launched last lives.
await() {
  local name=$1 deadline=$((SECONDS + 60))
  shift
  until "$@"; do
    kill -0 "${pids[-1]}" 2>/dev/null || { echo "$name stopped: $(tail -n 5 "$data/$name.log")" >&2; exit 1; }
    ((SECONDS < deadline)) || { echo "$name is not ready after 60 s: see $data/$name.log" >&2; exit 1; }
    sleep 0.05
  done
}

# stop_last: ends what was started last.
stop_last() {
  kill "${pids[-1]}" 2>/dev/null && wait "${pids[-1]}" 2>/dev/null || true
  unset 'pids[-1]'
}
