"""Buckets: how they are named, the stores of `obstore` behind them, and what its errors mean.

Where a bucket is and what opens it is said by this machine alone, in the variables that every tool for its kind
of bucket reads (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `GOOGLE_SERVICE_ACCOUNT`, `AZURE_STORAGE_ACCOUNT_NAME`…) and,
for S3, in the keys of the profile in `~/.aws`. A job names a bucket and a key and nothing else, so it can't send
this machine's credentials elsewhere.

Everything here blocks and belongs in threads, `obstore` too: its own coroutines take twice the time of the processor,
and one that ends while the interpreter does takes the process down with it.

Errors say which bucket at which endpoint, what the server answered, and what to set; never a key's value.
"""

from __future__ import annotations

import asyncio
import configparser
import hmac
import os
import re
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import SplitResult, parse_qsl, quote, urlsplit, urlunsplit

from bacalhau_node.errors import ContentError, SpecError

if TYPE_CHECKING:
    from obstore.store import AzureStore, ClientConfig, GCSStore, RetryConfig, S3Config, S3Store

    Store = AzureStore | GCSStore | S3Store

T = TypeVar("T")

INSTALL = "reading and writing buckets needs obstore: pip install 'bacalhau-jupyter[buckets]'"

_SCHEMES = ("s3", "gs", "az")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,220}[A-Za-z0-9]")
"""Loose enough for the three kinds (and old names of S3), and nothing that could lead a URL elsewhere."""

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")

_SETTINGS = ("AWS_", "GOOGLE_", "AZURE_")
_TIMEOUT = timedelta(minutes=5)
"""For one request with its body, at most 8 MiB: a line of 30 kB/s is waited for."""
_CONNECT = timedelta(seconds=5)
_RETRIES = 5
_RETRY_FOR = timedelta(seconds=30)

_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), AWS_REGION, and for another server than"
    " Amazon's AWS_ENDPOINT_URL; for a public bucket AWS_SKIP_SIGNATURE=true",
    "gs": "set GOOGLE_SERVICE_ACCOUNT to the file of a service account's key; for a public bucket"
    " GOOGLE_SKIP_SIGNATURE=true",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY; for a public container"
    " AZURE_SKIP_SIGNATURE=true",
}
_METADATA = ("169.254.169.254", "latest/api/token", "computeMetadata", "metadata/identity")
"""Marks of an error of who asked a cloud's machine for credentials, for want of others."""


@dataclass(frozen=True)
class Place:
    """An object, or all below a prefix: `key` has no `/` at either end, and `folder` says that it is a prefix."""

    scheme: str
    bucket: str
    key: str
    folder: bool

    def __str__(self) -> str:
        """As it is typed."""
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    def at(self, key: str) -> Place:
        """The object `key` of the same bucket."""
        return Place(self.scheme, self.bucket, key, folder=False)


def claims(text: str) -> bool:
    """Whether `text` names a bucket."""
    scheme, found, _ = text.partition("://")
    return bool(found) and scheme in _SCHEMES


def parse(text: str) -> Place:
    """`s3://bucket/prefix`, `gs://…` or `az://…`; raises `SpecError`. A key stands as it is, without any escapes."""
    scheme, _, rest = text.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme not in _SCHEMES or not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise SpecError(f"{text!r} does not name a bucket: write {scheme}://BUCKET/PREFIX, without keys or an endpoint")
    folder = not key or key.endswith("/")
    key = key.removesuffix("/")
    if key and not is_path(key):
        raise SpecError(f"{text!r}: a key whose parts are empty, '.', '..' or unprintable can't be a path of files")
    return Place(scheme, bucket, key, folder)


def is_path(key: str) -> bool:
    """Whether obstore takes this key, and a file below a folder can be called so."""
    return not {"", ".", ".."} & set(key.split("/")) and not _UNPRINTABLE.search(key)


