"""From shards to a codebook, from the codebook to a table of codes, from the table into shards that a reader reads."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data_tools import __main__ as data_tools
from pretrain import codebook, encode
from pretrain.config import ConfigError
from pretrain.data.feature_table import read_about
from pretrain.data.format import read_manifest
from pretrain.data.loader import scan
from pretrain.models import image_codes
from tests import tiny


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of coloured shapes."""
    return tiny.corpus(tmp_path_factory.mktemp("corpus"), samples=12)


@pytest.fixture(scope="module")
def fitted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codebook of the middles of 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("codebook") / "shapes"
    shards = f"{corpus}/shapes-{{00000..00001}}.tar"
    words = [shards, str(folder), "--size", "32", "--middle", "--steps", "3", "--batch-size", "8", "codes=16"]
    assert codebook.main([*words, "data.workers=0"]) == 0
    return folder


def coded(ranks, fitted: Path, corpus: Path, out: Path, *, world: int = 1, **keys: object) -> Path:
    """Write a table of codes on some ranks."""
    shards = [f"{corpus}/shapes-{{00000..00001}}.tar"]
    job = encode.Job(str(fitted), shards, out, "codes", {"picture": {}}, batch_size=5, workers=0, size=32, middle=True)
    ranks.run(world, encode.encode, job._replace(**keys))
    return out


@pytest.mark.slow
def test_codes_of_shards(ranks, fitted: Path, corpus: Path, tmp_path: Path) -> None:
    out = coded(ranks, fitted, corpus, tmp_path / "codes.parquet")
    two = coded(ranks, fitted, corpus, tmp_path / "two.parquet", world=2)
    assert out.read_bytes() == two.read_bytes()
    table = pq.read_table(out)
    codes_NP = np.stack(table["codes"].to_numpy())
    assert codes_NP.shape == (24, 4) and codes_NP.dtype == np.uint16 and len(np.unique(codes_NP)) > 4
    made = image_codes.load(fitted)
    [batch] = scan(
        f"{corpus}/shapes-00000.tar", reader={"picture": {}}, transform=codebook.transform(32),
        composer=codebook.composer(), batch_size=12,
    )  # fmt: skip
    own = made.encode(image_codes.middle(image_codes.in_unit(batch.image_NCHW)))
    assert torch.equal(own, torch.tensor(codes_NP[:12].astype(np.int64)))
    about = read_about(out)
    assert about["part"] == "middle" and about["size"] == 32 and about["codebook_size"] == 16 and len(about["weights"])

    words = ["codes", str(corpus), "--table", str(out), "--out", str(tmp_path / "with")]
    assert data_tools.main(words) == 0
    manifest = read_manifest(tmp_path / "with")
    assert manifest["meta"]["codes"]["weights"] == about["weights"]
    assert {row["samples"] for row in manifest["shards"].values()} == {12}
    batches = scan(
        str(tmp_path / "with" / "shapes-00000.tar"), reader={"codes": {}}, transform=codebook.transform(32),
        composer=Keeping(), batch_size=12,
    )  # fmt: skip
    [batch] = batches
    said = [[int(word.strip("\0<>").removeprefix("code_")) for word in meta["suffix"].split()] for meta in batch.meta]
    assert said == codes_NP[:12].tolist()


class Keeping(type(codebook.composer())):
    """A composer that keeps each example's suffix in its meta."""

    def __init__(self) -> None:
        super().__init__(codebook.composer().tokenizer, context_length=2)

    def row(self, example, images):
        example.meta = {"suffix": example.suffix}
        return super().row(example, images)


def test_equal_commands_fit_equally(fitted: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shards = f"{corpus}/shapes-{{00000..00001}}.tar"
    common = ["--size", "32", "--middle", "--steps", "3", "--batch-size", "8", "codes=16", "data.workers=0"]
    assert codebook.main([shards, str(tmp_path / "again"), *common]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (fitted / "model.safetensors").read_bytes()
    assert "16 codes; squared error" in capsys.readouterr().out
    for words, said in (
        ([*common[:1], "40", *common[2:]], "multiple of 16"),
        ([*common, "--kind", "vqva"], "Did you mean 'vqvae'"),
        ([*common, "code=3"], "unknown key 'code'"),
    ):
        with pytest.raises(SystemExit) as left:
            codebook.main([shards, str(tmp_path / "bad"), *words])
        assert left.value.code == 2 and said in capsys.readouterr().err


def test_encode_refuses_what_is_not_of_codes(fitted: Path, corpus: Path, tmp_path: Path) -> None:
    for words in (["--scores", "x.parquet", "--middle"], ["--codes", "x.parquet", "--only", "image"]):
        with pytest.raises(SystemExit):
            encode.main([str(fitted), f"{corpus}/shapes-00000.tar", *words])
    with pytest.raises(ConfigError, match="no image tokenizer"):
        codebook.Coder(corpus, size=32, middle=False)
