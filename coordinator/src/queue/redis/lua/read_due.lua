-- how far to look in microseconds, most jobs to look at → of each kind, in the order of their numbers, how many jobs wait for a
-- moment that is no farther away.
local until_then, limit = format('%.0f', now + tonumber(take())), take()
local refs, due = {}, {0, 0, 0, 0, 0, 0}
for n, member in ipairs(call('ZRANGE', prefix .. 'delayed', '-inf', until_then, 'BYSCORE', 'LIMIT', 0, limit)) do
  refs[n] = member:sub(15)
end
read_rows(refs)
for _, ref in ipairs(refs) do
  local job = load(ref)
  if job then due[job.k + 1] = due[job.k + 1] + 1 end
end
return due
