-- project, batch, digest of the parameters, defaults → number of the batch, or -1: it is open with other parameters.
local project_name, name, digest, defaults = take(), take(), take(), take()
local full = project_name .. '/' .. name
local known = batch_number(full)
if known then
  local same = call('HGET', prefix .. 'b:' .. known, 'digest') == digest
  return done(same and tonumber(known) or -1)
end
local project = call('HGET', prefix .. 'projects', project_name)
if not project then
  project = string.format('%08x', call('HINCRBY', meta, 'last_project', 1))
  call('HSET', prefix .. 'projects', project_name, project)
  call('HSET', prefix .. 'p:' .. project, 'name', project_name)
end
local b = call('HINCRBY', meta, 'last_batch', 1)
call('HSET', prefix .. 'b:' .. b, 'name', full, 'project', project, 'digest', digest, 'opened', now)
call('SET', prefix .. 'bd:' .. b, defaults)
call('HSET', prefix .. 'bn', full, b)
call('ZADD', prefix .. 'pb:' .. project, 0, name)
return done(b)
