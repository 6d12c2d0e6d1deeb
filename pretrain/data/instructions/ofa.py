"""OFA's instructions, word for word: nine tasks of pretraining and those of fine-tuning (Wang et al. 2022,
arXiv:2202.03052, tables of instructions; blanks and lower case as in its release).

    caption        caption                       match          caption
    vqa            vqa                           match_answer   vqa
    locate         grounding                     describe       grounding
    detect         detection                     infill_image   codes
    infill_text    text, caption                 text_to_image  codes, with a text
    question       vqa                           entail         entailment (or sentences of two texts)
    classify       classify                      transcribe     caption
    summarise      translate (source, target)    mnli rte mrpc qqp qnli sst2 cola    sentences

Left the task, right the reader whose examples it takes. Text is lower-cased and begins with a blank, so that byte-level
BPE sees the beginning of a word.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from pretrain.batch import Example
from pretrain.config import Section
from pretrain.data import bins
from pretrain.data.decode import BadSample
from pretrain.data.instructions import base
from pretrain.data.instructions.base import draw_one, lines, needed
from pretrain.data.negatives import Config as NegativesConfig
from pretrain.data.negatives import Negatives
from pretrain.data.spans import corrupt
from pretrain.data.transforms import generator
from pretrain.dist import hash64

Task = Literal[
    "caption", "match", "vqa", "match_answer", "locate", "describe", "detect", "infill_image", "infill_text",
    "text_to_image", "question", "entail", "classify", "transcribe", "summarise",
    "mnli", "rte", "mrpc", "qqp", "qnli", "sst2", "cola",
]  # fmt: skip

#: tasks whose source is fixed words, and whose target is the reader's suffix
PLAIN: dict[str, str] = {
    "caption": " what does the image describe?",
    "classify": " what does the image describe?",
    "transcribe": " what are the texts on the image?",
}
#: tasks whose source is the reader's texts in a frame
FRAMES: dict[str, str] = {
    "summarise": ' what is the summary of article " {} "?',
    "mnli": ' can text1 " {} " imply text2 " {} "?',
    "rte": ' can text1 " {} " imply text2 " {} "?',
    "mrpc": ' does text1 " {} " and text2 " {} " have the same semantics?',
    "qqp": ' is question " {} " and question " {} " equivalent?',
    "qnli": ' does " {} " contain the answer to question " {} "?',
    "sst2": ' is the sentiment of text " {} " positive or negative?',
    "cola": ' is the text " {} " grammatically correct?',
}
MATCH = ' does the image describe " {} "?'
MATCH_ANSWER = ' what is the answer to question " {} ". is " {} "?'
ENTAIL = ' can image and text1 " {} " imply text2 " {} "?'
LOCATE = ' which region does the text " {} " describe?'
DESCRIBE = "  what does the region describe? region: {}"
DETECT = " what are the objects in the image?"
INFILL_IMAGE = " what is the image in the middle part?"
INFILL_TEXT = ' what is the complete text of " {} "?'
TEXT_TO_IMAGE = " what is the complete image? caption: {}"

WEIGHTS: dict[str, float] = {"detect": 2.0, "infill_image": 2.0, "infill_text": 2.0}
CHOSEN = {"question", "entail", "classify", "mnli", "rte", "mrpc", "qqp", "qnli", "sst2", "cola"}  # may have candidates
PUNCTUATION = str.maketrans("", "", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


class Config(Section):
    """`data.instruction.ofa`."""

    tasks: list[Task] = Field(min_length=1)  #: one is drawn for each sample
    words: int = Field(default=30, ge=1)  #: of a caption that is learned, at most
    given: int = Field(default=80, ge=1)  #: words of a text that is given, at most; of one to complete likewise
    punctuation: bool = True  #: false: learned captions have none, as those of COCO in fine-tuning
    unlearned: int = Field(default=0, ge=0)  #: so many first tokens of a caption carry no loss (CC12M: 2)
    tags: int = Field(default=0, ge=0)  #: question: so many names of objects in the json stand behind it
    prompt: Literal["none", "source", "source_end"] = "none"  #: what the decoder reads before an answer of `candidates`
    candidates: list[str] | str = []  # noqa: RUF012  #: what an answer may be: a list, or a file with one a line
    boxes: bins.Config = bins.Config()
    negatives: NegativesConfig = NegativesConfig()

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        other = next((task for task in self.tasks if task not in CHOSEN), None)
        if (self.candidates or self.prompt != "none") and other is not None:
            raise ValueError(f"candidates and prompt: {other} has no answers to choose from; give it its own source")
        return self


class Instruction(base.Instruction):
    """Draws one of the tasks and lays its words."""

    config: Config

    def __init__(self, config: Config, *, others: base.Others | None) -> None:
        super().__init__(config, others=others)
        self.wrong = Negatives(config.negatives, others, where="data.instruction.ofa.negatives")
        if "match" in config.tasks:
            self.wrong.check_captions()
        if "match_answer" in config.tasks:
            self.wrong.check_answers()
        listed = config.candidates
        listed = lines(listed, "data.instruction.ofa.candidates") if isinstance(listed, str) else listed
        self.candidates = tuple(dict.fromkeys(self._answer(one) for one in listed))

    def symbols(self) -> tuple[str, ...]:
        tasks, last = set(self.config.tasks), self.config.boxes.bins - 1
        laid = {
            f"<bin_{last}>": tasks & {"locate", "describe", "detect"},
            "<code_0>": tasks & {"infill_image", "text_to_image"},
            "<mask>": tasks & {"infill_text"},
        }
        return tuple(name for name, by in laid.items() if by)

    def lay(self, example: Example, side: int) -> Example:
        task = draw_one(self.config.tasks, example.draw, "task")
        example = replace(example, weight=WEIGHTS.get(task, 1.0))
        if task in PLAIN:
            text = needed(example.suffix, task, "a text")
            said = self._answer(text) if task == "classify" else self._said(text)
            out = replace(example, prefix=PLAIN[task], suffix=said)
            out.unlearned = self.config.unlearned if task == "caption" else 0
        elif task in FRAMES:
            out = self._framed(example, task)
        elif task in ("locate", "describe", "detect"):
            out = self._boxed(example, task, side)
        else:
            laid: Callable[[Example], Example] = getattr(self, f"_{task}")
            out = laid(example)
        if self.candidates and out.suffix not in self.candidates:
            raise BadSample(f"{out.suffix.strip()!r} is none of the {len(self.candidates)} candidates")
        return replace(out, candidates=self.candidates, prompt=self.config.prompt)

    def _given(self, text: str) -> str:
        return " ".join(text.lower().split()[: self.config.given])

    def _answer(self, text: str) -> str:
        return f" {' '.join(text.lower().split())}"

    def _said(self, text: str) -> str:
        text = text.lower()
        if not self.config.punctuation:
            text = text.translate(PUNCTUATION)
        return f" {' '.join(text.split()[: self.config.words])}"

    def _framed(self, example: Example, task: str) -> Example:
        texts = [example.prefix] if task == "summarise" else example.meta.get("texts", [])
        if len(texts) != FRAMES[task].count("{}") or not all(texts):
            raise BadSample(f"{task} needs {FRAMES[task].count('{}')} texts, this data.reader gives {len(texts)}")
        said = self._said(example.suffix) if task == "summarise" else self._answer(example.suffix)
        return replace(example, prefix=FRAMES[task].format(*map(self._given, texts)), suffix=said, images=[])

    def _match(self, example: Example) -> Example:
        caption = needed(example.suffix, "match", "a caption")
        right = draw_one((True, False), example.draw, "match")
        shown = caption if right else self.wrong.caption(example, caption)
        return replace(example, prefix=MATCH.format(self._given(shown)), suffix=" yes" if right else " no")

    def _vqa(self, example: Example) -> Example:
        answer, sure = _heaviest(example)
        return replace(example, prefix=f" {self._given(example.prefix)}", suffix=self._answer(answer), weight=sure)

    def _match_answer(self, example: Example) -> Example:
        answer, sure = _heaviest(example)
        right = draw_one((True, False), example.draw, "match")
        shown = answer if right else self.wrong.answer(example, answer, sure)
        prefix = MATCH_ANSWER.format(self._given(example.prefix), self._given(shown))
        return replace(example, prefix=prefix, suffix=" yes" if right else " no", weight=sure)

    def _question(self, example: Example) -> Example:
        answer, sure = _heaviest(example) if example.suffix else ("", 1.0)
        asked = self._given(needed(example.prefix, "question", "a question")).rstrip("?").rstrip() + "?"
        listed = example.meta.get("objects", [])
        names = (
            [one.lower() for one in listed if isinstance(one, str) and "\0" not in one]
            if isinstance(listed, list)
            else []
        )
        if self.config.tags and names:
            asked += f" object: {' '.join(names[: self.config.tags])}"
        return replace(example, prefix=f" {asked}", suffix=self._answer(answer), weight=sure)

    def _entail(self, example: Example) -> Example:
        texts = [self._given(text) for text in example.meta.get("texts", [example.prefix])]
        if not 0 < len(texts) <= 2 or not all(texts):
            raise BadSample(f"entail needs a hypothesis, or a premise and a hypothesis, got {len(texts)} texts")
        frame = MATCH if len(texts) == 1 else ENTAIL
        return replace(example, prefix=frame.format(*texts), suffix=self._answer(example.suffix))

    def _boxed(self, example: Example, task: str, side: int) -> Example:
        marks = bins.text(needed(example.boxes_K4, task, "boxes"), side, self.config.boxes)
        if task == "detect":
            names = needed(example.meta.get("names"), task, "names of objects")
            said = " ".join(f"{mark} {name.lower()}" for mark, name in zip(marks, names))
            return replace(example, prefix=DETECT, suffix=said)
        text = needed(example.prefix or example.suffix, task, "an expression")
        if task == "locate":
            return replace(example, prefix=LOCATE.format(self._given(text)), suffix=marks[0])
        return replace(example, prefix=DESCRIBE.format(marks[0]), suffix=self._said(text))

    def _infill_image(self, example: Example) -> Example:
        if not (example.codes and example.images):
            raise BadSample("infill_image needs a picture and codes, which this data.reader does not give")
        return replace(example, prefix=INFILL_IMAGE, hole=True)

    def _text_to_image(self, example: Example) -> Example:
        text = needed(example.prefix if example.codes else None, "text_to_image", "codes and a text")
        return replace(example, prefix=TEXT_TO_IMAGE.format(self._given(text)), images=[], codes_alone=True)

    def _infill_text(self, example: Example) -> Example:
        words = needed(example.suffix, "infill_text", "a text").lower().split()[: self.config.given]
        found = corrupt(words, "bart", generator(hash64(example.draw, "infill")))
        prefix, said = INFILL_TEXT.replace("{}", found.holes), f" {found.said}"
        return replace(example, prefix=prefix, suffix=said, images=[], boxes_K4=None)


def _heaviest(example: Example) -> tuple[str, float]:
    """Return the answer of the greatest weight, and the weight."""
    scores = needed(example.meta.get("answer_scores") or None, "vqa", "weighed answers")
    answer = max(scores, key=lambda one: scores[one])
    return answer, scores[answer]
