"""Zero-shot templates: sentences with a hole for the name of a class."""

from pretrain.config import ConfigError
from pretrain.registry import nearest

SETS: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "simple": ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "a {}."),
    "icon": ("{}", "an icon of {}", "an emoji of {}", "a drawing of {}", "a picture of {}"),
    # the seven that forward selection kept of CLIP's eighty (Radford et al. 2021, notebook of the release)
    "imagenet7": (
        "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
        "a {} in a video game.", "art of the {}.", "a photo of the small {}.",
    ),
}  # fmt: skip


def templates(chosen: str | list[str]) -> list[str]:
    """Return the templates of a named set, or the given ones.

    Raises:
        ConfigError: no such set, an empty list, or a template without exactly one hole.
    """
    if isinstance(chosen, str):
        if chosen not in SETS:
            known = list(SETS)
            raise ConfigError(f"templates: no set {chosen!r}.{nearest(chosen, known)} Known: {', '.join(known)}")
        return list(SETS[chosen])
    wrong = next((t for t in chosen if t.count("{}") != 1), None)
    if wrong is not None or not chosen:
        raise ConfigError(f"templates: {wrong!r} must have one hole, as in 'a photo of a {{}}.'")
    return list(chosen)


def fill(names: list[str], chosen: str | list[str]) -> list[list[str]]:
    """Return, for each class name, its sentences, one a template."""
    return [[template.replace("{}", name) for template in templates(chosen)] for name in names]
