-- Jobs move from state to state here and nowhere else, with all indexes and counters kept in step.
--
-- States: B blocked, D delayed, R ready, L leased, S succeeded, X dead, C cancelled.
local DETAILS = {
  D = {'un'}, L = {'w', 'f', 'ga', 'dl', 'tt', 'ru', 'rs', 'cr', 'pr'}, S = {'en'}, X = {'en', 'dr'}, C = {'en'},
}
local DELAYED, LEASED = prefix .. 'delayed', prefix .. 'leased'
local just_ended, events = {}, {}

-- Tells listeners: what, worker, job, fence, and what more there is. JSON has too few digits for the number of a fence.
local function tell(event)
  event[4] = format('%.0f', event[4])
  events[#events + 1] = event
end

-- A member of an index by time: those of one moment are in the order of submission.
local function in_order(job)
  return format('%013x:', job.n) .. job.ref
end

local function leave(job)
  local state = job.s
  if state == 'R' then
    remove_ready(job)
  elseif state == 'D' then
    put(DELAYED, in_order(job), false)
  elseif state == 'L' then
    put(LEASED, in_order(job), false)
    if job.pr then progress_gone[#progress_gone + 1] = job.ref end
  elseif ENDED[state] then
    put(batch(job.b).by_end, job.id, false)
  end
end

local function enter(job)
  local state = job.s
  if state == 'R' then
    push_ready(job)
  elseif state == 'D' then
    put(DELAYED, in_order(job), job.un)
  elseif state == 'L' then
    put(LEASED, in_order(job), job.dl)
  elseif ENDED[state] then
    put(batch(job.b).by_end, job.id, job.en)
  end
end

-- Moves `job` to `to`, whose own fields it has already: none of them is one of the state that it leaves.
local function set_state(job, to)
  leave(job)
  count(job.b, job.k, job.s, to)
  local old = DETAILS[job.s]
  if old then
    for n = 1, #old do job[old[n]] = nil end
  end
  job.s, job.c = to, now
  touch(job)
  enter(job)
end

local function end_job(job, how, reason)
  job.en, job.dr = next_end, reason
  next_end = next_end + 1
  set_state(job, how)
  just_ended[#just_ended + 1] = job
end
