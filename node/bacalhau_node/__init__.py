"""The node: runs shards, splits jobs, keeps results by CID. Never imports the notebook side."""

__version__ = "0.1.0"
