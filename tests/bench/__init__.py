"""The project's figures beside other tools, as ratios in one run: `make bench`, `make bench CASES="glob fanout"`.

- `harness.py`: figures, goals, calibration, the table
- `peers.py`: what a user would pick instead, behind one small face; `work.py`: what their workers run
- `kernel.py`: a real Jupyter kernel, driven as a front end drives it
- `containers.py`: `docker run` in a loop, the isolation that others would get
- `cases/`: one module a case, each with `TITLE`, `EXECUTORS` and `run(executor) -> figures`

Every case runs in a new process of its own with an empty data folder, once for each executor that it names:
"docker", or "local": what this machine has without a daemon, a sandbox or a plain process.
"""
