-- → {now, batches that are not complete, stale, expired, lines}; of each project a line {project, kind, since when the
-- head of the line that has waited longest is ready} for each kind, then one {project, counters as fields and values}.
local TURNS = 562949953421312

-- Since when the oldest head of the lines of `project` in `lane` is ready: one line for each priority.
local function oldest_head(queue, oldest)
  local from = '-inf'
  for _ = 0, 9 do
    local head = call('ZRANGE', queue, from, '+inf', 'BYSCORE', 'LIMIT', 0, 1, 'WITHSCORES')
    if not head[1] then break end
    local job = load(head[1])
    if job and (not oldest or job.c < oldest) then oldest = job.c end
    from = format('%.0f', (floor(head[2] / TURNS) + 1) * TURNS)
  end
  return oldest
end

local lines = {}
local projects = call('HGETALL', prefix .. 'projects')
for n = 1, #projects, 2 do
  local counters = call('HGETALL', prefix .. 'p:' .. projects[n + 1])
  for kind = 0, 5 do
    local oldest
    for _, lane in ipairs(call('SMEMBERS', prefix .. 'in:' .. kind .. ':' .. projects[n + 1])) do
      oldest = oldest_head(prefix .. 'q:' .. lane .. ':' .. projects[n + 1], oldest)
    end
    lines[#lines + 1] = {projects[n], kind, oldest or ''}
  end
  lines[#lines + 1] = {projects[n], counters}
end
local counted = call('HMGET', meta, 'stale', 'expired')
local open = call('HLEN', prefix .. 'bn') - call('ZCARD', prefix .. 'done')
return {now, open, counted[1] or 0, counted[2] or 0, lines}
