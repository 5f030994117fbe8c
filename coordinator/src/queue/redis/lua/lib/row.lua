-- Rows of jobs: read many at a time, kept while a script runs, and written back once at its end.
--
-- A row is the string j:<batch>:<id>, a map in MessagePack. `ref` is <batch>:<id>; a job is its row's fields with
-- `ref`, `b` and `id` beside them, which are not stored.
local ROWS_A_CALL = 1000
local pack_row, unpack_row = cmsgpack.pack, cmsgpack.unpack
local rows, changed_rows = {}, {}

local function read_some(refs, from, to)
  local keys = {}
  for n = from, to do keys[#keys + 1] = prefix .. 'j:' .. refs[n] end
  for n, packed in ipairs(call('MGET', unpack(keys))) do
    local ref = refs[from + n - 1]
    local job = packed and unpack_row(packed)
    if job then
      local colon = ref:find(':', 1, true)
      job.ref, job.b, job.id = ref, ref:sub(1, colon - 1), ref:sub(colon + 1)
    end
    rows[ref] = job
  end
end

-- Reads what will be loaded, so that it is one call.
local function read_rows(refs)
  local unknown = {}
  for _, ref in ipairs(refs) do
    if rows[ref] == nil then unknown[#unknown + 1] = ref end
  end
  for from = 1, #unknown, ROWS_A_CALL do
    read_some(unknown, from, math.min(from + ROWS_A_CALL - 1, #unknown))
  end
end

-- The job `ref`; nil where there is none.
local function load(ref)
  if rows[ref] == nil then read_some({ref}, 1, 1) end
  return rows[ref] or nil
end

-- Notes that the row of `job` is to be written.
local function touch(job)
  rows[job.ref] = job
  changed_rows[job.ref] = job
end

-- How many, then of each: batch, job → the refs, false where there is no such batch. Their rows are read.
local function take_refs()
  local refs, known = {}, {}
  for n = 1, tonumber(take()) do
    local b, id = batch_number(take()), take()
    refs[n] = b and b .. ':' .. id or false
    if refs[n] then known[#known + 1] = refs[n] end
  end
  read_rows(known)
  return refs
end
