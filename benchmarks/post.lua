-- wrk: POST events, each with a new seq. The same script drives every server of a comparison.
--
-- arguments: FILE with {head and event up to seq, rest of the event} pairs, FIRST run number of
-- three digits. A thread's seq is its run number (FIRST + thread) followed by seven digits that
-- count its requests, so the length of an event does not change, and a request costs one
-- concatenation, whatever the server is.

local threads = 0

function setup(thread)
  thread:set("number", threads)
  threads = threads + 1
end

function init(arguments)
  local events = dofile(arguments[1])
  local run = tostring(tonumber(arguments[2]) + number)
  before, after, count, n = {}, {}, #events, 0
  for i = 1, count do
    before[i] = events[i][1] .. run
    after[i] = events[i][2]
  end
end

function request()
  n = n + 1
  if n > 8999999 then error("a run may have 9 million requests") end
  local i = n % count + 1
  return before[i] .. (1000000 + n) .. after[i]
end

function done(summary, latency, requests)
  local e = summary.errors
  print(string.format(
    'RESULT {"requests":%d,"microseconds":%d,"connect":%d,"read":%d,"write":%d,' ..
    '"status":%d,"timeout":%d,"p50_us":%d,"p99_us":%d}',
    summary.requests, summary.duration, e.connect, e.read, e.write, e.status, e.timeout,
    latency:percentile(50), latency:percentile(99)))
end
