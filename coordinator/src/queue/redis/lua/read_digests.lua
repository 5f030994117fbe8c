-- how many, then of each: batch, job → digests, false where there is no such job.
local digests = {}
for n, ref in ipairs(take_refs()) do
  local job = ref and load(ref)
  digests[n] = job and job.d or false
end
return digests
