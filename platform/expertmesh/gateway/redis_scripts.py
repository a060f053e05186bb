"""The limit book once more, in Lua, for accounts that live in Redis.

One hash for each account, with an expiry: `r`, `ra`, `rc` are the requests used, as of when, and the
capacity; `t`, `ta`, `tc` the same of tokens, and `tg` counts how often that limit was set anew; `o`
open reservations; `d`, `dc`, `ds` the running day, what is committed in it and whether the ledger is
in; `m`, `mc`, `ms` the same of the month. Open reservations are in one hash, and in one sorted set
by the time at which they are given up.

Money is in whole nano-dollars, since Lua counts with doubles: exact up to 9 million dollars.
Keys of accounts are made from the arguments, so a Redis Cluster cannot run these scripts.
"""

_SHARED = """
local ACCOUNT_TTL_S = 40 * 86400
local PERIOD_S = 60
local LATER_S = 0.001

local function float(x) return string.format('%.17g', x) end
local function int(x) return string.format('%.0f', x) end

local function refilled(used, at, capacity, now)
  if used == nil then return 0 end
  if now > at then used = used - (now - at) * (capacity / PERIOD_S) end
  if used > 0 then return used end
  return 0
end

local function forfeit(open_key, held_key, id)
  local packed = redis.call('HGET', held_key, id)
  if not packed then return false end
  redis.call('HDEL', held_key, id)
  redis.call('ZREM', open_key, id)
  local held = cmsgpack.unpack(packed)
  for _, part in ipairs(held[3]) do
    if redis.call('EXISTS', part[1]) == 1 then redis.call('HINCRBY', part[1], 'o', -1) end
  end
  return true
end
"""

RESERVE = (
    _SHARED
    + """
-- KEYS: open, held, marker. ARGV: id, tokens, nano-dollars, now, day, month, end of the day, end of
-- the month, deadline, whether the marker must be there, and for each account its key and limits:
-- requests/min, tokens/min, concurrent, nano-dollars a day, a month; -1 without limit.
local open_key, held_key, marker = KEYS[1], KEYS[2], KEYS[3]
local id = ARGV[1]
local tokens, nano, now = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local today, this_month = tonumber(ARGV[5]), tonumber(ARGV[6])
local day_end, month_end = tonumber(ARGV[7]), tonumber(ARGV[8])
if ARGV[10] == '1' and redis.call('EXISTS', marker) == 0 then return cmsgpack.pack({2}) end
forfeit(open_key, held_key, id)

local accounts = {}
local kind, who, longest = 0, 0, -1
local function refuse(one_kind, index, wait)
  if wait > longest then kind, who, longest = one_kind, index, wait end
end

for index = 1, (#ARGV - 10) / 6 do
  local base = 10 + (index - 1) * 6
  local a = {key = ARGV[base + 1], rc = tonumber(ARGV[base + 2]), tc = tonumber(ARGV[base + 3])}
  local most_open, day_most, month_most =
    tonumber(ARGV[base + 4]), tonumber(ARGV[base + 5]), tonumber(ARGV[base + 6])
  local v = redis.call('HMGET', a.key, 'r', 'ra', 'rc', 't', 'ta', 'tc', 'tg', 'o', 'd', 'dc', 'ds',
    'm', 'mc', 'ms')
  for i = 1, 14 do v[i] = v[i] and tonumber(v[i]) or nil end
  a.had_r, a.had_t = v[1] ~= nil, v[4] ~= nil
  a.r, a.ra = refilled(v[1], v[2], v[3], now), math.max(v[2] or now, now)
  a.t, a.ta = refilled(v[4], v[5], v[6], now), math.max(v[5] or now, now)
  a.tg, a.o = v[7] or 0, v[8] or 0
  a.d, a.dc, a.ds = v[9], v[10], v[11]
  a.m, a.mc, a.ms = v[12], v[13], v[14]
  if a.d == nil or a.d < today then a.d, a.dc, a.ds = today, 0, 0 end
  if a.m == nil or a.m < this_month then a.m, a.mc, a.ms = this_month, 0, 0 end
  if a.rc >= 0 then
    local missing = a.r + 1 - a.rc
    if a.rc == 0 then refuse(1, index, PERIOD_S)
    elseif missing > 0 then refuse(1, index, missing / (a.rc / PERIOD_S) + LATER_S) end
  end
  if a.tc >= 0 then
    local missing = tokens > a.tc and a.t or a.t + tokens - a.tc
    if a.tc == 0 then
      if a.t + tokens > 0 then refuse(2, index, PERIOD_S) end
    elseif missing > 0 then refuse(2, index, missing / (a.tc / PERIOD_S) + LATER_S) end
  end
  if most_open >= 0 and a.o >= most_open then refuse(3, index, 1) end
  if day_most >= 0 and a.dc + nano > day_most then refuse(4, index, day_end - now) end
  if month_most >= 0 and a.mc + nano > month_most then refuse(5, index, month_end - now) end
  accounts[index] = a
end

local granted = longest < 0
local held = {}
local by_r, by_t
for index, a in ipairs(accounts) do
  if granted then
    if a.rc >= 0 then a.r = a.r + 1 end
    if a.tc >= 0 then
      a.t = a.t + tokens
      if not a.had_t then a.tg = a.tg + 1 end
    end
    redis.call('HSET', a.key, 'o', int(a.o + 1), 'tg', int(a.tg),
      'd', int(a.d), 'dc', int(a.dc + nano), 'ds', int(a.ds),
      'm', int(a.m), 'mc', int(a.mc + nano), 'ms', int(a.ms))
    if a.rc >= 0 then
      redis.call('HSET', a.key, 'r', float(a.r), 'ra', float(a.ra), 'rc', int(a.rc))
    elseif a.had_r then redis.call('HDEL', a.key, 'r', 'ra', 'rc') end
    if a.tc >= 0 then
      redis.call('HSET', a.key, 't', float(a.t), 'ta', float(a.ta), 'tc', int(a.tc))
    elseif a.had_t then redis.call('HDEL', a.key, 't', 'ta', 'tc') end
    redis.call('EXPIRE', a.key, ACCOUNT_TTL_S)
    held[index] = {a.key, a.tc >= 0 and a.tg or 0, a.d, a.m}
  end
  if a.rc >= 0 and (by_r == nil or a.rc - a.r < by_r.rc - by_r.r) then by_r = a end
  if a.tc >= 0 and (by_t == nil or a.tc - a.t < by_t.tc - by_t.t) then by_t = a end
end
if granted then
  redis.call('HSET', held_key, id, cmsgpack.pack({tokens, nano, held}))
  redis.call('ZADD', open_key, ARGV[9], id)
end

local function room(capacity, used)
  local reset = capacity > 0 and used / (capacity / PERIOD_S) or PERIOD_S
  return math.floor(math.max(0, capacity - used)), reset
end
local answer = {granted and 1 or 0, kind, who, longest, -1, 0, 0, -1, 0, 0}
if by_r then answer[5] = by_r.rc; answer[6], answer[7] = room(by_r.rc, by_r.r) end
if by_t then answer[8] = by_t.tc; answer[9], answer[10] = room(by_t.tc, by_t.t) end
return cmsgpack.pack(answer)
"""
)

