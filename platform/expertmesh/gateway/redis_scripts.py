"""The limit book once more, in Lua, for accounts that live in Redis.

One hash for each account, with an expiry: `r`, `ra`, `rc` are the requests used, as of when, and
the capacity; `t`, `ta`, `tc` the same of tokens, and `tg` counts how often that limit was set anew;
`o` open reservations; `d`, `dc`, `ds` the running day, what is committed in it and whether the
ledger is in; `m`, `mc`, `ms` the same of the month. Open reservations are in one hash, and those of
each gateway in a sorted set of its own by the time at which they are given up. Gateways are in a
sorted set by the end of their lease, in the time of Redis.

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

CALLS = (
    _SHARED
    + """
-- KEYS: open, held, marker. ARGV: MessagePack of {whether the marker must be there, prefix of the
-- keys of accounts, settlements, reservations}. Returns MessagePack of {1 or 0 without the marker,
-- of each settlement what was clipped or -1 when it is not open, of each reservation the answer}.
-- Lua takes most of the time, so the loops below are long rather than nicely cut.
local call = redis.call
local open_key, held_key = KEYS[1], KEYS[2]
local asked = cmsgpack.unpack(ARGV[1])
if asked[1] and call('EXISTS', KEYS[3]) == 0 then return cmsgpack.pack({0, {}, {}}) end
local prefix = asked[2]

