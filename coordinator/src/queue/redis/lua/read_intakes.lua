-- how many, then of each: batch, chunk number → {number of the batch, digest of the chunk or '', jobs of the project that
-- wait}, or {}: there is no such batch.
local fields, waiting, intakes = {}, {}, {}
for kind = 0, 5 do
  for _, state in ipairs({'B', 'D', 'R'}) do fields[#fields + 1] = kind .. state end
end

local function waits(project)
  if not waiting[project] then
    local sum = 0
    for _, some in pairs(call('HMGET', prefix .. 'p:' .. project, unpack(fields))) do sum = sum + (tonumber(some) or 0) end
    waiting[project] = sum
  end
  return waiting[project]
end

for n = 1, tonumber(take()) do
  local b, chunk = batch_number(take()), take()
  intakes[n] = b and {b, call('HGET', prefix .. 'bc:' .. b, chunk) or '', waits(batch(b).project)} or {}
end
return intakes
