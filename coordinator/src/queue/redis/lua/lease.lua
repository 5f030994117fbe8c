-- worker, request ('' for none), kind, most grants, TTL in microseconds, version of the lanes, how many lanes, the
-- lanes → {version of the lanes, grants}; without grants where the version is another, so that the caller asks again.
local worker, request, kind, most, ttl, version = take(), take(), take(), tonumber(take()), tonumber(take()), take()
local lanes = {}
for n = 1, tonumber(take()) do lanes[n] = take() end
local memory = prefix .. 'asked:' .. worker .. ':' .. request

local function grant_of(job)
  local ends = job.ru and tonumber(job.ru) + outage or ''
  return {job.b, job.k, job.id, job.n, job.f, job.st, tonumber(job.dl) + outage, ends, job.t, job.rs, job.L or '', job.T or '',
    call('GET', prefix .. 's:' .. job.ref)}
end

local function repeated(asked)
  local grants = {}
  for ref, fence in asked:gmatch(' (%S+) (%d+)') do
    local job = load(ref)
    if job and job.s == 'L' and job.f == fence then grants[#grants + 1] = grant_of(job) end
  end
  return grants
end

local asked = request ~= '' and call('GET', memory)
if asked and now - tonumber(asked:match('^%d+')) < 30000000 then return done({version, repeated(asked)}) end

local current = call('HGET', meta, 'lanes') or '0'
if current ~= version then return {current, {}} end
reap(64)
promote(64)
write_ready()
local grants, remembered = {}, {string.format('%.0f', now)}
while #grants < most do
  local ref, project = next_ready(lanes)
  if not ref then break end
  charge(kind, project)
  local job = load(ref)
  local fields = grant(job, worker, ttl)
  set_state(job, 'L', fields)
  grants[#grants + 1] = grant_of(job)
  remembered[#remembered + 1] = string.format('%s %.0f', ref, job.f)
end
if request ~= '' and #grants > 0 then call('SET', memory, table.concat(remembered, ' '), 'PX', 31000) end
return done({current, grants})
