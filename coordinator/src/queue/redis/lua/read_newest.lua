-- project, number to begin before ('+inf' for all), limit → batches, the newest first.
local project = call('HGET', prefix .. 'projects', ARGV[3])
if not project then return {} end
local found = {}
for _, b in ipairs(call('ZRANGE', prefix .. 'pn:' .. project, ARGV[4], '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, ARGV[5])) do
  found[#found + 1] = view_batch(b)
end
return found
