-- number of shards, version of the layout, how many shares, those: project ('' for all others), weight → {number of
-- shards, version of the layout} as they are in the queue. Where those are others, nothing is changed.
local shards, version = take(), tonumber(take())
local found = call('HMGET', meta, 'shards', 'v')
if found[1] and found[1] ~= shards then return found end
if found[2] and tonumber(found[2]) ~= version then return found end
call('HSET', meta, 'shards', shards, 'v', version)
call('DEL', prefix .. 'weights')
for _ = 1, tonumber(take()) do call('HSET', prefix .. 'weights', take(), take()) end
return done({shards, version})
