-- Which job goes next, what that costs its project, and the lease that it gets.
local weights, vtimes, charged = {}, {}, {}
local clock
local PAGE = 100

-- The projects with ready jobs in `lane`, as many as `most` grants can reach, with the turns of each.
local function read_ring(lane, most)
  local ring = {}
  local listed = call('ZRANGE', prefix .. 'g:' .. lane, 0, most - 1, 'WITHSCORES')
  for n = 1, #listed, 2 do
    local project = listed[n]
    vtimes[project] = tonumber(listed[n + 1])
    ring[#ring + 1] = {project = project, queue = prefix .. 'q:' .. lane .. ':' .. project, from = 0, at = 1, turns = {}}
  end
  return ring
end

-- The first turn of `line` that is not granted yet, and its job; read some at a time, and taken out at the end.
local function head_of(line)
  if line.at > #line.turns and not line.is_read then
    line.turns, line.at = call('ZRANGE', line.queue, line.from, line.from + PAGE - 1, 'WITHSCORES'), 1
    line.from, line.is_read = line.from + PAGE, #line.turns < 2 * PAGE
    local refs = {}
    for n = 1, #line.turns, 2 do refs[#refs + 1] = line.turns[n] end
    read_rows(refs)
  end
  return tonumber(line.turns[line.at + 1]), line.turns[line.at]
end

-- The line whose head goes next: by virtual time, then number of the project, then its turn.
local function next_line(rings)
  local best, best_turn
  for _, ring in ipairs(rings) do
    for _, line in ipairs(ring) do
      local vtime, best_vtime = vtimes[line.project], best and vtimes[best.project]
      local turn = head_of(line)
      if turn and (not best or vtime < best_vtime or (vtime == best_vtime and (line.project < best.project
          or (line.project == best.project and turn < best_turn)))) then
        best, best_turn = line, turn
      end
    end
  end
  return best
end

local function weight_of(project)
  if not weights[project] then
    local name = call('HGET', prefix .. 'p:' .. project, 'name')
    local found = call('HMGET', prefix .. 'weights', name, '')
    weights[project] = tonumber(found[1] or found[2]) or 100
  end
  return weights[project]
end

-- Moves a project on by one grant. It may lag behind the clock, where no worker drew from its lanes; it catches up
-- by one stride at most, lest it take a long turn alone.
local function charge(kind, project)
  clock = clock or tonumber(call('HGET', prefix .. 'v:' .. kind, '')) or 0
  local stride = floor(STRIDE / math.max(1, math.min(1000, weight_of(project))))
  local start = math.max(vtimes[project], clock - stride, 0)
  clock = math.max(clock, start)
  vtimes[project] = start + stride
  charged[project] = true
end

local function write_vtimes(kind)
  for project in pairs(charged) do move(kind, project, vtimes[project]) end
  if clock then call('HSET', prefix .. 'v:' .. kind, '', clock) end
end

-- Leases `job`, with a fence above all others.
local function grant(job, worker, ttl)
  last_fence = math.max(last_fence + 1, now)
  job.w, job.f, job.ga, job.tt, job.rs, job.st = worker, last_fence, now, ttl, job.c, (job.st or 0) + 1
  job.dl = lease_now + ttl
  if job.mr then
    job.ru = lease_now + job.mr
    job.dl = math.min(job.dl, job.ru)
  end
  set_state(job, 'L')
end
