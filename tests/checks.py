"""What the methods' check lists ask for, item by item; `@pytest.mark.check(list, item)` says which test shows it.

`python -m tests.checks` writes tests/CHECKS.md, the table item -> test; tests/test_checks.py fails on an item without
a test, on a marker without an item, and on a stale table.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = TESTS / "CHECKS.md"

LISTS: dict[str, tuple[str, ...]] = {
    "univl": (
        "no logit depends on a later text token under causal and prefix masks; under BI and FULL they do",
        "PREFIX(T) is BI; PREFIX(0), PREFIX(1) and CAUSAL are one matrix",
        "image states do not depend on the text unless the mask is FULL",
        "cached decoding equals the full forward, causal and with a prefix",
        "decoding by an appended [MASK]: cached equals uncached",
        "a batch of mixed modes equals a run for each mode",
        "more padding changes nothing",
        "the transitive closure of every mode's mask has no path from a target to what predicts it",
        "the gradient of a state by a later embedding is zero",
        "p_causal 0 has no causal loss, 1 no masked one",
        "who gets which mode is the same for 1, 2 and 4 ranks, and as often as asked for",
        "joint and crossing backbones build the same mask of the text",
        "ten samples are learned by heart: greedy decoding gives the captions, masked words are all right",
        "the first losses are ln V",
    ),
    "vl-t5": (
        "parameter counts of VL-T5 and VL-BART",
        "without visual tokens the logits are those of transformers' T5 and BART",
        "regions in another order: text states and logits stay",
        "a masked region is no region",
        "the position bias is zero wherever a visual token is involved, and T5's elsewhere",
        "golden values of T5's position buckets",
        "region sentinels, words and head are one storage, after a resize and after DeepSpeed's start too",
        "span corruption can be undone, and takes out as many words as it says",
        "a negative of matching is never of the same picture; half of all are positives",
        "the mean over samples is not the mean over tokens",
        "the order of tasks is equal on all ranks, and another in another epoch",
    ),
    "ofa": (
        "parameter counts of all five sizes",
        "golden values of the position buckets; tables start without effect; an image table leaves text alone",
        "a picture that is masked has no effect; keeping all patches is keeping none back",
        "bins and codes: round trips and ranges of ids",
        "a masked softmax sums to 1; answers come from the list; all ways to search a small trie agree",
        "label smoothing: none is cross-entropy; uniform logits cost ln |A|; double confidence, double loss",
        "decoding step by step gives the logits of the full forward, for text and for codes",
        "self-critical training: rewards of a picture sum to zero, equal hypotheses have no gradient",
        "the scale of heads does nothing at the start",
        "two mini-batches: the sum of two means, not the mean of all",
        "matching is sampled evenly; a grounding sample never becomes one of matching",
    ),
    "coop": (
        "started from a template's words, it is the zero-shot classifier",
        "a context per class, all equal, is the shared context",
        "without a context, the place of the class name makes no difference",
        "only the context has a gradient",
        "ten steps leave the base's hash as it was",
        "CoCoOp whose meta-net gives zero is CoOp",
        "CoCoOp on a batch is CoCoOp on each picture",
        "classes in chunks: the same values and gradients",
        "a trained context serves another list of classes",
        "golden values of the published learning rates",
        "ranks with a share of the pictures are one process with all",
    ),
    "clip-adapter": (
        "ratio 0 is zero-shot, bit for bit",
        "a zero second layer is zero-shot, whatever the ratio",
        "Tip with alpha 0 is zero-shot",
        "Tip with a very sharp beta gives a key's own class",
        "a key's affinity with itself is 1",
        "Tip-F before training is Tip",
        "the order of the cache makes no difference",
        "every support sample twice is the cache's term twice",
        "training on cached features is training on pictures",
        "the optimizer holds the adapter's parameters only",
        "the grid search finds the best of a small grid",
        "the name of a feature cache depends on weights and transform",
    ),
    "zero-shot": (
        "one template is the encoded sentence",
        "a template twice is the template once",
        "class weights are normalised means of normalised features",
        "ranks with a share of the sentences are one process with all",
        "folders of open_clip and transformers score as these libraries do",
    ),
    "linear-probe": (
        "the solution is scikit-learn's",
        "where the solver starts makes no difference",
        "C is the best on the validation split",
        "C is searched over decades, then by halves of a step around the best",
        "features are those before the projection, or unit-norm joint ones",
        "two ranks find the head of one",
        "cached features give the head that pictures give",
        "the base's hash stays as it was",
    ),
    "lora": (
        "before training it is the base",
        "the formula of an update; parts of a fused linear are updated as linears of their own",
        "merged, it is the same function and a model like any other",
        "only updates have a gradient",
        "training leaves the base's hash as it was, at every ZeRO stage",
        "counts of parameters, the published one among them",
        "dropout is of the update only",
        "timm's ViT, BEiT and EVA, and transformers' CLIP: the same identities",
        "a tower without the linears asked for is refused in a sentence",
        "micro-batches train as the whole batch",
        "the moving average is what is saved",
    ),
    "full": (
        "before training it is zero-shot, with either head",
        "WiSE-FT has the base and the tuned model at its ends",
        "WiSE-FT is linear in the weights",
        "another mixture needs no training",
        "what trains has a gradient, nothing else has",
        "layers get their share of the rate",
        "micro-batches train as the whole batch",
        "the moving average is what is scored and saved",
    ),
    "few-shot": (
        "draws depend on seed and keys alone; fewer shots are a part of more; a later start finds the same bytes",
        "CoOp's published splits drop in",
        "base to new: halves of the classes, numbered anew",
        "so many samples of each class, validation apart from train, the whole test split",
        "features that are kept are computed once, wherever a picture lies",
        "every method at every ZeRO stage on two ranks is one rank; what is frozen stays as it was",
        "every method goes on after a kill of a rank, bit for bit",
    ),
}


def marked() -> Iterator[tuple[str, int, str]]:
    """Yield (list, item, test) for each marker in the tests."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.check":
                    name, item = (ast.literal_eval(word) for word in mark.args)
                    yield name, item, f"{path.relative_to(TESTS)}::{node.name}"


def covered() -> dict[tuple[str, int], list[str]]:
    """Return the tests of each marked item."""
    out: dict[tuple[str, int], list[str]] = {}
    for name, item, test in marked():
        out.setdefault((name, item), []).append(test)
    return out


def table() -> str:
    """Return tests/CHECKS.md."""
    found = covered()
    lines = ["# Which test shows what", "", "Written by `python -m tests.checks` from the markers in the tests."]
    for name, items in LISTS.items():
        lines += ["", f"## {name}", "", "| | what is shown | by |", "|---|---|---|"]
        for number, what in enumerate(items, 1):
            tests = "<br>".join(f"`{test}`" for test in sorted(found.get((name, number), [])))
            lines.append(f"| {number} | {what} | {tests or '**no test**'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
