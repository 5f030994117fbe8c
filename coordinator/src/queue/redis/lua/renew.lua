-- how many, then of each: batch, job, fence, progress ('' to keep the last) → {deadline, cancel requested}, or {}.
local renewals, refs, replies = {}, {}, {}
for n = 1, tonumber(take()) do
  local b, id = batch_number(take()), take()
  renewals[n] = {ref = b and b .. ':' .. id, fence = tonumber(take()), progress = take()}
  refs[#refs + 1] = renewals[n].ref
end
read_rows(refs)
for n, renewal in ipairs(renewals) do
  local job = renewal.ref and load(renewal.ref)
  replies[n] = {}
  if job and job.s == 'L' and job.f == renewal.fence and job.dl > lease_now then
    local deadline = lease_now + job.tt
    if job.ru then deadline = math.min(deadline, job.ru) end
    job.dl = math.max(deadline, job.dl)
    if renewal.progress ~= '' then
      job.pr = 1
      call('HSET', prefix .. 'progress', job.ref, renewal.progress)
    end
    touch(job)
    put(LEASED, in_order(job), job.dl)
    replies[n] = {job.dl + outage, job.cr and 1 or 0}
  end
end
return done(replies)
