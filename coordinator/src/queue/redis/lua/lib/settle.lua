-- What follows from a job's end, for itself and for those that wait for it.

-- Dependents that one script looks at; the rest is left to the next tick.
local settle_left = 2000

-- `is_free` where it is known that the job needs nothing more.
local function set_waiting(job, is_free)
  if not is_free and call('EXISTS', prefix .. 'need:' .. job.ref) == 1 then
    set_state(job, 'B')
  elseif job.nb and job.nb > now then
    job.un = job.nb
    set_state(job, 'D')
  else
    set_state(job, 'R')
  end
end

local function settle_one(ref, ended)
  local succeeded = ended.s == 'S'
  if succeeded then call('SREM', prefix .. 'need:' .. ref, ended.ref) end
  local job = load(ref)
  if not job or job.s ~= 'B' then return end
  if not succeeded then
    -- A batch is cancelled page by page; what was brought back later is not meant.
    if batch(job.b).cancelled and not job.rq then end_job(job, 'C') else end_job(job, 'X', 'dependency') end
  elseif call('EXISTS', prefix .. 'need:' .. ref) == 0 then
    set_waiting(job)
  end
end

-- Dependents become ready, or die with what they need, and so on.
local function settle()
  while #just_ended > 0 do
    local ended = table.remove(just_ended)
    local from = ended.from or 0
    while ended.dp and settle_left > 0 do
      local page = call('ZRANGE', prefix .. 'dep:' .. ended.ref, from, from + 499)
      if #page == 0 then break end
      read_rows(page)
      for _, ref in ipairs(page) do settle_one(ref, ended) end
      from, settle_left = from + #page, settle_left - #page
    end
    if ended.dp and settle_left <= 0 then
      call('RPUSH', prefix .. 'unsettled', from .. ' ' .. ended.ref)
    end
  end
end

local function step(x) return x * 48271 % 2147483647 end

-- The wait in microseconds after failure number `failures`, none after none; the formula of `espalier_core::queue`, module `job`.
local function backoff(failures, salt)
  if failures == 0 then return 0 end
  local whole = math.min(1000 * 2 ^ math.min(failures - 1, 16), 300000)
  local half = floor(whole / 2)
  return (half + floor(half * step(step(salt % 2147483647)) / 2147483647)) * 1000
end

-- What a failed attempt makes of its job. `failure` is the stored form of the error, `asked` a wait in microseconds.
local function fail(job, class, failure, asked)
  if class ~= 'preempted' then
    put_string(prefix .. 'e:' .. job.ref, failure)
    job.er = 1
  end
  if job.cr or class == 'cancelled' then return end_job(job, 'C') end
  if class == 'preempted' then return set_state(job, 'R') end
  if class == 'invalid' then return end_job(job, 'X', 'invalid') end
  local spent, max, default, reason, free = 'fa', 'ma', 3, 'attempts', 0
  if class == 'infra' then spent, max, default, reason, free = 'fi', 'mi', 20, 'infra', 1 end
  local failures = (job[spent] or 0) + 1
  job[spent] = failures
  if failures >= (job[max] or default) then return end_job(job, 'X', reason) end
  local wait = math.max(backoff(failures - free, job.f), math.min(asked, 3600000000))
  if wait == 0 then return set_state(job, 'R') end
  job.un = now + wait
  set_state(job, 'D')
end
