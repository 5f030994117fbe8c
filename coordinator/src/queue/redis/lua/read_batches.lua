-- project, name to begin after ('' for all), limit → batches by name.
local project = call('HGET', prefix .. 'projects', ARGV[3])
if not project then return {} end
local from = ARGV[4] == '' and '-' or '(' .. ARGV[4]
local found = {}
for _, name in ipairs(call('ZRANGE', prefix .. 'pb:' .. project, from, '+', 'BYLEX', 'LIMIT', 0, ARGV[5])) do
  found[#found + 1] = view_batch(batch_number(ARGV[3] .. '/' .. name))
end
return found
