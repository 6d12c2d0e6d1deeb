"""What encode writes: the model's own features, each sample once, the same file for any number of ranks and kills."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pretrain import dist, encode, pretrained
from pretrain.config import ConfigError
from pretrain.data import loader, synthetic
from pretrain.data.feature_table import read_about
from pretrain.data.format import ShardWriter
from pretrain.data.remote import Access
from tests import tiny
from tests.ranks import a_port

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = (17, 5, 23)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.export(tmp_path_factory.mktemp("model") / "export")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[str]:
    """Three shards of unequal length: one whole, one without a usable sample, one with two bad ones."""
    folder = tmp_path_factory.mktemp("shards")
    made = []
    for number, samples in enumerate(SAMPLES):
        path = folder / f"part-{number}.tar"
        with ShardWriter(path) as writer:
            for member in range(samples):
                members = synthetic.sample(100 * number + member, size=32, seed=0)
                if number == 1 or (number == 2 and member in (3, 4)):
                    members["png"] = b"<html>"
                writer.add(f"{number}-{member:04d}", members)
        made.append(str(path))
    return made


def run(model: Path, shards: list[str], out: Path, what: str, *, reader: str = "caption", **options) -> str:
    """Encode in this process or rank."""
    job = encode.Job(str(model), shards, out, what, encode.read_reader(reader), batch_size=6, workers=0)
    return encode.encode(job._replace(**options))


@pytest.fixture(scope="module")
def features(ranks, model, shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("features") / "features.parquet"
    [said] = ranks.run(1, run, model, shards, out, "features")
    assert "38 samples of 3 shards, 7 that cannot be used are listed in features.parquet.bad.jsonl" in said
    return out


def test_each_sample_once_with_the_models_own_features(model, shards, features):
    table = pq.read_table(features)
    rows = list(zip(table["shard"].to_pylist(), table["key"].to_pylist()))
    named = [(f"part-{n}.tar", f"{n}-{m:04d}") for n, count in enumerate(SAMPLES) for m in range(count)]
    bad = [named.pop(named.index(("part-2.tar", f"2-000{m}"))) for m in (3, 4)]
    bad += [pair for pair in named if pair[0] == "part-1.tar"]
    assert rows == [pair for pair in named if pair not in bad]
    lines = [json.loads(line) for line in (features.parent / "features.parquet.bad.jsonl").read_text().splitlines()]
    assert sorted((line["shard"], line["key"]) for line in lines) == sorted(bad)
    assert all("decoded" in line["reason"] for line in lines)

    loaded = pretrained.load(model)
    batches = loader.scan(
        shards[:1], reader={"caption": {}}, transform=loaded.transform, composer=loaded.composer, batch_size=17
    )
    [batch] = batches
    with torch.no_grad():
        seen = loaded.model(batch)
    for name, ours in (("image", seen.image), ("text", seen.text)):
        theirs = torch.tensor(np.stack(table[name].to_numpy()[:17]).astype(np.float32))
        assert (theirs - ours).abs().max() <= 1e-3  # half precision
        assert torch.allclose(theirs.norm(dim=-1), torch.ones(17), atol=2e-3)
    assert str(table.schema.field("image").type).startswith("fixed_size_list") and "halffloat" in str(table.schema)
    said = read_about(features)
    assert said["weights"] == loaded.weights_hash and said["transform"]["size"] == 32 and said["what"] == "features"


def test_two_ranks_write_the_same_file(ranks, model, shards, features, tmp_path):
    out = tmp_path / "features.parquet"
    first, second = ranks.run(2, run, model, shards, out, "features")
    assert "38 samples" in first and second == ""
    assert out.read_bytes() == features.read_bytes()
    assert (tmp_path / "features.parquet.bad.jsonl").read_bytes() == features.with_name(
        "features.parquet.bad.jsonl"
    ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.parquet", "features.parquet.bad.jsonl"]
    stamp = out.stat().st_mtime_ns
    assert all("finished already" in said for said in ranks.run(2, run, model, shards, out, "features"))
    assert out.stat().st_mtime_ns == stamp


def test_scores_are_cosines_of_the_features(ranks, model, shards, features, tmp_path):
    out = tmp_path / "scores.parquet"
    ranks.run(1, run, model, shards, out, "scores", workers=2)
    scores, table = pq.read_table(out), pq.read_table(features)
    assert scores["key"].equals(table["key"]) and set(scores["captions"].to_pylist()) == {1}
    image, text = (np.stack(table[name].to_numpy()).astype(np.float32) for name in ("image", "text"))
    assert np.abs(np.array(scores["score"]) - (image * text).sum(1)).max() <= 2e-3
    assert scores["score"].equals(scores["score_max"])


def test_several_captions(ranks, model, shards, tmp_path):
    """Two captions a sample: the mean and the best of what each alone would score."""
    reader = "{{caption: {{text: ['json:{}']}}}}"
    both = run_and_read(ranks, model, shards, tmp_path / "both.parquet", "scores", reader=reader.format("captions"))
    assert set(both["captions"].to_pylist()) == {2}
    loaded = pretrained.load(model)
    [batch] = loader.scan(
        shards[:1], reader={"caption": {}}, transform=loaded.transform, composer=loaded.composer, batch_size=17
    )
    lines = [line for meta in batch.meta for line in meta["captions"]]
    rows = [loaded.composer.row(encode.Example(key="", images=[], suffix=line), []) for line in lines]
    with torch.no_grad():
        text_NTE = loaded.model(loaded.composer.collate(rows)).text.unflatten(0, (17, 2))
        cosine_NT = (loaded.model(batch).image[:, None] * text_NTE).sum(-1)
    assert np.abs(np.array(both["score"])[:17] - cosine_NT.mean(1).numpy()).max() <= 1e-5
    assert np.abs(np.array(both["score_max"])[:17] - cosine_NT.amax(1).numpy()).max() <= 1e-5


def run_and_read(ranks, model: Path, shards: list[str], out: Path, what: str, **options):
    ranks.run(1, run, model, shards, out, what, **options)
    return pq.read_table(out)


def test_one_side_and_other_readers(ranks, model, shards, features, tmp_path):
    reader = "{classify: {name: label}}"
    out = tmp_path / "image.parquet"
    table = run_and_read(ranks, model, shards, out, "features", reader=reader, sides=("image",))
    assert table.column_names == ["shard", "key", "image"]
    assert table["image"].equals(pq.read_table(features)["image"])
    assert len(run_and_read(ranks, model, shards, tmp_path / "s.parquet", "scores", reader=reader)) == 38
    small = run_and_read(ranks, model, shards, tmp_path / "t.parquet", "scores", access=Access(max_pixels=32 * 32 - 1))
    assert len(small) == 0, "data.max_pixels holds here, too"


def train_a_little(file: str) -> int:
    from tests.end_to_end.jobs import pretrain

    return pretrain(Path(file), "train.steps=60", "optim.lr=3e-3", "evals={}", "checkpoint.every_steps=60")


@pytest.mark.slow
def test_a_trained_model_scores_right_captions_higher(ranks, tmp_path):
    """Every other caption is swapped for another sample's: the score tells them apart far better than chance."""
    config = tiny.config_file(tmp_path)
    ranks.run(1, train_a_little, str(config))
    with ShardWriter(tmp_path / "mixed.tar") as writer:
        for number in range(96):
            members = synthetic.sample(number, size=32, seed=0)
            other = synthetic.sample(number + 17 if number % 2 else number, size=32, seed=0)
            writer.add(f"{number:04d}", {**members, "txt": other["txt"]})
    run_folder = tmp_path / "runs" / "tiny"
    table = run_and_read(ranks, run_folder, [str(tmp_path / "mixed.tar")], tmp_path / "s.parquet", "scores")
    score = np.array(table["score"])
    right, wrong = score[0::2], score[1::2]
    assert (right[:, None] > wrong[None]).mean() > 0.8, "area under the curve"


