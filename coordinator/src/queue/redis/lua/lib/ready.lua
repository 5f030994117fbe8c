-- Ready jobs: stride fairness between projects, then priority within a project, then the order of submission. The
-- rules and their sources are those of `espalier_core::queue`, module `ring`.
--
-- q:<lane>:<project> holds the turns, g:<lane> the projects by virtual time, v:<kind> the virtual times with the
-- kind's clock under the empty name, in:<kind>:<project> the lanes in which a project has ready jobs.
local STRIDE, TURNS = 1048576, 562949953421312
local queues, woken = {}, {}

local function queue_of(job)
  local known = batch(job.b)
  local queue = known.queues[job.l]
  if not queue then
    queue = prefix .. 'q:' .. job.l .. ':' .. known.project
    known.queues[job.l] = queue
    queues[queue] = {kind = job.k, lane = job.l, project = known.project}
  end
  return queue
end

local function move(kind, project, vtime)
  call('HSET', prefix .. 'v:' .. kind, project, vtime)
  for _, lane in ipairs(call('SMEMBERS', prefix .. 'in:' .. kind .. ':' .. project)) do
    call('ZADD', prefix .. 'g:' .. lane, vtime, project)
  end
end

-- A project whose first job becomes ready in a lane enters at the clock: a pause earns nothing.
local function enter_ring(kind, lane, project)
  local v = call('HMGET', prefix .. 'v:' .. kind, '', project)
  local clock, vtime = tonumber(v[1]) or 0, tonumber(v[2]) or 0
  call('SADD', prefix .. 'in:' .. kind .. ':' .. project, lane)
  if clock > vtime then return move(kind, project, clock) end
  call('ZADD', prefix .. 'g:' .. lane, vtime, project)
end

local function leave_ring(kind, lane, project)
  call('ZREM', prefix .. 'g:' .. lane, project)
  call('SREM', prefix .. 'in:' .. kind .. ':' .. project, lane)
end

-- Writes what was gathered; whoever reads an index calls this first.
local function write_indexes()
  for _, key in ipairs(changed_keys) do
    local queue = queues[key]
    local had = queue and call('EXISTS', key)
    write_index(key)
    local has = queue and call('EXISTS', key)
    if queue and had < has then enter_ring(queue.kind, queue.lane, queue.project) end
    if queue and had > has then leave_ring(queue.kind, queue.lane, queue.project) end
  end
  changed, changed_keys = {}, {}
end

-- Where a job is in its line.
local function turn_of(job)
  return (9 - job.p) * TURNS + job.n
end

local function push_ready(job)
  put(queue_of(job), job.ref, turn_of(job))
  woken[job.l] = true
end

local function remove_ready(job)
  put(queue_of(job), job.ref, false)
end
