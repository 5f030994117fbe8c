-- Ready jobs: stride fairness between projects, then priority within a project, then the order of submission. The
-- rules and their sources are those of `espalier_core::queue`, module `ring`.
--
-- q:<lane>:<project> holds the turns, g:<lane> the projects by virtual time, v:<kind> the virtual times with the
-- kind's clock under the empty name, in:<kind>:<project> the lanes in which a project has ready jobs.
local STRIDE, TURNS = 1048576, 562949953421312
local pushed, pushed_names, woken = {}, {}, {}

local function queue_of(job)
  return prefix .. 'q:' .. job.l .. ':' .. batch(job.b).project
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

-- Jobs that became ready are added together; whoever reads the queues calls this first.
local function write_ready()
  for _, queue in ipairs(pushed_names) do
    local many = pushed[queue]
    if call('EXISTS', queue) == 0 then enter_ring(many.kind, many.lane, many.project) end
    for from = 1, #many, 2000 do
      call('ZADD', queue, unpack(many, from, math.min(from + 1999, #many)))
    end
  end
  pushed, pushed_names = {}, {}
end

local function push_ready(job)
  local queue = queue_of(job)
  local many = pushed[queue]
  if not many then
    many = {kind = job.k, lane = job.l, project = batch(job.b).project}
    pushed[queue] = many
    pushed_names[#pushed_names + 1] = queue
  end
  many[#many + 1] = (9 - job.p) * TURNS + job.n
  many[#many + 1] = job.ref
  woken[job.l] = true
end

local function remove_ready(job)
  write_ready()
  local queue, project = queue_of(job), batch(job.b).project
  call('ZREM', queue, job.ref)
  if call('EXISTS', queue) == 0 then
    call('ZREM', prefix .. 'g:' .. job.l, project)
    call('SREM', prefix .. 'in:' .. job.k .. ':' .. project, job.l)
  end
end
