-- Which job goes next, what that costs its project, and the lease that it gets.
--
-- A line is what a project has ready in one lane. `order` has the projects with lines, the next one first.
local weights, vtimes, charged = {}, {}, {}
local lines_of, order, line_count = {}, {}, 0
local clock

-- Adds the projects with ready jobs in `lane`, as many as `most` grants can reach.
local function read_ring(lane, most)
  local listed = call('ZRANGE', prefix .. 'g:' .. lane, 0, most - 1, 'WITHSCORES')
  for n = 1, #listed, 2 do
    local project = listed[n]
    if not lines_of[project] then
      lines_of[project], vtimes[project] = {}, tonumber(listed[n + 1])
      order[#order + 1] = project
    end
    local lines = lines_of[project]
    lines[#lines + 1] = {queue = prefix .. 'q:' .. lane .. ':' .. project, from = 0, at = 1, refs = {}}
    line_count = line_count + 1
  end
end

-- Whether project `a` goes before `b`: by virtual time, then number.
local function goes_before(a, b)
  return vtimes[a] < vtimes[b] or (vtimes[a] == vtimes[b] and a < b)
end

-- The first job of `line` that is not granted yet. Jobs are read `page` at a time, and taken out at the end.
local function head_of(line, page)
  while true do
    if line.at > #line.refs then
      if line.is_read then return nil end
      line.refs, line.at = call('ZRANGE', line.queue, line.from, line.from + page - 1), 1
      line.from, line.is_read = line.from + #line.refs, #line.refs < page
      read_rows(line.refs)
    end
    local ref = line.refs[line.at]
    local job = ref and load(ref)
    if job then return job end
    if ref then
      call('ZREM', line.queue, ref)
      line.at, line.from = line.at + 1, line.from - 1
    end
  end
end

-- The line and the job that go next; nil where nothing is left.
local function next_head(page)
  while order[1] do
    local line, job
    for _, other in ipairs(lines_of[order[1]]) do
      local head = head_of(other, page)
      if head and (not job or turn_of(head) < turn_of(job)) then line, job = other, head end
    end
    if job then return line, job end
    table.remove(order, 1)
  end
end

-- Puts the first project back in its place after its virtual time has changed.
local function reorder()
  local moved, n = order[1], 1
  while order[n + 1] and goes_before(order[n + 1], moved) do
    order[n] = order[n + 1]
    n = n + 1
  end
  order[n] = moved
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