class Buckets:
    """The stores behind buckets; one is opened once for as long as the machine's settings stay the same. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[str, str], tuple[object, Store]] = {}

    def open(self, place: Place) -> Store:
        """The store of a place's bucket; asks nobody yet. Raises `SpecError` for settings that can't be."""
        profile = _profile() if place.scheme == "s3" else {}
        settings = ({name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}, profile)
        with self._lock:
            known = self._open.get((place.scheme, place.bucket))
            if known is not None and known[0] == settings:
                return known[1]
            store = _opened(place, profile)
            self._open[place.scheme, place.bucket] = (settings, store)
            return store


def unsigned(place: Place) -> bool:
    """Whether requests for this place go without a signature, as public buckets want them."""
    name = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}[place.scheme]
    return os.environ.get(f"{name}_SKIP_SIGNATURE", "").lower() in {"1", "true", "yes", "on", "y", "t"}


def url_for_others(store: Store, place: Place, version: str | None, *, seconds: int) -> str:
    """A URL by which anybody can read an object for so long, in this version of it; raises what `asked` does.

    The newest version is read where obstore alone can sign: in the buckets of Google and Azure, and with keys of S3
    that it gets from others than the environment or a profile.
    """
    if place.scheme == "s3" and unsigned(place):
        return _public_url(place) + (f"?versionId={quote(version, safe='')}" if version else "")
    import obstore  # noqa: PLC0415 - only who uses buckets has it

    signed = asked(place, lambda: obstore.sign(store, "GET", place.key, timedelta(seconds=seconds)))
    return _at_version(signed, version) if place.scheme == "s3" and version else signed


def _public_url(place: Place) -> str:
    """The plain URL of an object in a public S3 bucket."""
    store = _opened(place, _profile() | {"access_key_id": "nobody", "secret_access_key": "nothing"})
    import obstore  # noqa: PLC0415 - only who uses buckets has it

    return obstore.sign(store, "GET", place.key, timedelta(minutes=1)).partition("?")[0]


def _at_version(signed: str, version: str) -> str:
    """A signed URL of S3 made one for this version, as far as its own signature can be made here."""
    parts = urlsplit(signed)
    *given, (_, theirs) = parse_qsl(parts.query)
    secret = _profile().get("secret_access_key") or os.environ.get("AWS_SECRET_ACCESS_KEY", "")
    if _signature(parts, given, secret) != theirs:
        return signed
    named = [*given, ("versionId", version)]
    return urlunsplit(parts._replace(query=f"{_query(named)}&X-Amz-Signature={_signature(parts, named, secret)}"))


def _signature(url: SplitResult, query: Sequence[tuple[str, str]], secret: str) -> str:
    """Version 4 of S3's signatures, of a GET by these parameters."""
    said = dict(query)
    scope = said["X-Amz-Credential"].split("/")[1:]
    request = "\n".join(("GET", url.path, _query(query), f"host:{url.netloc}", "", "host", "UNSIGNED-PAYLOAD"))
    digest = sha256(request.encode()).hexdigest()
    text = "\n".join((said["X-Amz-Algorithm"], said["X-Amz-Date"], "/".join(scope), digest))
    key = f"AWS4{secret}".encode()
    for part in (*scope, text):
        key = hmac.digest(key, part.encode(), "sha256")
    return key.hex()


def _query(pairs: Sequence[tuple[str, str]]) -> str:
    return "&".join(sorted(f"{name}={quote(value, safe='')}" for name, value in pairs))


def explained(error: Exception, place: Place) -> SpecError | ContentError:
    """An error of `obstore` in words: a `SpecError` where settings or the job must change before it can work."""
    text = str(error)
    where, answer = f"{place} at {_endpoint(place)}", _answer(text)
    if any(mark in text for mark in _METADATA):
        return SpecError(f"{where}: this machine has no credentials for it: {_CREDENTIALS[place.scheme]}")
    if re.search(r"<Code>(NoSuchBucket|ContainerNotFound)<", text):
        return SpecError(f"there is no bucket {place.bucket!r} at {_endpoint(place)} ({answer}): check its name")
    if re.search(r"\b(301|307) |PermanentRedirect|AuthorizationHeaderMalformed|without LOCATION", text):
        return SpecError(f"{where} is in another region ({answer}): set AWS_REGION to the region of the bucket")
    if re.search(r"\b(401 Unauthorized|403 Forbidden)\b", text):
        return SpecError(f"{where} refuses this machine's credentials ({answer}): {_CREDENTIALS[place.scheme]}")
    if "HTTP error" in text:
        return ContentError(f"{where} does not answer ({answer}): check the network and the endpoint, then try again")
    return ContentError(f"{where}: {answer}")


def asked(place: Place, ask: Callable[[], T], *, but: tuple[type[Exception], ...] = ()) -> T:
    """The answer to a question, with every error of `obstore` in words, save those in `but`: their class says it."""
    from obstore.exceptions import BaseError  # noqa: PLC0415 - only who uses buckets has it

    try:
        return ask()
    except (BaseError, OSError) as error:
        known = explained(error, place)
        if isinstance(error, but) and not isinstance(known, SpecError):
            raise
        raise known from error


