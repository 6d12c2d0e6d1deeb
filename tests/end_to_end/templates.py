"""The task templates of every model that writes, over the members of quilts, and the tiny models that learn them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.end_to_end import quilts

BINS, CODES = 17, 16
START = "start.pt"
YES_NO, TRUE_FALSE = ("yes", "no"), ("true", "false")
COLOURS, NAMES = tuple(quilts.GERMAN), quilts.NAMES


@dataclass(frozen=True)
class Template:
    """A task, the reader of its samples, and how what it says is written."""

    task: str  #: of the instruction; for a model without instructions a name
    reader: dict[str, dict[str, Any]]
    keys: dict[str, Any] = field(default_factory=dict)  #: of the instruction, beside its task
    by: str = "greedy"  #: greedy or beam; trie or rank, among `words`; bin or code, so many as `symbols`; or match
    words: tuple[str, ...] = ()
    symbols: int = 0
    weight: float = 1.0  #: share of the rows


def text(*where: str) -> dict[str, Any]:
    """Return where a reader finds its text: in the json, or in the caption's member."""
    return {"text": [f"json:{name}" for name in where] or ["txt"]}


def sentences(*texts: str, words: tuple[str, str] = YES_NO, **keys: Any) -> dict[str, Any]:
    """Return a reader of sentences that are true or not."""
    labels = {"1": words[0], "0": words[1]}
    where = [[f"json:{name}"] for name in texts]
    return {"sentences": {"texts": where, "label": ["json:true"], "labels": labels, **keys}}


def entailment(yes: str, maybe: str, no: str, **keys: Any) -> dict[str, Any]:
    """Return a reader of hypotheses."""
    return {"entailment": {"labels": dict(zip(quilts.LABELS, (yes, maybe, no))), **keys}}


def judged(task: str, *texts: str, words: tuple[str, str] = YES_NO) -> Template:
    """Return a template of GLUE's kind: text alone, learned faster than what a picture shows."""
    return Template(task, sentences(*texts, words=words), by="trie", words=words, weight=0.5)


BOXES = {"boxes": {"bins": BINS, "divisor": None}}
CODED = {"codes": ["json:codes"]}
MAYBE = ("yes", "maybe", "no")
OFA = (
    Template("caption", {"caption": text()}),
    Template("match", {"caption": text("first")}, by="trie", words=YES_NO),
    Template("vqa", {"vqa": {}}, by="beam"),
    Template(
        "match_answer", {"vqa": {}}, {"negatives": {"answers": quilts.ANSWERS}}, by="trie", words=YES_NO, weight=2.0
    ),
    Template("locate", {"grounding": text("corner")}, BOXES, by="bin", symbols=4),
    Template("describe", {"grounding": text("colour")}, BOXES),
    Template("detect", {"detection": {"most": 2}}, BOXES),
    Template("infill_image", {"codes": CODED}, by="code", symbols=4),
    Template("infill_text", {"text": text("named")}),
    Template("text_to_image", {"codes": {**CODED, **text("name")}}, by="code", symbols=4),
    Template("question", {"vqa": {}}, {"candidates": list(COLOURS), "prompt": "source_end"}, by="rank", words=COLOURS),
    Template("entail", {"entailment": {}}, {"candidates": list(MAYBE)}, by="trie", words=MAYBE),
    Template("classify", {"classify": {}}, {"candidates": list(NAMES)}, by="rank", words=NAMES),
    Template("transcribe", {"caption": text("name")}),
    Template("summarise", {"translate": {}}),
    *(judged(task, "sentence1", "sentence2") for task in ("mnli", "rte", "mrpc", "qqp", "qnli")),
    judged("sst2", "sentence1", words=("positive", "negative")),
    judged("cola", "sentence1"),
)
ASKED = (Template("vqa", {"vqa": {}}, by="beam"), Template("gqa", {"vqa": {}}), Template("visual7w", {"vqa": {}}))


def vlt5(noise: str, refcocog: dict[str, Any], ground: int = 1, **nlvr: Any) -> tuple[Template, ...]:
    """Return VL-T5's templates; `ground` regions of a sample are named at once."""
    true: dict[str, Any] = {"by": "trie", "words": TRUE_FALSE}
    shown: dict[str, Any] = {"words": TRUE_FALSE, "image": ["png"]}
    return (
        Template("lm", {"caption": text()}, {"noise": noise}),
        Template("itm", {"caption": text("first")}, **true),
        *ASKED,
        Template("refer", {"detection": {}}, {"ground": ground, **refcocog}),
        Template("ground_caption", {"detection": {}}, {"ground": ground, **refcocog}),
        Template("caption", {"caption": text()}),
        Template("nlvr", entailment("true", "false", "false", **nlvr), **true),
        Template("refcocog", {"grounding": text("colour")}, refcocog),
        Template("vcr_qa", sentences("question", "answer", **shown), **true),
        Template("vcr_qar", sentences("question", "answer", "name", **shown), **true),
        Template("translate", {"translate": {}}),
    )


#: which of all texts belongs to a picture
MATCHED = (Template("caption", {"caption": text()}, by="match"),)
#: what a causal text can say: a caption, and an answer behind its question
CAUSAL = (Template("caption", {"caption": text()}), Template("answer", {"vqa": {"prompt": "{}"}}, by="beam"))


