-- batch, chunk number, digest of the chunk, first job number ('' to draw), how many numbers to draw, how many jobs,
-- the jobs → {'ok', whether the chunk was known, first job number, verdicts}, or one word for a refusal of all.
local name, n, digest, base, size, many = take(), take(), take(), tonumber(take()), take(), take()
local b = batch_number(name)
if not b then return {'unknown'} end
local known = call('HGET', prefix .. 'bc:' .. b, n)
if known and known ~= digest then return {'other'} end
local is_closed = batch(b).closed
if is_closed and not known then return {'closed'} end
if not base then
  base = next_job
  next_job = next_job + size
end
local jobs, refs, verdicts, is_there = {}, {}, {}, false
for i = 1, tonumber(many) do
  jobs[i] = take_job(base)
  refs[i] = b .. ':' .. jobs[i].id
end
read_rows(refs)
for i, new in ipairs(jobs) do
  local verdict, deps = judge(b, new, is_closed, is_closed)
  if verdict == 1 then enter_job(b, new, deps) end
  is_there = is_there or verdict >= 0
  verdicts[i] = verdict
end
settle()
write_lanes()
if is_there and not known then call('HSET', prefix .. 'bc:' .. b, n, digest) end
return done({'ok', known and 1 or 0, base, verdicts})