local settled = {}
for number, one in ipairs(asked[3]) do
  local id, tokens, nano, now = one[1], one[2], one[3], one[4]
  local packed = call('HGET', held_key, id)
  settled[number] = -1
  if packed then
    call('HDEL', held_key, id)
    call('ZREM', open_key, id)
    local held = cmsgpack.unpack(packed)
    settled[number] = math.max(0, nano - held[2])
    local back_nano = held[2] - math.min(nano, held[2])
    local back_tokens = held[1] - tokens
    for _, part in ipairs(held[3]) do
      local key = part[1]
      local v = call('HMGET', key, 'o', 't', 'ta', 'tc', 'tg', 'd', 'dc', 'm', 'mc')
      if v[1] then
        local set = {'o', int(tonumber(v[1]) - 1)}
        if tonumber(v[6]) == part[3] then
          set[3], set[4] = 'dc', int(tonumber(v[7]) - back_nano)
        end
        if tonumber(v[8]) == part[4] then
          set[#set + 1] = 'mc'
          set[#set + 1] = int(tonumber(v[9]) - back_nano)
        end
        if v[2] and part[2] > 0 and tonumber(v[5]) == part[2] then
          local at = tonumber(v[3])
          local used = refilled(tonumber(v[2]), at, tonumber(v[4]), now) - back_tokens
          local size = #set
          set[size + 1], set[size + 2] = 't', float(math.max(0, used))
          set[size + 3], set[size + 4] = 'ta', float(math.max(at, now))
        end
        call('HSET', key, unpack(set))
      end
    end
  end
end

local function room(capacity, used)
  local reset = capacity > 0 and used / (capacity / PERIOD_S) or PERIOD_S
  return math.floor(math.max(0, capacity - used)), reset
end

-- {id, tokens, nano-dollars, now, day, month, end of the day, of the month, deadline, accounts};
-- an account: {name, requests/min, tokens/min, concurrent, nano-dollars a day, a month}, -1 without
-- limit. The answer: {1 when granted, kind of the limit that refuses, its account, seconds to wait,
-- requests: limit, left, reset, tokens: limit, left, reset}, -1 without limit.
local answers = {}
for number, ask in ipairs(asked[4]) do
  local id, tokens, nano, now, today, this_month =
    ask[1], ask[2], ask[3], ask[4], ask[5], ask[6]
  if call('HEXISTS', held_key, id) == 1 then forfeit(open_key, held_key, id) end

  local accounts = {}
  local kind, who, longest = 0, 0, -1
  for index, limits in ipairs(ask[10]) do
    local rc, tc, most_open, day_most, month_most =
      limits[2], limits[3], limits[4], limits[5], limits[6]
    local a = {key = prefix .. limits[1], rc = rc, tc = tc}
    local v = call('HMGET', a.key, 'r', 'ra', 'rc', 't', 'ta', 'tc', 'tg', 'o', 'd', 'dc', 'ds',
      'm', 'mc', 'ms')
    local ra, ta = tonumber(v[2] or now), tonumber(v[5] or now)
    a.old_rc, a.old_tc = tonumber(v[3] or -1), tonumber(v[6] or -1)
    a.r = v[1] and refilled(tonumber(v[1]), ra, a.old_rc, now) or 0
    a.t = v[4] and refilled(tonumber(v[4]), ta, a.old_tc, now) or 0
    a.ra, a.ta = math.max(ra, now), math.max(ta, now)
    a.tg, a.o = tonumber(v[7] or 0), tonumber(v[8] or 0)
    a.d, a.dc, a.ds = tonumber(v[9] or -1), tonumber(v[10] or 0), tonumber(v[11] or 0)
    a.m, a.mc, a.ms = tonumber(v[12] or -1), tonumber(v[13] or 0), tonumber(v[14] or 0)
    if a.d < today then a.d, a.dc, a.ds, a.new = today, 0, 0, true end
    if a.m < this_month then a.m, a.mc, a.ms = this_month, 0, 0 end
    if rc >= 0 then
      local missing = a.r + 1 - rc
      if missing > 0 then
        local wait = rc > 0 and missing / (rc / PERIOD_S) + LATER_S or PERIOD_S
        if wait > longest then kind, who, longest = 1, index, wait end
      end
    end
    if tc >= 0 then
      local missing = tokens > tc and a.t or a.t + tokens - tc
      if tc == 0 then missing = a.t + tokens end
      if missing > 0 then
        local wait = tc > 0 and missing / (tc / PERIOD_S) + LATER_S or PERIOD_S
        if wait > longest then kind, who, longest = 2, index, wait end
      end
    end
    if most_open >= 0 and a.o >= most_open and 1 > longest then
      kind, who, longest = 3, index, 1
    end
    if day_most >= 0 and a.dc + nano > day_most and ask[7] - now > longest then
      kind, who, longest = 4, index, ask[7] - now
    end
    if month_most >= 0 and a.mc + nano > month_most and ask[8] - now > longest then
      kind, who, longest = 5, index, ask[8] - now
    end
    accounts[index] = a
  end

  local granted = longest < 0
  local held = {}
  local by_r, by_t
  for index, a in ipairs(accounts) do
    local rc, tc = a.rc, a.tc
    local set, size = {}, 0
    if granted then
      if rc >= 0 then a.r = a.r + 1 end
      if tc >= 0 then
        a.t = a.t + tokens
        if a.old_tc < 0 then a.tg = a.tg + 1 end
      end
      set = {'o', int(a.o + 1), 'tg', int(a.tg), 'd', int(a.d), 'dc', int(a.dc + nano),
        'ds', int(a.ds), 'm', int(a.m), 'mc', int(a.mc + nano), 'ms', int(a.ms)}
      size = 16
      held[index] = {a.key, tc >= 0 and a.tg or 0, a.d, a.m}
    end
    -- A limit that was changed counts from now on, also when this call is refused.
    if rc >= 0 and (granted or (a.old_rc >= 0 and rc ~= a.old_rc)) then
      set[size + 1], set[size + 2], set[size + 3], set[size + 4], set[size + 5], set[size + 6] =
        'r', float(a.r), 'ra', float(a.ra), 'rc', int(rc)
      size = size + 6
    elseif rc < 0 and a.old_rc >= 0 then call('HDEL', a.key, 'r', 'ra', 'rc') end
    if tc >= 0 and (granted or (a.old_tc >= 0 and tc ~= a.old_tc)) then
      set[size + 1], set[size + 2], set[size + 3], set[size + 4], set[size + 5], set[size + 6] =
        't', float(a.t), 'ta', float(a.ta), 'tc', int(tc)
      size = size + 6
    elseif tc < 0 and a.old_tc >= 0 then call('HDEL', a.key, 't', 'ta', 'tc') end
    if size > 0 then call('HSET', a.key, unpack(set)) end
    -- Once a day for each account is enough.
    if granted and a.new then call('EXPIRE', a.key, ACCOUNT_TTL_S) end
    if rc >= 0 and (by_r == nil or rc - a.r < by_r.rc - by_r.r) then by_r = a end
    if tc >= 0 and (by_t == nil or tc - a.t < by_t.tc - by_t.t) then by_t = a end
  end
  if granted then
    call('HSET', held_key, id, cmsgpack.pack({tokens, nano, held}))
    call('ZADD', open_key, float(ask[9]), id)
  end

  local answer = {granted and 1 or 0, kind, who, longest, -1, 0, 0, -1, 0, 0}
  if by_r then answer[5] = by_r.rc; answer[6], answer[7] = room(by_r.rc, by_r.r) end
  if by_t then answer[8] = by_t.tc; answer[9], answer[10] = room(by_t.tc, by_t.t) end
  answers[number] = answer
end
return cmsgpack.pack({1, settled, answers})
"""
)

KEEP = (
    _SHARED
    + """
-- KEYS: gateways, held. ARGV: prefix of the sorted sets of open reservations, this gateway, now,
-- lease in seconds, most to give up, 1 to look for gateways whose lease is over. Returns how many
-- reservations were given up because they are too old, and how many with their gateway.
local prefix, me, most = ARGV[1], ARGV[2], tonumber(ARGV[5])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local lease = tonumber(ARGV[4])
-- While Redis does not run, nobody is heard of; and a call may have waited for it to run again.
local mine_until = redis.call('ZSCORE', KEYS[1], me)
local judges = ARGV[6] == '1' and mine_until and tonumber(mine_until) >= now + lease / 2
redis.call('ZADD', KEYS[1], float(now + lease), me)
local mine = prefix .. me
local late = redis.call('ZRANGEBYSCORE', mine, '-inf', ARGV[3], 'LIMIT', 0, most)
for _, id in ipairs(late) do
  if not forfeit(mine, KEYS[2], id) then redis.call('ZREM', mine, id) end
end
local orphans = 0
if judges then
  for _, gone in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. float(now))) do
    local theirs = prefix .. gone
    local ids = redis.call('ZRANGE', theirs, 0, most - orphans - 1)
    for _, id in ipairs(ids) do
      if not forfeit(theirs, KEYS[2], id) then redis.call('ZREM', theirs, id) end
    end
    orphans = orphans + #ids
    if redis.call('EXISTS', theirs) == 0 then redis.call('ZREM', KEYS[1], gone) end
    if orphans >= most then break end
  end
end
return {#late, orphans}
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
