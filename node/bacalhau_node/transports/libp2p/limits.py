"""How much may be said at once, for both halves."""

LARGEST_RPC = 1024 * 1024
"""Bytes of gossip at once: other implementations refuse more."""

LARGEST_PUBLISHED = 64 * 1024
"""Bytes of one published message: everybody passes it on. An announcement has one or two kilobytes; one with all the
addresses, packages and labels that its form allows has half of this."""

ENVELOPE = 4096
"""Bytes around a published message: its author, whose key may be an RSA one, and the signature."""

LARGEST_QUESTION = 64 * 1024
"""Bytes of a request."""