async def together(work: Callable[[], Coroutine[Any, Any, None]], count: int) -> None:
    """Run `work` so many times at once; the first failure ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(work())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed.exceptions[0].__cause__


def _answer(text: str) -> str:
    """What the server said, in one line; of a body only its code and message, since some repeat what was signed."""
    parts = [re.search(rf"<{name}>([^<]*)<", text) for name in ("Code", "Message")]
    if said := ": ".join(part[1].strip().partition("\n")[0] for part in parts if part):
        return said
    status = re.search(r"status code: (\d{3}[ \w]*)", text)
    first = text.partition("\n")[0]
    return status[1].strip() if status else re.sub(r"\?\S*", "", first.rpartition(" - ")[2])[:300]


def _opened(place: Place, profile: Mapping[str, str]) -> Store:
    try:
        from obstore import store as kinds  # noqa: PLC0415 - only who uses buckets has it
        from obstore.exceptions import BaseError  # noqa: PLC0415
    except ImportError as error:
        raise SpecError(f"{place}: {INSTALL}") from error
    _check_endpoint(_s3_endpoint() or profile.get("endpoint", ""))
    # Plain HTTP is for servers that the owner of this machine named so; the defaults are all HTTPS.
    client: ClientConfig = {"allow_http": True, "timeout": _TIMEOUT, "connect_timeout": _CONNECT}
    retry: RetryConfig = {"max_retries": _RETRIES, "retry_timeout": _RETRY_FOR}
    try:
        if place.scheme == "s3":
            config = cast("S3Config", dict(profile))
            return kinds.S3Store(place.bucket, config=config, client_options=client, retry_config=retry)
        if place.scheme == "gs":
            return kinds.GCSStore(place.bucket, client_options=client, retry_config=retry)
        return kinds.AzureStore(place.bucket, client_options=client, retry_config=retry)
    except (BaseError, OSError, ValueError) as error:
        reason = _answer(str(error))
        raise SpecError(f"{place} can't be opened ({reason}): {_CREDENTIALS[place.scheme]}") from error


def _endpoint(place: Place) -> str:
    """Where the bucket is, for people."""
    if place.scheme == "gs":
        return "Google Cloud Storage"
    if place.scheme == "az":
        return f"Azure account {os.environ.get('AZURE_STORAGE_ACCOUNT_NAME', '(none set)')}"
    profile = _profile()
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or profile.get("region", "us-east-1")
    return _s3_endpoint() or profile.get("endpoint") or f"Amazon S3, {region}"


def _s3_endpoint() -> str:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next(filter(None, map(os.environ.get, names)), "")


def _check_endpoint(endpoint: str) -> None:
    """Raise `SpecError` for an endpoint that is no URL, at which obstore would panic; "": none."""
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in {"http", "https"} and bool(parts.hostname) and not parts.username
        good = good and (parts.port or 443) > 0 and not (parts.query or parts.fragment)
    except ValueError:
        good = False
    if endpoint and not good:
        raise SpecError(
            "AWS_ENDPOINT_URL is not an address: write https://HOST or http://HOST:PORT, without keys in it"
        )


_PROFILE = {
    "access_key_id": "aws_access_key_id",
    "secret_access_key": "aws_secret_access_key",
    "session_token": "aws_session_token",
    "region": "region",
    "endpoint": "endpoint_url",
}


def _profile() -> dict[str, str]:
    """What the environment does not say of keys, region and endpoint, from the profile in `~/.aws`; {} for nothing.

    Only keys that stand there: what other programs have to be asked for (single sign-on, roles) is left to them.
    """
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    name = os.environ.get("AWS_PROFILE") or "default"
    found = _section("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}")
    found |= _section("AWS_SHARED_CREDENTIALS_FILE", "credentials", name)
    said = {ours: found[theirs] for ours, theirs in _PROFILE.items() if found.get(theirs)}
    if os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        said.pop("region", None)
    if _s3_endpoint():
        said.pop("endpoint", None)
    return said


def _section(variable: str, file: str, section: str) -> dict[str, str]:
    """One section of a file that `variable` names, or that lies in `~/.aws`; {} where it is not there."""
    path = Path(os.environ.get(variable) or Path.home() / ".aws" / file)
    parser = configparser.RawConfigParser()
    try:
        parser.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError, OSError) as error:  # whose text may show a key
        raise SpecError(f"{path} can't be read ({type(error).__name__}): mend it or take it away") from None
    return dict(parser.items(section)) if parser.has_section(section) else {}