SETTLE = (
    _SHARED
    + """
-- KEYS: open, held. ARGV: id, tokens, nano-dollars, now. Returns what was clipped, -1 when the
-- reservation is not open.
local open_key, held_key, id = KEYS[1], KEYS[2], ARGV[1]
local tokens, nano, now = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local packed = redis.call('HGET', held_key, id)
if not packed then return -1 end
redis.call('HDEL', held_key, id)
redis.call('ZREM', open_key, id)
local held = cmsgpack.unpack(packed)
local clipped = math.max(0, nano - held[2])
local back_nano = held[2] - math.min(nano, held[2])
local back_tokens = held[1] - tokens
for _, part in ipairs(held[3]) do
  local key = part[1]
  local v = redis.call('HMGET', key, 'o', 't', 'ta', 'tc', 'tg', 'd', 'm')
  if v[1] then
    redis.call('HINCRBY', key, 'o', -1)
    if tonumber(v[6]) == part[3] then redis.call('HINCRBY', key, 'dc', int(-back_nano)) end
    if tonumber(v[7]) == part[4] then redis.call('HINCRBY', key, 'mc', int(-back_nano)) end
    if v[2] and part[2] > 0 and tonumber(v[5]) == part[2] then
      local at = tonumber(v[3])
      local used = refilled(tonumber(v[2]), at, tonumber(v[4]), now) - back_tokens
      redis.call('HSET', key, 't', float(math.max(0, used)), 'ta', float(math.max(at, now)))
    end
  end
end
return clipped
"""
)

EXPIRE = (
    _SHARED
    + """
-- KEYS: open, held. ARGV: now, most. Returns how many were given up.
local late = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, tonumber(ARGV[2]))
for _, id in ipairs(late) do forfeit(KEYS[1], KEYS[2], id) end
return #late
"""
)

SEED = (
    _SHARED
    + """
-- ARGV: day, month, and for each account its key, and nano-dollars spent in the day and the month.
local today, this_month = tonumber(ARGV[1]), tonumber(ARGV[2])
for base = 3, #ARGV, 3 do
  local key = ARGV[base]
  local v = redis.call('HMGET', key, 'd', 'dc', 'ds', 'm', 'mc', 'ms')
  for i = 1, 6 do v[i] = v[i] and tonumber(v[i]) or nil end
  if v[1] == nil or v[1] < today then v[1], v[2], v[3] = today, 0, 0 end
  if v[4] == nil or v[4] < this_month then v[4], v[5], v[6] = this_month, 0, 0 end
  if v[3] == 0 and v[1] == today then v[2], v[3] = v[2] + tonumber(ARGV[base + 1]), 1 end
  if v[6] == 0 and v[4] == this_month then v[5], v[6] = v[5] + tonumber(ARGV[base + 2]), 1 end
  redis.call('HSET', key, 'd', int(v[1]), 'dc', int(v[2]), 'ds', int(v[3]),
    'm', int(v[4]), 'mc', int(v[5]), 'ms', int(v[6]))
  redis.call('EXPIRE', key, ACCOUNT_TTL_S)
end
return #ARGV
"""
)
