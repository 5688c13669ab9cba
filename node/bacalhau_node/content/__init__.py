"""Content addressing: UnixFS and the block store."""
