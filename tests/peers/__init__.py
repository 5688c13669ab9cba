"""Peers of other makes, each in a process of its own: lines of JSON on stdout, commands on stdin.

A peer says `{"id": …}` when it is ready, then `{"from": …, "data": …}` for each message that it hears. It understands
`connect MULTIADDR` and `publish TEXT`, and ends with its stdin.
"""
