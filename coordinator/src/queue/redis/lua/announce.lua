-- coordinator, time to live in microseconds, how many changes, then of each: list, key, 1 or 0 to take it away, value
-- → 1 where what the coordinator showed before is still seen, else 0.
--
-- told:<coordinator> has the version of each of its lists, told:<coordinator>:<list> the entries.
local by, ttl, here = take(), tonumber(take()), prefix .. 'here'

local function forget(gone)
  local lists = prefix .. 'told:' .. gone
  for _, list in ipairs(call('HKEYS', lists)) do call('UNLINK', lists .. ':' .. list) end
  call('DEL', lists)
  call('ZREM', here, gone)
end

for _, gone in ipairs(call('ZRANGE', here, '-inf', now - ttl, 'BYSCORE', 'LIMIT', 0, 16)) do forget(gone) end
local last = tonumber(call('ZSCORE', here, by) or nil)
if last and last <= now - ttl then
  forget(by)
  last = nil
end
call('ZADD', here, now, by)
local changed = {}
for _ = 1, tonumber(take()) do
  local list, key, there, value = take(), take(), take(), take()
  local entries = prefix .. 'told:' .. by .. ':' .. list
  if there == '1' then call('HSET', entries, key, value) else call('HDEL', entries, key) end
  changed[list] = true
end
for list in pairs(changed) do call('HSET', prefix .. 'told:' .. by, list, call('INCR', prefix .. 'told')) end
return last and 1 or 0
