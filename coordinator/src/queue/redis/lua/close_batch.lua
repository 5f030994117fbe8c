-- batch, '1' to cancel it as a whole → 1, or 0: there is none.
local b, cancels = batch_number(take()), take() == '1'
if not b then return done(0) end
close(b)
if cancels then
  batch(b).cancelled = '1'
  call('HSET', prefix .. 'b:' .. b, 'cancelled', 1)
end
return done(1)
