-- how many, then of each: batch, job → {how many are ready or wait again, how many are known, whether some were left}.
local LOOKED_MAX = 5000
local queue, known, back = {}, 0, 0
for _ = 1, tonumber(take()) do
  local b, id = batch_number(take()), take()
  local job = b and load(b .. ':' .. id)
  if job then
    known = known + 1
    if job.s == 'X' then queue[#queue + 1] = job end
  end
end
table.sort(queue, function(a, b) return tonumber(a.n) < tonumber(b.n) end)

-- Whether something that the job needs can no longer succeed. What was purged unsucceeded cannot either.
local function is_doomed(job)
  for _, ref in ipairs(call('SMEMBERS', prefix .. 'need:' .. job.ref)) do
    local state = call('HGET', prefix .. 'j:' .. ref, 's')
    if not state or state == 'X' or state == 'C' then return true end
  end
  return false
end

local at = 1
while queue[at] and at <= LOOKED_MAX do
  local job = load(queue[at].ref)
  at = at + 1
  if job.s == 'X' and not is_doomed(job) then
    call('HDEL', prefix .. 'j:' .. job.ref, 'fa', 'fi')
    if batch(job.b).cancelled then call('HSET', prefix .. 'j:' .. job.ref, 'rq', 1) end
    set_waiting(job)
    back = back + 1
    local behind = job.dp and call('ZRANGE', prefix .. 'dep:' .. job.ref, 0, LOOKED_MAX) or {}
    for _, ref in ipairs(behind) do
      local dependent = load(ref)
      local died = dependent and dependent.s == 'X' and dependent.dr == 'dependency'
      -- One whose batch is being forgotten goes with it.
      if died and call('SISMEMBER', prefix .. 'purging', dependent.b) == 0 then queue[#queue + 1] = dependent end
    end
  end
end
return done({back, known, queue[at] and 1 or 0})
