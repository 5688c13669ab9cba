"""A node's HTTP API, version 0: our own; `/v0/…`. `shapes` is what both sides know, `server` puts it together.

| request | answer |
|---|---|
| `POST /v0/jobs` `{job, spec, files, secrets}` | the `Submission`; the same id again never makes a second job |
| `GET /v0/jobs`, `GET /v0/jobs/find?prefix=`, `GET /v0/jobs/ID` | `[JobLine]`, `{job}`, `JobView` |
| `POST /v0/jobs/ID/cancel` | asks for the end |
| `GET /v0/jobs/ID/updates` | server-sent events `job`, `shard`, `text`; resumed by `Last-Event-ID` or `?since=` |
| `POST /v0/plan` `{spec}` | `JobPlan`, without a job |
| `POST /v0/bundle` `{files}` | a cell's small folder as a CID |
| `POST /v0/blocks/missing` `{cids}` | those that are not here |
| `POST /v0/car` | takes a CAR archive in; every block is checked |
| `GET /ipfs/CID[/path]?format=…` | the trustless gateway (`gateway`): archives and blocks, for keys and capabilities |
| `GET /v0/content/CID` | the bytes of a file, whole or a `Range` |
| `GET /v0/nodes`, `GET /v0/version` | `[NodeView]`, `Version` |
| `GET /metrics` | Prometheus text |
| `GET /health`, `GET /ready` | 200 while it lives, 503 while it takes no jobs; these and `/ipfs` go without a key |

An error is `{"error": "SpecError", "message": "…"}` with the class of `errors.py`, so a client raises what
the node raised.
"""
