"""Shards in a real S3 API on loopback give the batches that they give from a disk, through faults that heal."""

import itertools
from pathlib import Path

import pytest
import torch

from pretrain.data import index, remote, synthetic
from pretrain.data.compose import Composer
from pretrain.data.depot import Depot
from pretrain.data.format import ShardError
from pretrain.data.loader import Config, Loader
from pretrain.data.remote import Access, Url
from pretrain.data.tokenizer import Tokenizer, train
from pretrain.data.transforms import Transform
from pretrain.data.transports import base
from tests.faults import serving

pytest.importorskip("s3fs", reason="s3fs is not installed (extra s3)")
moto = pytest.importorskip("moto.server", reason="moto[server] is not installed (extra dev)")

NAMES = "s3://shapes/train/shapes-{00000..00002}.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    synthetic.write(folder, shards=3, samples=10, size=12)
    return folder


@pytest.fixture(scope="module")
def store(folder):
    """The API's address; its bucket holds the data set."""
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    import botocore.session

    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    client = botocore.session.Session().create_client("s3", endpoint_url=f"http://{host}:{port}", **keys)
    client.create_bucket(Bucket="shapes")
    for path in folder.iterdir():
        client.put_object(Bucket="shapes", Key=f"train/{path.name}", Body=path.read_bytes())
        if path.suffix in (".tar", ".idx"):  # as another tool leaves it: nothing says what a shard should be
            client.put_object(Bucket="shapes", Key=f"bare/{path.name}", Body=path.read_bytes())
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def server(store, monkeypatch):
    """A server in front of the API that can misbehave; what a client needs to find it."""
    with serving(upstream=store) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
        monkeypatch.setattr(base, "STALL_SECONDS", 1)
        monkeypatch.setattr(remote, "FIRST_PAUSE", 0.02)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # it remembers the last test's address
        yield server


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([f"a {label}" for label in synthetic.CLASSES], 560)


def batches(shards: str, tokenizer: Tokenizer, cache: Path, **options) -> list[dict]:
    config = Config(**{"shards": shards, "workers": 0, "lanes": 4, "cache_dir": str(cache), "retry_seconds": 8,
                       **options})  # fmt: skip
    composer = Composer(tokenizer, context_length=16)
    loader = Loader(config, batch_size=12, seed=7, transform=Transform(8), composer=composer, rank=0, world=1)
    return [{**b.tensors(), "keys": b.keys, "meta": b.meta} for b in itertools.islice(loader.iterate(), 5)]


def equal(some: list[dict], others: list[dict]) -> bool:
    def same(one, other) -> bool:
        return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other

    return all(a.keys() == b.keys() and all(same(a[n], b[n]) for n in a) for a, b in zip(some, others, strict=True))


@pytest.fixture(scope="module")
def expected(folder, tokenizer, tmp_path_factory) -> list[dict]:
    return batches(str(folder / "shapes-{00000..00002}.tar"), tokenizer, tmp_path_factory.mktemp("unused"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranges", [False, True])
def test_same_batches_as_from_disk(server, tokenizer, expected, tmp_path, workers, ranges):
    assert equal(batches(NAMES, tokenizer, tmp_path, workers=workers, range_reads=ranges), expected)
    assert len(list(tmp_path.rglob("*.tar"))) == (0 if ranges else 3)


@pytest.mark.parametrize("ranges", [False, True])
@pytest.mark.parametrize(
    "fault", ["drop", "503", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("stall", "truncate"))]
)
def test_faults_that_heal(server, tokenizer, expected, tmp_path, fault, ranges):
    for path in ("dataset.json", "00000.tar", "00001.idx"):
        server.spoil(fault, path=path, times=2)
    assert equal(batches(NAMES, tokenizer, tmp_path, range_reads=ranges), expected)
    assert not server._faults or all(not left for _, _, left in server._faults), "a fault was never met"


def test_an_etag_that_is_an_md5_is_checked(server, folder, tmp_path, caplog):
    """Nothing else says what the shard should be."""
    server.spoil("garble", path="bare/shapes-00001.tar")
    source = Url("s3://shapes/bare/shapes-00001.tar")
    with Depot(Access(cache_dir=str(tmp_path))).shard(source, None) as file:
        assert file.read() == (folder / "shapes-00001.tar").read_bytes()
    assert "its MD5 is" in caplog.text


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("403", r"^shard s3://.*00001\.tar: the store refuses access .*check data\.shards"),
        ("404", r"^shard s3://.*00001\.tar: the store has no such object; check data\.shards"),
        ("503", r"^shard s3://.*00001\.tar: Service Unavailable; gave up after \d+ tries"),
        ("drop", r"^shard s3://.*00001\.tar: .*gave up after \d+ tries"),
    ],
)
def test_what_does_not_heal(server, tokenizer, tmp_path, fault, words):
    server.spoil(fault, path="00001.tar", times=1000)
    with pytest.raises(ShardError, match=words):
        batches(NAMES, tokenizer, tmp_path, retry_seconds=0.3)
    if fault in ("403", "404"):
        assert len(server.gets("00001.tar")) <= 2  # at once; a prefetch may have asked, too


def test_what_is_not_there(server, tmp_path):
    access = Access(cache_dir=str(tmp_path))
    with pytest.raises(ShardError, match=r"nothing\.tar: the store has no such object"):
        index.resolve("s3://shapes/train/nothing.tar", access)
    with pytest.raises(ShardError, match=r"the store has no such object"):
        index.resolve("s3://nowhere/x.tar", access)


def test_no_credentials(server, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    with pytest.raises(ShardError, match="no valid credentials"):
        index.resolve("s3://shapes/train/shapes-00000.tar", Access(cache_dir=str(tmp_path), retry_seconds=60))
