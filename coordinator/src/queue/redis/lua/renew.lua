-- how many, then of each: batch, job, fence, progress ('' to keep the last) → {deadline, cancel requested}, or {}.
local replies = {}
for n = 1, tonumber(take()) do
  local b, id, fence, progress = batch_number(take()), take(), take(), take()
  local ref = b and b .. ':' .. id
  local row = ref and prefix .. 'j:' .. ref
  local held = ref and call('HMGET', row, 's', 'f', 'dl', 'tt', 'ru', 'cr', 'n')
  replies[n] = {}
  if held and held[1] == 'L' and held[2] == fence and tonumber(held[3]) > lease_now then
    local deadline = lease_now + held[4]
    if held[5] then deadline = math.min(deadline, tonumber(held[5])) end
    deadline = math.max(deadline, tonumber(held[3]))
    call('HSET', row, 'dl', deadline)
    call('ZADD', prefix .. 'leased', deadline, in_order({n = held[7], ref = ref}))
    if progress ~= '' then call('HSET', prefix .. 'progress', ref, progress) end
    replies[n] = {deadline + outage, held[6] and 1 or 0}
  end
end
return done(replies)
