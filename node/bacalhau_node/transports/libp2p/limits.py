"""How much may be said at once, for both halves."""

LARGEST_RPC = 1024 * 1024
"""Bytes of gossip at once: other implementations refuse more."""

LARGEST_PUBLISHED = LARGEST_RPC - 4096
"""Bytes of one published message: there must be room for what is around it."""

LARGEST_QUESTION = 64 * 1024
"""Bytes of a request."""
