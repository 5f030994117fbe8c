-- how many, then of each: batch, job, fence, outcome (ok, released, a class, or refused by the caller), stored error,
-- wait in microseconds, stored result, how many jobs it spawns, those → 1 accepted, 0 known already, -1 stale,
-- -2 refused by the caller, or {verdict, position} of a spawned job that cannot enter.
local function ending_of(b, job, outcome)
  if outcome.how == 'ok' then
    for _, new in ipairs(outcome.spawn or {}) do
      local verdict, deps = judge(b, new, false, false)
      if verdict == 1 then enter_job(b, new, deps) end
    end
    job.o = outcome.result ~= '' and outcome.result or nil
    return end_job(job, 'S')
  end
  local class = outcome.how == 'released' and 'preempted' or outcome.how
  fail(job, class, outcome.failure, outcome.wait)
end

local function refused(b, spawn)
  for n, new in ipairs(spawn or {}) do
    local verdict = judge(b, new, false, true)
    if verdict < 0 then return {verdict, n} end
  end
end

local function finish(outcome)
  local b, fence = outcome.b, outcome.fence
  local job = b and load(outcome.ref)
  if not job or job.s ~= 'L' or job.f ~= fence then
    if job and job.sf == fence then return 0 end
    call('HINCRBY', meta, 'stale', 1)
    return -1
  end
  if outcome.how == 'refused' then return -2 end
  local reason = refused(b, outcome.spawn)
  if reason then return reason end
  job.sf = fence
  ending_of(b, job, outcome)
  settle()
  return 1
end

local outcomes, refs, replies = {}, {}, {}
for n = 1, tonumber(take()) do
  local b, id = batch_number(take()), take()
  local outcome = {
    b = b, ref = b and b .. ':' .. id, fence = tonumber(take()), how = take(), failure = take(), wait = tonumber(take()),
    result = take(),
  }
  local base, many = next_job, tonumber(take())
  if many > 0 then outcome.spawn = {} end
  for m = 1, many do
    outcome.spawn[m] = take_job(base)
    next_job = math.max(next_job, outcome.spawn[m].n + 1)
  end
  outcomes[n] = outcome
  refs[#refs + 1] = outcome.ref
end
read_rows(refs)
for n, outcome in ipairs(outcomes) do replies[n] = finish(outcome) end
write_lanes()
return done(replies)
