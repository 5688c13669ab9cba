"""A thousand small objects of a bucket, brought into the store: beside boto3, which takes one after the other."""

from __future__ import annotations

import asyncio
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.fetched import Fetched
from bacalhau_node.ports import Access
from bacalhau_node.sources.bucket import BucketSource
from bacalhau_node.spec import InputSource
from tests.bench.harness import Figure, at_least, in_turn
from tests.object_store import Bucket, new_bucket, object_store

TITLE = "1,000 objects of a bucket"
EXECUTORS = ("local",)
COUNT = 1_000
SIZE = 1_000
TIMES = 5


def fill(bucket: Bucket) -> None:
    """Write the objects, a few at once: a client of boto3 serves many threads."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: bucket.put({f"data/{number:04}": os.urandom(SIZE)}), range(COUNT)))


def by_boto3(bucket: Bucket) -> int:
    """List and read; the bytes that came."""
    return sum(map(len, bucket.read().values()))


def by_us(bucket: Bucket) -> int:
    """List, pin, read and import into an empty store under CIDs; the bytes that came."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with closing(BlockStore(folder)) as store, closing(Fetched(folder)) as fetched:

            async def bring() -> int:
                source = BucketSource(store, fetched=fetched)
                entries = source.list(InputSource(source=f"s3://{bucket.name}/data"), index=0)
                await source.fetch(entries, access=Access(), told=lambda *_: None)
                return sum(entry.size for entry in entries)

            return asyncio.run(bring())


def run(_: str) -> list[Figure]:
    """Both in turn, over the same server."""
    with object_store() as server:
        os.environ.update(server.environment)
        bucket = new_bucket(server)
        fill(bucket)
        for read in (by_boto3, by_us):
            if (found := read(bucket)) != COUNT * SIZE:
                raise ValueError(f"{read.__name__} read {found} bytes, {COUNT * SIZE} are there")
        taken = in_turn({"boto3": lambda: by_boto3(bucket), "ours": lambda: by_us(bucket)}, times=TIMES)
    return [
        Figure(
            what="1,000 objects of 1 kB from S3 (SeaweedFS) into the store",
            ours=f"{taken['ours']:.2f} s",
            beside=f"boto3, one by one, into nothing: {taken['boto3']:.2f} s",
            measured=taken["boto3"] / taken["ours"],
            goal=at_least(5, "× as fast as boto3"),
        )
    ]
