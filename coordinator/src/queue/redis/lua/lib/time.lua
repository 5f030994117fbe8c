-- What time does: leases run out, delayed jobs come due.

local function revoke(job)
  local class, reason, message = 'infra', 'expired', 'lease of worker ' .. job.w .. ' expired'
  if job.ru and tonumber(job.ru) <= lease_now then
    class, reason = 'handler', 'ran_too_long'
    message = string.format('ran longer than `max_runtime`, %.0f ms', floor(job.mr / 1000))
  else
    call('HINCRBY', meta, 'expired', 1)
  end
  events[#events + 1] = {'revoked', job.w, job.ref, job.f, reason}
  fail(job, class, cjson.encode({class = class, message = message}), 0)
end

local function due(index, moment, limit)
  write_indexes()
  local members = call('ZRANGE', prefix .. index, '-inf', moment, 'BYSCORE', 'LIMIT', 0, limit)
  local jobs = {}
  for _, member in ipairs(members) do
    local job = load(member:sub(15))
    if job then jobs[#jobs + 1] = job else call('ZREM', prefix .. index, member) end
  end
  return jobs
end

local function reap(limit)
  local jobs = due('leased', lease_now, limit)
  for _, job in ipairs(jobs) do revoke(job) end
  settle()
  return #jobs
end

local function promote(limit)
  local jobs = due('delayed', now, limit)
  for _, job in ipairs(jobs) do set_state(job, 'R', {}) end
  return #jobs
end
