"""The sans-IO machines: events in, effects out; no clock, no socket, no await."""
