-- batch, then 'named' with ids, 'listed' with the name to begin after ('' for all) and a limit, or 'ended' with the
-- end number to begin after and a limit → {outage, batch, jobs}, or {}: there is no such batch.
local name, how = ARGV[3], ARGV[4]
local b = batch_number(name)
if not b then return {} end
local ids = {}
if how == 'named' then
  for n = 5, #ARGV do ids[#ids + 1] = ARGV[n] end
elseif how == 'listed' then
  local from = ARGV[5] == '' and '-' or '(' .. ARGV[5]
  ids = call('ZRANGE', prefix .. 'bj:' .. b, from, '+', 'BYLEX', 'LIMIT', 0, ARGV[6])
else
  ids = call('ZRANGE', prefix .. 'be:' .. b, '(' .. ARGV[5], '+inf', 'BYSCORE', 'LIMIT', 0, ARGV[6])
end
local jobs, refs = {}, {}
for n, id in ipairs(ids) do refs[n] = b .. ':' .. id end
read_rows(refs)
for _, id in ipairs(ids) do jobs[#jobs + 1] = view_job(b, id) end
return {outage, view_batch(b), jobs}
