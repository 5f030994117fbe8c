-- Batches, read once in a script and written back once: their counters, and with those whether they are complete.
local batches, numbers_of = {}, {}
local STATES = {'B', 'D', 'R', 'L', 'S', 'X', 'C'}
local ENDED = {S = true, X = true, C = true}

-- The number of the batch `name`, which is `project/batch`; nil where there is none.
local function batch_number(name)
  if numbers_of[name] == nil then
    numbers_of[name] = call('HGET', prefix .. 'bn', name)
  end
  return numbers_of[name] or nil
end

local function batch(b)
  local known = batches[b]
  if not known then
    local v = call('HMGET', prefix .. 'b:' .. b, 'project', 'closed', 'cancelled', 'completed')
    known = {
      project = v[1], closed = v[2], cancelled = v[3], completed = v[4], moved = {},
      by_name = prefix .. 'bj:' .. b, by_end = prefix .. 'be:' .. b, queues = {},
    }
    batches[b] = known
  end
  return known
end

-- Lets batch `b` take no more chunks.
local function close(b)
  local known = batch(b)
  if known.closed then return end
  known.closed = '1'
  call('HSET', prefix .. 'b:' .. b, 'closed', 1)
  call('ZREM', prefix .. 'open', b)
  call('HINCRBY', prefix .. 'p:' .. known.project, 'open', -1)
end

-- A job of batch `b` and kind `kind` leaves state `from` and enters state `to`; either may be nil.
local function count(b, kind, from, to)
  local moved = batch(b).moved
  local of_kind = moved[kind] or {}
  moved[kind] = of_kind
  if from then of_kind[from] = (of_kind[from] or 0) - 1 end
  if to then of_kind[to] = (of_kind[to] or 0) + 1 end
end

-- Sets or clears the moment since which the batch is closed and all its jobs have ended.
local function settle_completion(b, known)
  local open = call('HMGET', prefix .. 'b:' .. b, 'B', 'D', 'R', 'L')
  local active = 0
  for n = 1, 4 do active = active + (tonumber(open[n]) or 0) end
  local is_done = known.closed and active == 0
  local place = format('%010d', b)
  if is_done and not known.completed then
    call('HSET', prefix .. 'b:' .. b, 'completed', now)
    call('ZADD', prefix .. 'done', now, place)
  elseif known.completed and not is_done then
    call('HDEL', prefix .. 'b:' .. b, 'completed')
    call('ZREM', prefix .. 'done', place)
  end
end

local function write_batches()
  for b, known in pairs(batches) do
    for kind, of_kind in pairs(known.moved) do
      for state, by in pairs(of_kind) do
        call('HINCRBY', prefix .. 'b:' .. b, state, by)
        call('HINCRBY', prefix .. 'p:' .. known.project, kind .. state, by)
      end
    end
    if known.project then settle_completion(b, known) end
  end
end
