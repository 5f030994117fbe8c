-- batch, ids → {defaults, specs}, each spec false where there is no such job; or {}: there is no such batch.
local b = batch_number(ARGV[3])
if not b then return {} end
local specs = {}
for n = 4, #ARGV do specs[#specs + 1] = call('GET', prefix .. 's:' .. b .. ':' .. ARGV[n]) end
return {call('GET', prefix .. 'bd:' .. b) or '', specs}
