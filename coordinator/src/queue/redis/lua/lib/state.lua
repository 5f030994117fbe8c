-- Jobs move from state to state here and nowhere else, with all indexes and counters kept in step.
--
-- A job is the hash j:<batch>:<id>; `ref` is <batch>:<id>. States: B blocked, D delayed, R ready, L leased,
-- S succeeded, X dead, C cancelled.
local DETAILS = {
  D = {'un'}, L = {'w', 'f', 'ga', 'dl', 'tt', 'ru', 'rs', 'cr'}, S = {'en'}, X = {'en', 'dr'}, C = {'en'},
}
local just_ended, events = {}, {}

local function load(ref)
  local fields = call('HGETALL', prefix .. 'j:' .. ref)
  if #fields == 0 then return nil end
  local job = {ref = ref}
  for n = 1, #fields, 2 do job[fields[n]] = fields[n + 1] end
  local colon = ref:find(':', 1, true)
  job.b, job.id = ref:sub(1, colon - 1), ref:sub(colon + 1)
  return job
end

-- A member of an index by time: those of one moment are in the order of submission.
local function in_order(job)
  return string.format('%013x:', job.n) .. job.ref
end

local function leave(job)
  local state = job.s
  if state == 'R' then
    remove_ready(job)
  elseif state == 'D' then
    put(prefix .. 'delayed', in_order(job), false)
  elseif state == 'L' then
    put(prefix .. 'leased', in_order(job), false)
    progress_gone[#progress_gone + 1] = job.ref
  elseif ENDED[state] then
    put(prefix .. 'be:' .. job.b, job.id, false)
  end
end

local function enter(job)
  local state = job.s
  if state == 'R' then
    push_ready(job)
  elseif state == 'D' then
    put(prefix .. 'delayed', in_order(job), job.un)
  elseif state == 'L' then
    put(prefix .. 'leased', in_order(job), job.dl)
  elseif ENDED[state] then
    put(prefix .. 'be:' .. job.b, job.id, job.en)
  end
end

-- Moves `job` to `to`; `fields` are names and values that the state, or the move, sets. Those of `job.also` go with
-- them, so that a row is written once.
local function set_state(job, to, fields)
  leave(job)
  count(job.b, job.k, job.s, to)
  local key, old = prefix .. 'j:' .. job.ref, DETAILS[job.s]
  if old then
    call('HDEL', key, unpack(old))
    for _, name in ipairs(old) do job[name] = nil end
  end
  job.s, job.c = to, now
  for n = 1, #fields, 2 do job[fields[n]] = fields[n + 1] end
  for _, field in ipairs(job.also or {}) do fields[#fields + 1] = field end
  job.also = nil
  call('HSET', key, 's', to, 'c', now, unpack(fields))
  enter(job)
end

local function end_job(job, how, reason)
  local fields = {'en', next_end}
  if reason then fields[3], fields[4] = 'dr', reason end
  next_end = next_end + 1
  set_state(job, how, fields)
  just_ended[#just_ended + 1] = job
end
