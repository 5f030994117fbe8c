-- What can be seen of a job or a batch; `decode.rs` reads the same lists.

-- The names of the jobs that the job `ref` was submitted behind, as far as they have not been purged.
local function deps_of(ref)
  local names = {}
  for _, dep in ipairs(call('SMEMBERS', prefix .. 'deps:' .. ref)) do
    local colon = dep:find(':', 1, true)
    local batch_name = call('HGET', prefix .. 'b:' .. dep:sub(1, colon - 1), 'name')
    if batch_name and load(dep) then
      names[#names + 1] = batch_name .. '/' .. dep:sub(colon + 1)
    end
  end
  return names
end

local APART = {ref = true, b = true, id = true, o = true}

-- The fields of a row with their values, as those of a hash are listed, but for those that are told apart.
local function listed(job)
  local fields = {}
  for name, value in pairs(job) do
    if not APART[name] then
      fields[#fields + 1] = name
      fields[#fields + 1] = type(value) == 'number' and format('%.0f', value) or value
    end
  end
  return fields
end

-- id, fields and values, lane, how many it waits for, its dependencies, error, result, progress.
local function view_job(b, id)
  local ref = b .. ':' .. id
  local job = load(ref)
  if not job then return nil end
  local waits = call('EXISTS', prefix .. 'deps:' .. ref) == 1
  return {
    id, listed(job), call('HGET', prefix .. 'lanes', job.l) or '',
    waits and call('SCARD', prefix .. 'need:' .. ref) or 0, waits and deps_of(ref) or {},
    job.er and call('GET', prefix .. 'e:' .. ref) or '',
    job.o or '',
    job.pr and call('HGET', prefix .. 'progress', ref) or '',
  }
end

-- number, fields and values, number of the newest end.
local function view_batch(b)
  local newest = call('ZRANGE', prefix .. 'be:' .. b, 0, 0, 'REV', 'WITHSCORES')
  return {b, call('HGETALL', prefix .. 'b:' .. b), newest[2] or '0'}
end
