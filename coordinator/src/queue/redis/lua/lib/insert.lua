-- New jobs enter a batch. They come each after those that it depends on.

-- What the jobs of a chunk often have in common: kind, priority, budgets, longest runtime, needs.
local forms = {}
local function form_of(text)
  local form = forms[text]
  if not form then
    local k, p, ma, mi, mr, needs = text:match('^(%d+) (%d+) (%d*) (%d*) (%d*) (.*)$')
    form = {
      k = tonumber(k), p = tonumber(p), ma = tonumber(ma), mi = tonumber(mi), mr = tonumber(mr), needs = needs,
    }
    forms[text] = form
  end
  return form
end

-- A job, with `needs`, `spec` and `deps` beside the fields of its row; `push_job` in `encode.rs` gives the same list.
local function take_job(base)
  local at, form, L, T = arg, form_of(argv[arg + 4]), argv[arg + 6], argv[arg + 7]
  local job = {
    n = base + argv[at + 1], id = argv[at + 2], d = argv[at + 3], k = form.k, p = form.p, ma = form.ma, mi = form.mi,
    mr = form.mr, nb = tonumber(argv[at + 5]), L = L ~= '' and L or nil, T = T ~= '' and T or nil,
    needs = form.needs, spec = argv[at + 8],
  }
  local many = tonumber(argv[at + 9])
  arg = at + 9
  if many > 0 then job.deps = {} end
  for n = 1, many do job.deps[n] = {batch = take(), id = take(), here = take() == '1'} end
  return job
end

local NONE = {}

-- Each dependency; or nil and the position of one that is not there.
local function find_deps(new, siblings_pass)
  if not new.deps then return NONE end
  local found = {}
  for n, dep in ipairs(new.deps) do
    local b = batch_number(dep.batch)
    local ref = b and b .. ':' .. dep.id
    local needed = ref and load(ref)
    if needed then
      found[#found + 1] = needed
    elseif not (dep.here and siblings_pass) then
      return nil, n
    end
  end
  return found
end

-- 1: may enter, 0: is there, -1: another has the name, -2: no lane, -3: the batch is closed, -10 - n: no dependency n.
local function judge(b, new, is_closed, siblings_pass)
  local twin = load(b .. ':' .. new.id)
  if twin then return twin.d == new.d and 0 or -1 end
  local deps, missing = find_deps(new, siblings_pass)
  if not deps then return -10 - missing end
  if is_closed then return -3 end
  if not lane_of(b, new, not siblings_pass) then return -2 end
  return 1, deps
end

local function depend(job, deps)
  local doomed = false
  for _, needed in ipairs(deps) do
    call('SADD', prefix .. 'deps:' .. job.ref, needed.ref)
    if needed.s ~= 'S' then
      doomed = doomed or needed.s == 'X' or needed.s == 'C'
      call('SADD', prefix .. 'need:' .. job.ref, needed.ref)
      call('ZADD', prefix .. 'dep:' .. needed.ref, job.n, job.ref)
      needed.dp = 1
      touch(needed)
    end
  end
  return doomed
end

-- `job` as `take_job` gives it enters batch `b`; what is not a field of its row is taken out.
local function enter_job(b, job, deps)
  local needs, spec = job.needs, job.spec
  job.l = lane_of(b, job, true)
  job.ref, job.b, job.t = b .. ':' .. job.id, b, now
  job.needs, job.spec, job.deps = nil, nil, nil
  put_string(prefix .. 's:' .. job.ref, spec)
  put(batch(b).by_name, job.id, 0)
  lane_jobs[job.l] = (lane_jobs[job.l] or 0) + 1
  if needs ~= '' then
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
    set_waiting(job, #deps == 0)
  end
end
