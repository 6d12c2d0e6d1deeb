"""Shards over HTTP give the batches that they give from a disk, through every fault that heals; others are told."""

import io
import itertools
import os
import tarfile
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from pretrain.config import ConfigError
from pretrain.data import format, index, locks, remote, synthetic
from pretrain.data.compose import Composer
from pretrain.data.depot import Depot
from pretrain.data.format import ShardError
from pretrain.data.loader import Config, Loader, scan
from pretrain.data.order import Place
from pretrain.data.remote import Access, Url
from pretrain.data.shards import Store
from pretrain.data.tokenizer import Tokenizer, train
from pretrain.data.transforms import Augment, Transform
from pretrain.data.transports import base, pipe
from tests.faults import serving

BATCHES = 5  # of 12: two epochs of 30 samples
NAMES = "shapes-{00000..00002}.tar"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([f"a {label}" for label in synthetic.CLASSES], 560)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    synthetic.write(folder, shards=3, samples=10, size=12)
    return folder


@pytest.fixture
def server(folder):
    with serving(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(base, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.02)


def batches(shards, tokenizer: Tokenizer, cache: Path, **options) -> list[dict]:
    """The tensors, keys and names of the first batches."""
    config = Config(
        **{"shards": shards, "workers": 0, "lanes": 4, "augment": Augment(scale=(0.5, 1.0)), "cache_dir": str(cache),
           "retry_seconds": 5, **options}
    )  # fmt: skip
    composer = Composer(tokenizer, context_length=16)
    loader = Loader(config, batch_size=12, seed=7, transform=Transform(8), composer=composer, rank=0, world=1)
    taken = itertools.islice(loader.iterate(), BATCHES)
    return [{**b.tensors(), "keys": b.keys, "meta": b.meta, "names": [Path(s).name for s in b.shards]} for b in taken]


def equal(some: list[dict], others: list[dict]) -> bool:
    def same(one, other) -> bool:
        return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other

    return all(a.keys() == b.keys() and all(same(a[n], b[n]) for n in a) for a, b in zip(some, others, strict=True))


@pytest.fixture(scope="module")
def expected(folder, tokenizer, tmp_path_factory) -> list[dict]:
    return batches(str(folder / NAMES), tokenizer, tmp_path_factory.mktemp("unused"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranges", [False, True])
def test_same_batches_as_from_disk(server, tokenizer, expected, tmp_path, workers, ranges):
    options = {"workers": workers, "range_reads": ranges}
    assert equal(batches(f"{server.url}/{NAMES}", tokenizer, tmp_path, **options), expected)
    assert bool(list(tmp_path.rglob("*.tar"))) is not ranges
    assert len(server.gets("dataset.json")) == 1
    assert len(set(server.gets(".idx"))) == 3
    assert len(list(tmp_path.rglob("*.idx"))) == 3
    asked = len(server.gets(".tar"))
    assert asked == 3 or ranges
    assert equal(batches(f"{server.url}/{NAMES}", tokenizer, tmp_path, **options), expected)
    assert len(server.gets(".tar")) == 3 or ranges


def test_some_shards_here_and_some_there(server, folder, tokenizer, expected, tmp_path):
    shards = [str(folder / "shapes-00000.tar"), f"{server.url}/shapes-{{00001..00002}}.tar"]
    for ranges in (False, True):
        assert equal(batches(shards, tokenizer, tmp_path, range_reads=ranges), expected)
    assert not server.gets("00000.tar")


def test_a_blend_of_shards_here_and_there(server, folder, tokenizer, tmp_path):
    here, there = (f"{where}/shapes-{{00001..00002}}.tar" for where in (folder, server.url))
    other = {"shards": str(folder / "shapes-00000.tar"), "weight": 1}
    drawn = [batches([], tokenizer, tmp_path, blend=[{"shards": s, "weight": 2}, other]) for s in (here, there)]
    assert equal(*drawn) and len(set(server.gets(".tar"))) == 2


def test_a_pass_for_evaluation(server, folder, tokenizer, tmp_path):
    def keys(shards: str) -> list[str]:
        more = {"transform": Transform(8), "composer": Composer(tokenizer, context_length=16)}
        access = Access(cache_dir=str(tmp_path), cache_gb=1)
        return [k for b in scan(shards, reader={"caption": {}}, batch_size=7, access=access, **more) for k in b.keys]

    assert keys(f"{server.url}/{NAMES}") == keys(str(folder / NAMES))


@pytest.mark.parametrize("ranges", [False, True])
@pytest.mark.parametrize("fault", ["drop", "stall", "truncate", "503", "429", "garble"])
def test_faults_that_heal(server, tokenizer, expected, tmp_path, fault, ranges):
    if fault == "garble" and ranges:
        fault = "drop"  # nothing says what a part's checksum is
    for path in ("dataset.json", "00000.tar", "00001.idx", "00002.tar"):
        if fault != "garble":
            server.spoil(fault, path=path, times=2)
    if fault == "garble":
        server.spoil(fault, path="00001.tar", times=1)
    got = batches(f"{server.url}/{NAMES}", tokenizer, tmp_path, range_reads=ranges)
    assert equal(got, expected)
    assert not list(tmp_path.rglob("*.part"))


def test_a_broken_download_goes_on_where_it_broke(server, folder, tmp_path):
    server.spoil("drop", path="00000.tar", times=3)
    access = Access(cache_dir=str(tmp_path), retry_seconds=5)
    source = Url(f"{server.url}/shapes-00000.tar")
    with Depot(access).shard(source, None) as file:
        assert file.read() == (folder / "shapes-00000.tar").read_bytes()
    starts = [int(line.partition("bytes=")[2].rstrip("-") or 0) for line in server.gets("00000.tar")]
    assert starts == sorted(starts) and starts[-1] > starts[2] > 0


def test_a_server_without_ranges(folder, tokenizer, expected, tmp_path):
    with serving(folder, ranges=False) as server:
        server.spoil("drop", times=2)
        assert equal(batches(f"{server.url}/{NAMES}", tokenizer, tmp_path / "a"), expected)
        with pytest.raises(ShardError, match=r"serves no ranges; set data\.range_reads to false"):
            batches(f"{server.url}/{NAMES}", tokenizer, tmp_path / "b", range_reads=True)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("status", ["403", "404"])
def test_what_is_not_there_is_told_at_once(server, tokenizer, tmp_path, status, workers):
    server.spoil(status, path="00001.tar", times=1000)
    before = time.monotonic()
    with pytest.raises(ShardError, match=rf"^shard http://.*00001\.tar: the server answers {status} .*check data\.sh"):
        batches(f"{server.url}/{NAMES}", tokenizer, tmp_path, workers=workers, retry_seconds=100)
    assert time.monotonic() - before < 20


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("503", "the server answers 503 Service Unavailable"),
        ("drop", r"the (connection broke|body ended) after \d+"),
        ("truncate", r"it has \d+ bytes, expected \d+"),
        ("garble", r"its SHA-256 is not the one in dataset\.json"),
    ],
)
def test_what_does_not_heal_stops_the_run(folder, tokenizer, tmp_path, fault, reason):
    with serving(folder, ranges=False) as server:
        server.spoil(fault, path="00001.tar", times=1000)
        with pytest.raises(ShardError, match=rf"^shard http://.*00001\.tar: {reason}.*gave up after \d+ tries, .*"):
            batches(f"{server.url}/{NAMES}", tokenizer, tmp_path, retry_seconds=0.3)
    assert not list(tmp_path.rglob("*.part"))


def test_no_server(tmp_path):
    with serving(tmp_path) as server:
        url = server.url
    with pytest.raises(ShardError, match=r"no connection .*refused.*gave up after"):
        index.resolve(f"{url}/a.tar", Access(cache_dir=str(tmp_path), retry_seconds=0.2))


def copied(folder: Path, to: Path, *suffixes: str) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        if path.suffix in suffixes:
            (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("suffixes", [(".tar", ".idx"), (".tar",)])
def test_without_dataset_json_and_without_indexes(folder, tokenizer, expected, tmp_path, suffixes):
    with serving(copied(folder, tmp_path / "web", *suffixes)) as server:
        catalog = index.resolve(f"{server.url}/{NAMES}", Access(cache_dir=str(tmp_path / "cache")))
        assert catalog.sizes == [10] * 3 and all(catalog.lengths)
        assert bool(server.gets(".tar")) is (len(suffixes) == 1)  # counting needs no shards where there are indexes
        assert equal(batches(f"{server.url}/{NAMES}", tokenizer, tmp_path / "cache"), expected)
        asked = len(server.gets(".idx"))
        index.resolve(f"{server.url}/{NAMES}", Access(cache_dir=str(tmp_path / "cache")))
        assert len(server.gets(".idx")) == asked


def test_a_truncated_body_is_never_a_short_shard(tmp_path):
    """A foreign tar, cut between two members by a proxy that gives the cut length: only the end's mark is missing."""
    path = tmp_path / "web" / "other.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for number in range(6):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = 5
            tar.addfile(info, io.BytesIO(b"a cat"))
    path.write_bytes(path.read_bytes()[: 3 * 1024])
    with serving(path.parent) as server, pytest.raises(ShardError, match="without the mark of an archive's end"):
        index.resolve(f"{server.url}/other.tar", Access(cache_dir=str(tmp_path)))


def test_a_page_instead_of_an_index(folder, tmp_path):
    web = copied(folder, tmp_path / "web", ".tar")
    (web / "shapes-00000.idx").write_bytes(b"<html>not found, but cheerful</html>")
    with serving(web) as server:
        catalog = index.resolve(f"{server.url}/shapes-00000.tar", Access(cache_dir=str(tmp_path / "cache")))
    assert catalog.sizes == [10]


def test_a_shard_that_was_replaced(folder, tokenizer, tmp_path):
    """dataset.json gives other lengths than the cache has: old files are fetched anew."""
    web = copied(folder, tmp_path / "web", ".tar", ".idx", ".json")
    with serving(web) as server:
        batches(f"{server.url}/{NAMES}", tokenizer, tmp_path / "cache")
        synthetic.write(web, shards=3, samples=11, size=16)
        got = batches(f"{server.url}/{NAMES}", tokenizer, tmp_path / "cache")
    assert equal(got, batches(str(web / NAMES), tokenizer, tmp_path / "cache"))


def test_a_cache_that_is_too_small(server, tokenizer, tmp_path):
    with pytest.raises(ShardError, match=r"data\.cache_gb: 1e-06 is less than the largest shard .*raise it"):
        batches(f"{server.url}/{NAMES}", tokenizer, tmp_path, cache_gb=1e-6)


def test_a_cache_that_holds_one_shard_at_a_time(server, folder, tokenizer, expected, tmp_path, caplog):
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    got = batches(f"{server.url}/{NAMES}", tokenizer, tmp_path, workers=2, cache_gb=(largest + 2000) / 1e9)
    assert equal(got, expected)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= largest + 2000
    assert "drawn from 3 shards at a time" in caplog.text


@pytest.mark.slow
def test_loaders_killed_while_they_download(server, folder, tokenizer, expected, tmp_path):
    """Their workers are left to themselves for a while; the bound holds, and the next run is none the wiser."""
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    limit, highest = 2 * largest + 4000, 0
    cache = tmp_path / "diptych-shards"
    server.pause = 0.05
    for moment in (0.2, 0.4, 0.7, 1.1):
        args = (f"{server.url}/{NAMES}", tokenizer, tmp_path)
        process = get_context("fork").Process(target=batches, args=args, kwargs={"workers": 2, "cache_gb": limit / 1e9})
        process.start()
        begin = time.monotonic()
        while time.monotonic() - begin < moment:
            if cache.joinpath(".lock").exists():
                with locks.locked(cache / ".lock"):
                    highest = max(highest, sum(entry.stat().st_size for entry in os.scandir(cache)))
            time.sleep(0.002)
        process.kill()
        process.join()
    server.pause = 0
    assert equal(batches(f"{server.url}/{NAMES}", tokenizer, tmp_path, workers=2, cache_gb=limit / 1e9), expected)
    assert largest < highest <= limit


def test_lists(server, folder, tmp_path):
    text = f"# shapes\n{server.url}/shapes-00000.tar\n\n{server.url}/shapes-{{00001..00002}}.tar\n"
    (tmp_path / "list.txt").write_text(text)
    access = Access(cache_dir=str(tmp_path))
    urls = [f"{server.url}/shapes-0000{n}.tar" for n in range(3)]
    assert [path.text for path in index.expand(f"@{tmp_path}/list.txt", access)] == urls
    (folder / "list.txt").write_text("shapes-{00000..00002}.tar")  # from the list's own folder
    assert [path.text for path in index.expand(f"@{server.url}/list.txt", access)] == urls
    assert index.expand(f"@{folder}/list.txt") == sorted(folder.glob("*.tar"))
    (folder / "list.txt").unlink()
    with pytest.raises(ConfigError, match=r"list .*list\.txt' is not there"):
        index.expand(f"@{server.url}/list.txt", access)
    with pytest.raises(ConfigError, match="cannot be read"):
        index.expand(f"@{tmp_path}/nothing.txt")
    (tmp_path / "list.txt").write_text("pipe:touch harm")
    with pytest.raises(ConfigError, match=r"data\.allow_pipe"):
        index.expand(f"@{tmp_path}/list.txt")


@pytest.mark.parametrize(
    "word", ["pipe:cat x.tar", "PIPE:cat x.tar", "simplecache::s3://a/x.tar", "reference://x.tar", "tar://x::pipe:ls"]
)
def test_what_may_run_programs_is_refused(word):
    with pytest.raises(ConfigError, match=r"may run programs .*data\.allow_pipe=true"):
        index.expand(word)


def test_schemes(tmp_path):
    with pytest.raises(ConfigError, match="'htp', which is no scheme"):
        index.expand("htp://host/x.tar")
    path = tmp_path / "x.tar"
    assert index.expand([f"file://{path}"]) == [path]
    assert index.expand("https://host/x-{0..1}.tar") == [Url("https://host/x-0.tar"), Url("https://host/x-1.tar")]


def test_a_library_that_is_missing(monkeypatch):
    from pretrain.data.transports import filesystem

    def without(scheme):
        raise ImportError("Install gcsfs")

    monkeypatch.setattr(filesystem.fsspec, "get_filesystem_class", without)
    with pytest.raises(ConfigError, match=r"gs:// needs a library that is not installed: pip install 'diptych\[gs\]'"):
        index.expand("gs://bucket/x.tar")


def test_pipes_where_they_are_allowed(folder, tokenizer, expected, tmp_path, monkeypatch):
    """Each command runs once to be indexed and cached; its shards have the names that the files have."""
    log = tmp_path / "log"
    shards = f"pipe:echo x >> {log}; cat {folder}/{NAMES}"
    got = batches(shards, tokenizer, tmp_path / "cache", allow_pipe=True)
    drawn = [{name: value for name, value in batch.items() if name != "names"} for batch in got]
    assert equal(drawn, [{name: value for name, value in batch.items() if name != "names"} for batch in expected])
    assert log.read_text() == "x\n" * 3
    access = Access(cache_dir=str(tmp_path / "cache"), allow_pipe=True, retry_seconds=0.2)
    with pytest.raises(ShardError, match=r"exit code 3 \(no key\).*gave up"):
        index.resolve("pipe:echo no key >&2; exit 3", access)
    monkeypatch.setattr(pipe, "STALL_SECONDS", 0.1)
    with pytest.raises(ShardError, match=r"wrote nothing for .*gave up"):
        index.resolve("pipe:sleep 60", access)


def test_names():
    signed = Url("https://me:pass@host/a%20b/train-1.tar?X-Amz-Signature=abc&part=2")
    assert signed.name == "train-1.tar"
    assert str(signed) == "https://host/a%20b/train-1.tar?X-Amz-Signature=...&part=2"
    assert signed.index.text == "https://me:pass@host/a%20b/train-1.idx?X-Amz-Signature=abc&part=2"
    assert Url("s3://bucket/folder/x.tar").index == Url("s3://bucket/folder/x.idx")
    assert Url("pipe:aws s3 cp s3://b/x-3.tar -").name == "x-3.tar" and Url("pipe:cat").index is None


def test_memory_is_a_file_system_too(folder, tokenizer, expected, tmp_path):
    """Whatever fsspec knows: its own in-memory files stand for the rest."""
    import fsspec

    files = fsspec.filesystem("memory")
    for path in folder.iterdir():
        files.pipe_file(f"/set/{path.name}", path.read_bytes())
    for ranges in (False, True):
        assert equal(batches(f"memory://set/{NAMES}", tokenizer, tmp_path, range_reads=ranges), expected)
    with pytest.raises(ShardError, match="the store has no such object"):
        index.resolve("memory://set/none.tar", Access(cache_dir=str(tmp_path)))


@pytest.mark.parametrize("sharers", [1, 2])
def test_shards_are_fetched_before_they_are_needed(folder, tmp_path, sharers):
    """Four shards come while the first is read, and no more: a quarter of the cache, which workers share."""
    web = tmp_path / "web"
    synthetic.write(web, shards=12, samples=4, size=8)
    size = max(path.stat().st_size for path in web.glob("*.tar"))
    with serving(web) as server:
        cache_gb = 16.5 * size / 1e9
        catalog = index.resolve(f"{server.url}/shapes-{{00000..00011}}.tar", Access(cache_dir=str(tmp_path / "c"),
                                cache_gb=cache_gb))  # fmt: skip
        store = Store(catalog, seed=0)

        def places(batch: int) -> list[Place]:
            return [Place(0, 0, batch, member) for member in range(4)] if batch < 12 else []

        store.prefetch(0, places, sharers=sharers)
        for place in places(0):
            store.read(place)
        deadline = time.monotonic() + 10
        while len(list((tmp_path / "c").rglob("*.tar"))) < 1 + 4 // sharers and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        asked = {line.split()[1] for line in server.gets(".tar")}
        assert asked == {f"/shapes-0000{n}.tar" for n in range(1 + 4 // sharers)}
        for batch in range(1, 12):
            store.prefetch(batch, places, sharers=sharers)
            assert [store.read(place).key for place in places(batch)] == [f"{4 * batch + m:08d}" for m in range(4)]
        assert len(server.gets(".tar")) == 12


def test_samples_that_are_asked_for_and_left_out_are_not_kept(server, tmp_path):
    access = Access(cache_dir=str(tmp_path), range_reads=True)
    catalog = index.resolve(f"{server.url}/{NAMES}", access)
    store = Store(catalog, seed=0)
    for batch in range(3):
        asked = [Place(0, 0, batch, member) for member in range(3)]
        store.prefetch(batch, lambda _, asked=asked: asked, sharers=1)
        store.read(asked[0])
        assert set(store._far.ranges._asked) == set(asked[1:])


def test_a_fork_opens_connections_of_its_own(server, folder, tmp_path):
    depot = Depot(Access(cache_dir=str(tmp_path)))
    sources = [Url(f"{server.url}/shapes-0000{n}.tar") for n in range(3)]
    depot.shard(sources[0], None).close()  # the parent's connection stays open
    child = os.fork()
    if not child:
        os._exit(0 if depot.shard(sources[1], None).read(20).startswith(b"0000") else 1)
    depot.shard(sources[2], None).close()
    assert os.waitpid(child, 0)[1] == 0
    for number in range(3):
        with depot.shard(sources[number], None) as file:
            assert file.read() == (folder / f"shapes-0000{number}.tar").read_bytes()


def test_format_is_the_same_everywhere(server, folder, tmp_path):
    """The index that is made from a download equals the one that the writer left."""
    depot = Depot(Access(cache_dir=str(tmp_path)))
    (made,) = (depot._made(Url(f"{server.url}/shapes-00000.tar"), None),)
    assert made == format.index_path(folder / "shapes-00000.tar").read_bytes()


def test_what_is_secret_in_a_url_is_not_shown() -> None:
    for text, shown in (
        ("pipe:TOKEN=abc HOST=h curl https://h/a.tar", "pipe:curl ... a.tar"),
        ("sftp://me:pw@host/a.tar", "sftp://host/a.tar"),
        ("s3://bucket/a.tar?versionId=7&X-Token=abc", "s3://bucket/a.tar?versionId=7&X-Token=..."),
        ("pipe:curl -H 'Authorization: abc' https://host/a.tar", "pipe:curl ... a.tar"),
        ("simplecache::https://me:pw@host/a.tar", "simplecache::https://host/a.tar"),
    ):
        assert str(Url(text)) == shown
        with pytest.raises(ConfigError) as error:
            index.expand([text, text])
        assert "abc" not in str(error.value) and "pw" not in str(error.value)


def test_nothing_that_lies_beside_the_cache_is_removed(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x" * 1000)
    depot = Depot(Access(cache_dir=str(tmp_path), cache_gb=5e-6))
    (depot.cache.folder / "folder").mkdir()
    for name in "abc":
        depot.cache.open(name, 2000, lambda part: part.write(b"y" * 2000)).close()
    assert (tmp_path / "photo.jpg").exists() and (depot.cache.folder / "folder").is_dir()
    assert not (depot.cache.folder / "a").exists() and (depot.cache.folder / "c").exists()
