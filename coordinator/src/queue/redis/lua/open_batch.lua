-- project, batch, digest of the parameters, defaults, most open batches of a project → number of the batch, or -1: it
-- is open with other parameters, or -2: as many others are.
local project_name, name, digest, defaults, open_max = take(), take(), take(), take(), tonumber(take())
local full = project_name .. '/' .. name
local known = batch_number(full)
if known then
  local same = call('HGET', prefix .. 'b:' .. known, 'digest') == digest
  return done(same and tonumber(known) or -1)
end
local project = call('HGET', prefix .. 'projects', project_name)
local open = project and tonumber(call('HGET', prefix .. 'p:' .. project, 'open')) or 0
if open >= open_max then return done(-2) end
if not project then
  project = format('%08x', call('HINCRBY', meta, 'last_project', 1))
  call('HSET', prefix .. 'projects', project_name, project)
  call('HSET', prefix .. 'p:' .. project, 'name', project_name)
end
local b = call('HINCRBY', meta, 'last_batch', 1)
call('HSET', prefix .. 'b:' .. b, 'name', full, 'project', project, 'digest', digest, 'opened', now)
call('SET', prefix .. 'bd:' .. b, defaults)
call('HSET', prefix .. 'bn', full, b)
call('ZADD', prefix .. 'pb:' .. project, 0, name)
call('ZADD', prefix .. 'pn:' .. project, b, b)
call('ZADD', prefix .. 'open', b, b)
call('HINCRBY', prefix .. 'p:' .. project, 'open', 1)
return done(b)
