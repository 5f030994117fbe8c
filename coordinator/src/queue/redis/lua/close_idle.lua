-- moment, number of the batch to go on after, how many to look at → {the last that was looked at, '' where that was all,
-- the names of those that were closed: open, without an active job, and nothing ended in them since the moment}.
local before, after, limit = tonumber(take()), take(), tonumber(take())
local closed = {}
local numbers = call('ZRANGE', prefix .. 'open', '(' .. after, '+inf', 'BYSCORE', 'LIMIT', 0, limit)
for _, b in ipairs(numbers) do
  local v = call('HMGET', prefix .. 'b:' .. b, 'B', 'D', 'R', 'L', 'opened', 'name')
  local active = 0
  for n = 1, 4 do active = active + (tonumber(v[n]) or 0) end
  local newest = call('ZRANGE', prefix .. 'be:' .. b, 0, 0, 'REV')[1]
  local job = newest and load(b .. ':' .. newest)
  local since = job and job.c or v[5]
  if active == 0 and tonumber(since) <= before then
    close(b)
    closed[#closed + 1] = v[6]
  end
end
return done({#numbers == limit and numbers[limit] or '', closed})
