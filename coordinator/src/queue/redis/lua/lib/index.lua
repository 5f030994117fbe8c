-- What many jobs of a script change in one key is gathered and written once: sorted sets and strings.
local changed, changed_keys, strings, progress_gone = {}, {}, {}, {}

-- `member` of the sorted set `key` gets `score`, a whole number; false takes it out. The last word counts.
local function put(key, member, score)
  local members = changed[key]
  if not members then
    members = {}
    changed[key] = members
    changed_keys[#changed_keys + 1] = key
  end
  members[member] = score
end

local function put_string(key, value)
  strings[#strings + 1] = key
  strings[#strings + 1] = value
end

-- Calls `command` with `values`, some at a time: a call takes some thousand at most.
local function in_pages(values, command, key)
  for from = 1, #values, 2000 do
    local to = math.min(from + 1999, #values)
    if key then call(command, key, unpack(values, from, to)) else call(command, unpack(values, from, to)) end
  end
end

local function write_index(key)
  local added, gone, many = {}, {}, 0
  for member, score in pairs(changed[key]) do
    if score then
      added[many + 1], added[many + 2] = format('%d', score), member
      many = many + 2
    else
      gone[#gone + 1] = member
    end
  end
  in_pages(gone, 'ZREM', key)
  in_pages(added, 'ZADD', key)
end

-- Rows and other strings; jobs are not used any more.
local function write_strings()
  for ref, job in pairs(changed_rows) do
    job.ref, job.b, job.id = nil, nil, nil
    put_string(prefix .. 'j:' .. ref, pack_row(job))
  end
  in_pages(strings, 'MSET')
  in_pages(progress_gone, 'HDEL', prefix .. 'progress')
  strings, progress_gone = {}, {}
end
