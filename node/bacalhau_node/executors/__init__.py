"""Ways to run a shard, all behind `ports.Executor`."""
