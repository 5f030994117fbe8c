-- how many, then of each: batch, job → digests, false where there is no such job.
local digests = {}
for n = 1, tonumber(take()) do
  local b, id = batch_number(take()), take()
  digests[n] = b and call('HGET', prefix .. 'j:' .. b .. ':' .. id, 'd') or false
end
return digests