SLOWLY = """
import sys, time
from pretrain import encode
real = encode._shard
def slow(*args):
    out = real(*args)
    print("done", flush=True)
    if args[2].paths[0].name == "part-1.tar":
        time.sleep(60)
    return out
encode._shard = slow
encode.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on(ranks, model, shards, features, tmp_path):
    out = tmp_path / "features.parquet"
    words = [str(model), *shards, str(out), "--features", "--workers", "0", "--batch-size", "6"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    started = subprocess.Popen([sys.executable, "-c", SLOWLY, *words], cwd=ROOT, env=env, stdout=subprocess.PIPE)
    done = (line for line in started.stdout if line == b"done\n")  # libraries print too
    assert next(done) and next(done)  # the first part is written, the second is not
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    parts = tmp_path / "features.parquet.parts"
    assert not out.exists() and [path.name for path in sorted(parts.glob("0*"))] == ["000000.parquet"]
    (parts / "000001.parquet").write_bytes((parts / "000000.parquet").read_bytes()[:100])  # as a dying disk leaves it
    ranks.run(2, run_the_rest, model, shards, out)
    assert out.read_bytes() == features.read_bytes() and not parts.exists()


def run_the_rest(model: Path, shards: list[str], out: Path) -> None:
    real = encode._shard
    seen = []
    try:
        encode._shard = lambda *args: seen.append(str(args[2].paths[0])) or real(*args)
        run(model, shards, out, "features")
    finally:
        encode._shard = real
    asked = [shard for of_rank in dist.gather_objects(seen) for shard in of_rank]
    assert sorted(asked) == sorted(shards[1:]), "what was done is not done again"


def test_other_weights_or_shards_are_not_mixed(ranks, model, shards, tmp_path):
    out = tmp_path / "f.parquet"
    copy = tmp_path / Path(shards[0]).name
    copy.write_bytes(Path(shards[0]).read_bytes())
    before = run_and_read(ranks, model, [str(copy)], out, "features")
    with ShardWriter(copy) as writer:
        writer.add("new", synthetic.sample(3, size=32, seed=0))
    after = run_and_read(ranks, model, [str(copy)], out, "features")
    assert len(before) == 17 and after["key"].to_pylist() == ["new"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL", "SHARD", "OUT"], "one of the arguments --features --scores --codes is required"),
        (["MODEL", "SHARD", "SHARD", "--features"], "OUT must end in .parquet"),
        (["MODEL", "SHARD", "OUT", "--scores", "--only", "text"], "--only is for --features"),
        (["MODEL", "SHARD", "OUT", "--scores", "--batch-size", "0"], "--batch-size must be"),
        (["MODEL", "SHARD", "OUT", "--scores", "--reader", "captoin"], "Did you mean 'caption'"),
        (["MODEL", "SHARD", "OUT", "--scores", "--reader", "{caption: "], "not YAML"),
        (["MODEL", "SHARD", "OUT", "--scores", "data.cache_bg=2"], "unknown key 'cache_bg'"),
        (["MODEL", "pipe:cat a.tar", "OUT", "--scores"], "set data.allow_pipe=true"),
        (["nowhere", "SHARD", "OUT", "--scores"], "model nowhere: no such folder"),
        (["MODEL", "nowhere.tar", "OUT", "--scores"], "nowhere.tar"),
        (["MODEL", "SHARD", "nowhere/x.parquet", "--scores"], "there is no folder"),
    ],
)
def test_mistakes_are_one_sentence(model, shards, tmp_path, words, message, capsys):
    known = {"MODEL": str(model), "SHARD": shards[0], "OUT": str(tmp_path / "x.parquet")}
    with pytest.raises(SystemExit) as stop:
        encode.main([known.get(word, word) for word in words])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_shards_of_one_name_are_refused(shards, tmp_path):
    copy = tmp_path / Path(shards[0]).name
    copy.write_bytes(Path(shards[0]).read_bytes())
    with pytest.raises(ConfigError, match=r"two are called part-0\.tar"):
        encode.base_names(encode.index.resolve([shards[0], str(copy)]))


@pytest.mark.slow
def test_torchrun_writes_the_same_file(model, shards, features, tmp_path):
    out = tmp_path / "features.parquet"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", a_port()]
    words = [str(model), *shards, str(out), "--features", "--workers", "1", "--batch-size", "6"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [*torchrun, "pretrain/encode.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("38 samples of 3 shards") == 1
    assert out.read_bytes() == features.read_bytes()
