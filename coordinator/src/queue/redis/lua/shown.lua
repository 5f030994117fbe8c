-- list, time to live in microseconds, how many versions are known, then of each: coordinator, version → of every
-- coordinator that is here {its id, version, entries}; without entries where the version is known.
local list, ttl, known = take(), tonumber(take()), {}
for _ = 1, tonumber(take()) do
  local by = take()
  known[by] = take()
end
local after = format('(%.0f', now - ttl)
local shown = {}
for _, by in ipairs(call('ZRANGE', prefix .. 'here', after, '+inf', 'BYSCORE', 'LIMIT', 0, 256)) do
  local lists = prefix .. 'told:' .. by
  local version = call('HGET', lists, list)
  if version and known[by] == version then
    shown[#shown + 1] = {by, version}
  elseif version then
    shown[#shown + 1] = {by, version, call('HGETALL', lists .. ':' .. list)}
  end
end
return shown
