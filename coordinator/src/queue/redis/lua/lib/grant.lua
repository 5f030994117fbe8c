-- Which job goes next, what that costs its project, and the lease that it gets.
local weights, clocks = {}, {}

-- The head of the least project among `lanes`: by virtual time, then number of the project, then its turn.
local function next_ready(lanes)
  local best
  for _, lane in ipairs(lanes) do
    local head = call('ZRANGE', prefix .. 'g:' .. lane, 0, 0, 'WITHSCORES')
    local project, vtime = head[1], tonumber(head[2])
    if project and (not best or vtime < best.vtime or (vtime == best.vtime and project <= best.project)) then
      local first = call('ZRANGE', prefix .. 'q:' .. lane .. ':' .. project, 0, 0, 'WITHSCORES')
      local turn = tonumber(first[2])
      local same = best and vtime == best.vtime and project == best.project
      if not same or turn < best.turn then
        best = {vtime = vtime, project = project, turn = turn, ref = first[1]}
      end
    end
  end
  if best then return best.ref, best.project end
end

local function weight_of(project)
  if not weights[project] then
    local name = call('HGET', prefix .. 'p:' .. project, 'name')
    local found = call('HMGET', prefix .. 'weights', name, '')
    weights[project] = tonumber(found[1] or found[2]) or 100
  end
  return weights[project]
end

-- Moves a project on by one grant. It may lag behind the clock, where no worker drew from its lanes; it catches up
-- by one stride at most, lest it take a long turn alone.
local function charge(kind, project)
  local v = call('HMGET', prefix .. 'v:' .. kind, '', project)
  local clock, vtime = tonumber(v[1]) or 0, tonumber(v[2]) or 0
  local stride = floor(STRIDE / math.max(1, math.min(1000, weight_of(project))))
  local start = math.max(vtime, clock - stride, 0)
  if start > clock then call('HSET', prefix .. 'v:' .. kind, '', start) end
  move(kind, project, start + stride)
end

-- The fields of a new lease on `job`, with a fence above all others.
local function grant(job, worker, ttl)
  last_fence = math.max(last_fence + 1, now)
  local deadline = lease_now + ttl
  local fields = {'w', worker, 'f', last_fence, 'ga', now, 'tt', ttl, 'rs', job.c, 'st', (job.st or 0) + 1}
  if job.mr then
    local ends = lease_now + job.mr
    deadline = math.min(deadline, ends)
    fields[#fields + 1], fields[#fields + 2] = 'ru', ends
  end
  fields[#fields + 1], fields[#fields + 2] = 'dl', deadline
  return fields
end
