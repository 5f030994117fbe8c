-- how many, then of each: batch, job → {how many were cancelled, how many were asked to stop, how many are known}.
local waiting, cancelled, requested, known = {}, 0, 0, 0
for _, ref in ipairs(take_refs()) do
  local job = ref and load(ref)
  if job then
    known = known + 1
    if job.s == 'L' then
      requested = requested + 1
      if not job.cr then
        job.cr = 1
        touch(job)
        tell({'cancel', job.w, job.ref, job.f})
      end
    elseif not ENDED[job.s] then
      waiting[#waiting + 1] = job
    end
  end
end
table.sort(waiting, function(a, b) return a.n < b.n end)
for _, job in ipairs(waiting) do end_job(job, 'C') end
settle()
-- With those that followed: of a batch that goes page by page, some come before their turn.
for _, of in pairs(batches) do
  for _, moved in pairs(of.moved) do cancelled = cancelled + (moved.C or 0) end
end
return done({cancelled, requested, known})
