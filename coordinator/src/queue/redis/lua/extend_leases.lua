-- microseconds → 1. The time of deadlines stands still for so long.
outage = outage + take()
return done(1)
