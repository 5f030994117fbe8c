-- most jobs of each sort → {promoted, reaped, whether there is more}.
local limit = tonumber(take())
while settle_left > 0 do
  local unsettled = call('LPOP', prefix .. 'unsettled')
  if not unsettled then break end
  local from, ref = unsettled:match('^(%d+) (.+)$')
  local ended = load(ref)
  if ended and ENDED[ended.s] then
    ended.from = tonumber(from)
    just_ended[1] = ended
    settle()
  end
end
local reaped = reap(limit)
local promoted = promote(limit)
local more = reaped == limit or promoted == limit or call('EXISTS', prefix .. 'unsettled') == 1
return done({promoted, reaped, more and 1 or 0})
