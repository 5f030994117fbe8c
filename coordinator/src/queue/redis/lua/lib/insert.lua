-- New jobs enter a batch. They come each after those that it depends on; `JOB_ARGS` in `wire.rs` is the same list.
--
-- pl:<project> counts a project's jobs by lane, for lanes with needs: a project has few of those, lest it take the
-- room of all others. The limits are those of `espalier_core::queue`.
local LANES_MAX, PROJECT_LANES_MAX = 16384, 256
local lanes_known, lane_jobs, project_lanes, project_jobs = {}, {}, {}, {}

local function take_job(base)
  local new = {
    n = base + take(), id = take(), d = take(), k = take(), p = tonumber(take()), needs = take(), ma = take(),
    mi = take(), nb = take(), mr = take(), L = take(), T = take(), spec = take(), deps = {},
  }
  for n = 1, tonumber(take()) do
    new.deps[n] = {batch = take(), id = take(), here = take() == '1'}
  end
  return new
end

-- Whether `project` has jobs in the lane `value`, whose number is `lane` where it has one, or may have them there.
local function may_use(project, value, lane)
  local used = project_lanes[project]
  if not used then
    used = {many = call('HLEN', prefix .. 'pl:' .. project), values = {}}
    project_lanes[project] = used
  end
  if used.values[value] then return true end
  if not lane or call('HEXISTS', prefix .. 'pl:' .. project, lane) == 0 then
    if used.many >= PROJECT_LANES_MAX then return false end
    used.many = used.many + 1
  end
  used.values[value] = true
  return true
end

-- The number of the lane of `new` in batch `b`; nil: the project has no room for one more, or the queue has none.
local function lane_of(b, new, may_add)
  local value = new.k .. '\n' .. new.needs
  local lane = lanes_known[value] or call('HGET', prefix .. 'lane_of', value)
  if new.needs ~= '' and not may_use(batch(b).project, value, lane) then return nil end
  if not lane then
    if new.needs ~= '' and call('HLEN', prefix .. 'lanes') >= LANES_MAX then return nil end
    if not may_add then return '' end
    lane = string.format('%d', call('HINCRBY', meta, 'last_lane', 1))
    call('HSET', prefix .. 'lane_of', value, lane)
    call('HSET', prefix .. 'lanes', lane, value)
    call('HINCRBY', meta, 'lanes', 1)
  end
  lanes_known[value] = lane
  return lane
end

-- The number and state of each dependency; or nil and the position of one that is not there.
local function find_deps(new, siblings_pass)
  local found = {}
  for n, dep in ipairs(new.deps) do
    local b = batch_number(dep.batch)
    local ref = b and b .. ':' .. dep.id
    local state = ref and call('HGET', prefix .. 'j:' .. ref, 's')
    if state then
      found[#found + 1] = {ref = ref, state = state}
    elseif not (dep.here and siblings_pass) then
      return nil, n
    end
  end
  return found
end

-- 1: may enter, 0: is there, -1: another has the name, -2: no lane, -3: the batch is closed, -10 - n: no dependency n.
local function judge(b, new, is_closed, siblings_pass)
  local twin = call('HGET', prefix .. 'j:' .. b .. ':' .. new.id, 'd')
  if twin then return twin == new.d and 0 or -1 end
  local deps, missing = find_deps(new, siblings_pass)
  if not deps then return -10 - missing end
  if is_closed then return -3 end
  if not lane_of(b, new, not siblings_pass) then return -2 end
  return 1, deps
end

local function depend(job, deps)
  local doomed = false
  for _, dep in ipairs(deps) do
    call('SADD', prefix .. 'deps:' .. job.ref, dep.ref)
    if dep.state ~= 'S' then
      doomed = doomed or dep.state == 'X' or dep.state == 'C'
      call('SADD', prefix .. 'need:' .. job.ref, dep.ref)
      call('ZADD', prefix .. 'dep:' .. dep.ref, job.n, job.ref)
      call('HSET', prefix .. 'j:' .. dep.ref, 'dp', 1)
    end
  end
  return doomed
end

local OPTIONAL = {'ma', 'mi', 'nb', 'mr', 'L', 'T'}

local function enter_job(b, new, deps)
  local ref = b .. ':' .. new.id
  local job = {ref = ref, b = b, id = new.id, n = new.n, k = new.k, p = new.p, l = lane_of(b, new, true), free = #deps == 0}
  local row = {'n', new.n, 'k', new.k, 'p', new.p, 'l', job.l, 'd', new.d, 't', now}
  for _, name in ipairs(OPTIONAL) do
    if new[name] ~= '' then
      row[#row + 1], row[#row + 2] = name, new[name]
      job[name] = new[name]
    end
  end
  job.also = row
  put_string(prefix .. 's:' .. ref, new.spec)
  put(prefix .. 'bj:' .. b, new.id, 0)
  lane_jobs[job.l] = (lane_jobs[job.l] or 0) + 1
  if new.needs ~= '' then
    local of_project = project_jobs[batch(b).project] or {}
    project_jobs[batch(b).project] = of_project
    of_project[job.l] = (of_project[job.l] or 0) + 1
  end
  local doomed = #deps > 0 and depend(job, deps)
  if batch(b).cancelled then
    end_job(job, 'C')
  elseif doomed then
    end_job(job, 'X', 'dependency')
  else
    set_waiting(job)
  end
end

local function write_lanes()
  for lane, by in pairs(lane_jobs) do call('HINCRBY', prefix .. 'lane_jobs', lane, by) end
  for project, of_project in pairs(project_jobs) do
    for lane, by in pairs(of_project) do call('HINCRBY', prefix .. 'pl:' .. project, lane, by) end
  end
end