@dataclass(frozen=True)
class Learner:
    """A tiny model, what it learns, and for how long."""

    model: dict[str, Any]
    templates: tuple[Template, ...]
    objectives: dict[str, Any]
    paper: str = ""  #: its instructions; none: the reader's own texts
    data: dict[str, Any] = field(default_factory=dict)
    start: str = ""  #: key of the model that names a file of first weights; none: they are drawn
    steps: int = 300
    rate: float = 3e-3
    rows: int = 128
    lanes: int = 4  #: of one shard each rank reads its own lanes; what compares a rank's rows wants one lane

    def source(self, folder: Path, one: Template) -> dict[str, Any]:
        """Return the entry of a blend with one template over the quilts in a folder."""
        keys = dict(one.keys)
        if "negatives" in keys:
            keys["negatives"] = {"answers": str(folder / quilts.ANSWERS)}
        laid = {"instruction": {self.paper: {"tasks": [one.task], **keys}}} if self.paper else {}
        return {"name": one.task, "shards": str(folder / quilts.SHARD), "reader": one.reader, **laid, **self.data}

    def section(self, folder: Path, *, start: str = "") -> dict[str, Any]:
        """Return the model's section over the tokenizer of a folder, and where asked to over its first weights."""
        tree = {**self.model, "tokenizer": str(folder / "tokenizer")}
        if start:
            *path, key = start.split(".")
            inner = tree
            for name in path:
                inner[name] = inner = dict(inner[name])
            inner[key] = str(folder / START)
        return tree

    def write_config(self, folder: Path, name: str) -> Path:
        """Write the config of its run, over the quilts and with the tokenizer of a folder."""
        tree = {
            "run": {"name": name, "dir": str(folder / "runs"), "seed": 1},
            "data": {
                "blend": [{**self.source(folder, one), "weight": one.weight} for one in self.templates],
                "lanes": self.lanes,
                "workers": 0,
                "augment": {"scale": [1.0, 1.0]},
            },
            "model": self.section(folder, start=self.start),
            "objectives": self.objectives,
            "train": {"steps": self.steps, "batch_size": self.rows},
            "optim": {"lr": self.rate, "warmup": 20, "weight_decay": 0.0},
            "checkpoint": {"every_steps": 100_000},
            "monitor": {"log_every": 50, "tensorboard": False},
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path


def _ofa() -> dict[str, Any]:
    size = {"width": 64, "hidden": 128, "heads": 4, "encoder_layers": 2, "decoder_layers": 2}
    stem = {"stem": [1, 1, 1], "stem_width": 8, "batch_norm": "frozen", "image_size": 32, "code_image_size": 16}
    places = {"codes": CODES, "bins": BINS, "positions": 64, "token_bucket": 8, "image_bucket": 4}
    return {"name": "ofa", **size, **stem, **places, "dropout": 0.0, "drop_path": 0.0, "source_length": 40,
            "target_length": 40}  # fmt: skip


def _vlt5(backbone: str, vision: dict[str, Any]) -> dict[str, Any]:
    size = {"width": 64, "layers": 2, "heads": 4, "hidden": 128, "dropout": 0.0, "positions": 48}
    words = {"backbone": backbone, **size, "source_length": 40, "target_length": 24}
    return {"name": "vlt5", "text": words, "vision": vision}


def _vit(**keys: Any) -> dict[str, Any]:
    size = {"embed_dim": 64, "depth": 1, "num_heads": 4, "patch_size": 16}
    return {"name": "vit_base_patch32_clip_224", "image_size": quilts.SIZE, "args": size, **keys}


def _towers(**keys: Any) -> dict[str, Any]:
    words = {"width": 64, "layers": 1, "heads": 4, "context_length": 20, "mlp_ratio": 2.0}
    return {"vision": _vit(), "text": words, "embed_dim": 32, **keys}


def _fused(kind: str, predict: str) -> dict[str, Any]:
    return _towers(fusion={"kind": kind, "layers": 2, "predict": predict})


REGIONS = {"regions": {"layout": "xyxy", "unit": "fractions"}}
NEXT = {"captioning": {}, "prefix_lm": {}, "mixed_lm": {"share": 0.3}, "masked_lm": {}}
LEARNERS = {
    "ofa": Learner(_ofa(), OFA, {"instruction": {}}, "ofa", start="weights", steps=400),
    "t5": Learner(
        _vlt5("t5", {"source": "region", "width": len(COLOURS), "regions": 4}),
        vlt5("t5", {}),
        {"instruction": {"reduction": "sample"}},
        "vlt5",
        REGIONS,
        rate=4e-3,
    ),
    "bart": Learner(
        _vlt5("bart", {"source": "patch", "tower": _vit(), "images": 2}),
        vlt5("bart", {"grid": [2, 2]}, ground=2, second=["second.png"]),
        {"instruction": {}},
        "vlt5",
        start="text.weights",
    ),
    "crossing": Learner(_fused("cross", "next"), CAUSAL, NEXT, rows=64),
    "joint": Learner(_fused("joint", "next"), CAUSAL, NEXT, rows=64),
    "masked": Learner(
        _fused("joint", "masked"),
        CAUSAL,
        {"mixed_lm": {"recipe": "masked_causal", "share": 0.3}, "masked_lm": {}},
        rows=64,
    ),
    "matched": Learner(
        _fused("cross", "next"), MATCHED, {"matching": {}}, rows=64, lanes=1, steps=400
    ),
    "coca": Learner(
        _towers(name="coca", fusion={"layers": 2}, queries=4, pool_heads=4),
        CAUSAL,
        {"contrastive": {}, "captioning": {}},
        rows=64,
        steps=120,
    ),
}  # fmt: skip
