-- how many, then of each: batch, job → {how many are ready or wait again, how many are known, whether some were left}.
local LOOKED_MAX = 5000
local queue, known, back = {}, 0, 0
for _, ref in ipairs(take_refs()) do
  local job = ref and load(ref)
  if job then
    known = known + 1
    if job.s == 'X' then queue[#queue + 1] = job end
  end
end
table.sort(queue, function(a, b) return a.n < b.n end)

-- Whether something that the job needs can no longer succeed. What was purged unsucceeded cannot either.
local function is_doomed(job)
  for _, ref in ipairs(call('SMEMBERS', prefix .. 'need:' .. job.ref)) do
    local needed = load(ref)
    if not needed or needed.s == 'X' or needed.s == 'C' then return true end
  end
  return false
end

local at = 1
while queue[at] and at <= LOOKED_MAX do
  local job = queue[at]
  at = at + 1
  if job.s == 'X' and not is_doomed(job) then
    job.fa, job.fi = nil, nil
    if batch(job.b).cancelled then job.rq = 1 end
    set_waiting(job)
    back = back + 1
    local behind = job.dp and call('ZRANGE', prefix .. 'dep:' .. job.ref, 0, LOOKED_MAX) or {}
    read_rows(behind)
    for _, ref in ipairs(behind) do
      local dependent = load(ref)
      local died = dependent and dependent.s == 'X' and dependent.dr == 'dependency'
      -- One whose batch is being forgotten goes with it.
      if died and call('SISMEMBER', prefix .. 'purging', dependent.b) == 0 then queue[#queue + 1] = dependent end
    end
  end
end
return done({back, known, queue[at] and 1 or 0})
