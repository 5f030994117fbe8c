-- batch, '1' to cancel it as a whole → 1, or 0: there is none.
local b, cancels = batch_number(take()), take() == '1'
if not b then return done(0) end
local known = batch(b)
known.closed = '1'
call('HSET', prefix .. 'b:' .. b, 'closed', 1)
if cancels then
  known.cancelled = '1'
  call('HSET', prefix .. 'b:' .. b, 'cancelled', 1)
end
return done(1)
