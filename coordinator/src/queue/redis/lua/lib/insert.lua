-- New jobs enter a batch. They come each after those that it depends on; `push_job` in `encode.rs` gives the same list.

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
