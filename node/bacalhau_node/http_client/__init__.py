"""A `Client` of a node elsewhere, over its HTTP API (`api`)."""

from bacalhau_node.http_client.client import HttpClient as HttpClient
