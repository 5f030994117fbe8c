-- Lanes: pairs of kind and needs, by number; `lanes` in the shard's hash is their version.
--
-- pl:<project> counts a project's jobs by lane, for lanes with needs: a project has few of those, lest it take the
-- room of all others. The limits are those of `espalier_core::queue`.
local LANES_MAX, PROJECT_LANES_MAX = 16384, 256
local lanes_known, lane_jobs, project_lanes, project_jobs = {}, {}, {}, {}

-- Whether `project` has jobs in the lane `value`, whose number is `lane` where it has one, or may have them there.
local function may_use(project, value, lane)
  local used = project_lanes[project]
  if not used then
    used = {many = call('HLEN', prefix .. 'pl:' .. project), values = {}}
    project_lanes[project] = used
  end
  if used.values[value] then return true end
  if not lane or call('HEXISTS', prefix .. 'pl:' .. project, lane) == 0 then
    if used.many >= PROJECT_LANES_MAX then return false end
    used.many = used.many + 1
  end
  used.values[value] = true
  return true
end

-- The number of the lane of `new` in batch `b`; nil: the project has no room for one more, or the queue has none.
local function lane_of(b, new, may_add)
  local value = new.k .. '\n' .. new.needs
  local lane = lanes_known[value] or call('HGET', prefix .. 'lane_of', value)
  if new.needs ~= '' and not may_use(batch(b).project, value, lane) then return nil end
  if not lane then
    if new.needs ~= '' and call('HLEN', prefix .. 'lanes') >= LANES_MAX then return nil end
    if not may_add then return '' end
    lane = format('%d', call('HINCRBY', meta, 'last_lane', 1))
    call('HSET', prefix .. 'lane_of', value, lane)
    call('HSET', prefix .. 'lanes', lane, value)
    call('HINCRBY', meta, 'lanes', 1)
  end
  lanes_known[value] = lane
  return lane
end

local function write_lanes()
  for lane, by in pairs(lane_jobs) do call('HINCRBY', prefix .. 'lane_jobs', lane, by) end
  for project, of_project in pairs(project_jobs) do
    for lane, by in pairs(of_project) do call('HINCRBY', prefix .. 'pl:' .. project, lane, by) end
  end
end
