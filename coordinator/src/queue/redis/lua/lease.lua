-- worker, request ('' for none), kind, most grants, TTL in microseconds, version of the lanes, how many lanes, the
-- lanes → {version of the lanes, grants}; without grants where the version is another, so that the caller asks again.
local worker, request, kind, most, ttl, version = take(), take(), take(), tonumber(take()), tonumber(take()), take()
local lanes = {}
for n = 1, tonumber(take()) do lanes[n] = take() end
-- Most lines times grants of one call, and the fewest jobs of a line that are read at a time.
local LOOKS_MAX, PAGE_MIN = 100000, 8
local memory = prefix .. 'asked:' .. worker .. ':' .. request

-- What the caller is told of leased jobs.
local function told(jobs)
  local keys, grants = {}, {}
  for n, job in ipairs(jobs) do keys[n] = prefix .. 's:' .. job.ref end
  local specs = #keys > 0 and call('MGET', unpack(keys))
  for n, job in ipairs(jobs) do
    local ends = job.ru and job.ru + outage or ''
    grants[n] = {job.b, job.k, job.id, job.n, job.f, job.st, job.dl + outage, ends, job.t, job.rs,
      job.L or '', job.T or '', specs[n]}
  end
  return grants
end

local function repeated(asked)
  local jobs = {}
  for ref, fence in asked:gmatch(' (%S+) (%d+)') do
    local job = load(ref)
    if job and job.s == 'L' and job.f == tonumber(fence) then jobs[#jobs + 1] = job end
  end
  return told(jobs)
end

local asked = request ~= '' and call('GET', memory)
if asked and now - tonumber(asked:match('^%d+')) < 30000000 then return done({version, repeated(asked)}) end

local current = call('HGET', meta, 'lanes') or '0'
if current ~= version then return {current, {}} end
reap(64)
promote(64)
write_indexes()
local jobs, remembered = {}, {format('%.0f', now)}
if most > 0 then
  for _, lane in ipairs(lanes) do read_ring(lane, most) end
end
table.sort(order, goes_before)
-- What many lines cost each grant is bounded; the caller asks again.
most = math.min(most, math.max(1, floor(LOOKS_MAX / math.max(1, line_count))))
local page = math.max(PAGE_MIN, math.ceil(most / math.max(1, line_count)))
while #jobs < most do
  local line, job = next_head(page)
  if not job then break end
  line.at = line.at + 1
  charge(kind, order[1])
  reorder()
  grant(job, worker, ttl)
  jobs[#jobs + 1] = job
  remembered[#remembered + 1] = format('%s %d', job.ref, job.f)
end
write_vtimes(kind)
if request ~= '' and #jobs > 0 then call('SET', memory, table.concat(remembered, ' '), 'PX', 31000) end
return done({current, told(jobs)})
