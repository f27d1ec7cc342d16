"""Programs that send: each is started by a benchmark, in a process of its own."""
