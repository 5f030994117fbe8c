-- Every script begins here: what it is told, the time, and the numbers that it draws from.
--
-- KEYS[1] is the shard's own hash; its name gives the prefix of all other keys, so that they share one slot.
-- ARGV[1] is the time in microseconds in tests, else empty: only the server's clock counts.
-- ARGV[2] is the silence in microseconds that counts as an outage; empty where none does.
local call, floor, format = redis.call, math.floor, string.format
local argv = ARGV
local meta = KEYS[1]
local prefix = meta:sub(1, -2)
local arg = 2

local function take()
  arg = arg + 1
  return argv[arg]
end

local numbers = call('HMGET', meta, 'now', 'fence', 'end', 'job', 'outage', 'skew')
local last_fence = tonumber(numbers[2]) or 0
local next_end = tonumber(numbers[3]) or 1
local next_job = tonumber(numbers[4]) or 0
-- Deadlines are kept in a time that stands still during outages: nobody could renew then.
local outage = tonumber(numbers[5]) or 0

-- How far the server's clock lies behind the queue's time, which does not go back: after a large step back, as at a
-- failover to a server that is behind, time goes on from where it was, lest nothing came due until it is caught up.
local skew = tonumber(numbers[6]) or 0
local now = tonumber(ARGV[1])
if not now then
  local time = call('TIME')
  now = time[1] * 1000000 + time[2] + skew
end
local seen = tonumber(numbers[1]) or now
if ARGV[1] == '' and seen - now > 1000000 then skew = skew + seen - now end
if now < seen then now = seen end
if ARGV[2] ~= '' and now - seen > tonumber(ARGV[2]) then
  outage = outage + now - seen
end
local lease_now = now - outage
