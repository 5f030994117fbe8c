-- What time does: leases run out, delayed jobs come due.

local function revoke(job)
  local class, reason, message = 'infra', 'expired', 'lease of worker ' .. job.w .. ' expired'
  if job.ru and job.ru <= lease_now then
    class, reason = 'handler', 'ran_too_long'
    message = format('ran longer than `max_runtime`, %.0f ms', floor(job.mr / 1000))
  else
    call('HINCRBY', meta, 'expired', 1)
  end
  tell({'revoked', job.w, job.ref, job.f, reason})
  fail(job, class, cjson.encode({class = class, message = message}), 0)
end

local function due(index, moment, limit)
  write_indexes()
  local members = call('ZRANGE', prefix .. index, '-inf', moment, 'BYSCORE', 'LIMIT', 0, limit)
  local refs, jobs = {}, {}
  for n, member in ipairs(members) do refs[n] = member:sub(15) end
  read_rows(refs)
  for n, ref in ipairs(refs) do
    local job = load(ref)
    if job then jobs[#jobs + 1] = job else call('ZREM', prefix .. index, members[n]) end
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
  for _, job in ipairs(jobs) do set_state(job, 'R') end
  return #jobs
end
