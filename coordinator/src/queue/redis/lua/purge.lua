-- Two steps: `name` a batch that has been complete since `before` or longer, which takes its name away; then `empty`
-- it, some jobs in each call. What was named and not emptied is found under `purging`.
local step, before, limit = take(), tonumber(take()), tonumber(take())

local function forget_name(b)
  local known = call('HMGET', prefix .. 'b:' .. b, 'name', 'project')
  local project, name = known[1]:match('^([^/]+)/(.+)$')
  call('ZREM', prefix .. 'done', format('%010d', b))
  call('HDEL', prefix .. 'bn', known[1])
  call('ZREM', prefix .. 'pb:' .. known[2], name)
  call('ZREM', prefix .. 'pn:' .. known[2], b)
  call('SADD', prefix .. 'purging', b)
  if call('EXISTS', prefix .. 'pb:' .. known[2]) == 0 then
    for _, kind in ipairs({'0', '1', '2', '3', '4', '5'}) do call('HDEL', prefix .. 'v:' .. kind, known[2]) end
    call('HDEL', prefix .. 'projects', project)
    call('DEL', prefix .. 'p:' .. known[2])
  end
  return known[1]
end

local function leave_lane(lane, project)
  local used = prefix .. 'pl:' .. project
  if call('HEXISTS', used, lane) == 1 and call('HINCRBY', used, lane, -1) <= 0 then call('HDEL', used, lane) end
  if call('HINCRBY', prefix .. 'lane_jobs', lane, -1) > 0 then return end
  local value = call('HGET', prefix .. 'lanes', lane)
  call('HDEL', prefix .. 'lane_jobs', lane)
  call('HDEL', prefix .. 'lanes', lane)
  call('HDEL', prefix .. 'lane_of', value)
  call('HINCRBY', meta, 'lanes', 1)
end

local function forget_job(ref, project)
  local job = load(ref)
  leave_lane(job.l, project)
  if call('EXISTS', prefix .. 'p:' .. project) == 1 then
    call('HINCRBY', prefix .. 'p:' .. project, job.k .. job.s, -1)
  end
  local keys = {}
  for n, sort in ipairs({'j:', 's:', 'e:', 'dep:', 'need:', 'deps:'}) do keys[n] = prefix .. sort .. ref end
  call('DEL', unpack(keys))
end

if step == 'name' then
  local names = {}
  -- What waits for an end must hear of it before that is forgotten.
  if call('EXISTS', prefix .. 'unsettled') == 1 then return {} end
  local due = call('ZRANGE', prefix .. 'done', '-inf', before, 'BYSCORE', 'LIMIT', 0, limit)
  for n, place in ipairs(due) do names[n] = forget_name(tonumber(place)) end
  return done(names)
end

local b = call('SRANDMEMBER', prefix .. 'purging')
if not b then return done({}) end
local ids = call('ZRANGE', prefix .. 'bj:' .. b, 0, limit - 1)
local project = call('HGET', prefix .. 'b:' .. b, 'project')
local refs = {}
for n, id in ipairs(ids) do refs[n] = b .. ':' .. id end
read_rows(refs)
for n, id in ipairs(ids) do forget_job(refs[n], project) end
if #ids > 0 then call('ZREM', prefix .. 'bj:' .. b, unpack(ids)) end
if #ids < limit then
  for _, sort in ipairs({'b:', 'bd:', 'bc:', 'be:', 'bj:'}) do call('DEL', prefix .. sort .. b) end
  call('SREM', prefix .. 'purging', b)
end
return done({b})
