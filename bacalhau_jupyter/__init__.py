"""Run a notebook cell on shards of your data: `%load_ext bacalhau_jupyter`, then `%%bacalhau`."""
