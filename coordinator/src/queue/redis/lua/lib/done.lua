-- Every script that changes something ends here: what was gathered is written, and whoever listens is told.

-- The full name of the job `ref`, for listeners.
local function name_of(ref)
  local colon = ref:find(':', 1, true)
  local batch_name = call('HGET', prefix .. 'b:' .. ref:sub(1, colon - 1), 'name')
  return batch_name .. '/' .. ref:sub(colon + 1)
end

local function done(reply)
  write_indexes()
  write_strings()
  write_batches()
  call('HSET', meta, 'now', now, 'fence', last_fence, 'end', next_end, 'job', next_job, 'outage', outage,
    'skew', skew)
  local told = {}
  for lane in pairs(woken) do
    told[#told + 1] = {'ready', call('HGET', prefix .. 'lanes', lane) or ''}
  end
  for _, event in ipairs(events) do
    event[3] = name_of(event[3])
    told[#told + 1] = event
  end
  if #told > 0 then call('PUBLISH', prefix .. 'events', cjson.encode(told)) end
  return reply
end
