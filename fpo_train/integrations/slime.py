"""slime: a reward for `--custom-rm-path fpo_train.integrations.slime.custom_rm`, with `--group-rm` or without.

Without, each sample is scored by itself against its label, and kept for the server's next update. With it a prompt's
samples come together and are one training call; `fpo_train.integrations.slime.group_rm` compares each with another of
them, so that no label is needed. The server is that of `--rm-url`, or of FPO_URL; its token that of FPO_TOKEN. slime's
own `--rm-type remote_rm --rm-url http://127.0.0.1:8008/slime` does as `custom_rm` without `--group-rm`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from fpo_train.errors import RunError
from fpo_train.integrations.server.client import GROUP, FPOClient


async def custom_rm(args: Any, sample: Any, **more: Any) -> float | list[float]:
    """r(z) − γ · penalty(z) of a sample against its label, or of a list of them.

    Args:
        args: slime's; `rm_url` may hold the server's address. sample: with `prompt`, `response` and `label`, or a list.

    Raises:
        RunError: no label, a sample that cannot be scored, or no answer.
    """
    together = isinstance(sample, list | tuple)
    samples = list(sample) if together else [sample]
    for place, one in enumerate(samples):
        if not isinstance(one.label, str) or not one.label:
            told = "slime's --label-key names its column, and group_rm with --group-rm needs none"
            raise RunError(
                f"label {place}: wanted the text to compare the response with, got {one.label!r:.80}; {told}"
            )
    asked, texts = client(getattr(args, "rm_url", None)), ([_prompt(s) for s in samples], [s.response for s in samples])
    if together:
        return _known(await asked.arewards(*texts, [one.label for one in samples]))
    return _known(await asked.ascore(*texts, [samples[0].label], collect=True))[0]


async def group_rm(args: Any, samples: Sequence[Any], **more: Any) -> list[float]:
    """r(z) − γ · penalty(z) of a prompt's samples, each against another of them.

    Raises:
        RunError: slime without `--group-rm`, a sample that cannot be scored, or no answer.
    """
    if not isinstance(samples, list | tuple):
        raise RunError("group_rm: wanted a prompt's samples together, got one; slime's --group-rm hands them over")
    asked = client(getattr(args, "rm_url", None))
    return _known(await asked.arewards([_prompt(s) for s in samples], [s.response for s in samples], GROUP))


@functools.lru_cache(maxsize=8)
def client(url: str | None) -> FPOClient:
    """One client a server and process; an address of the route /slime is the server's too."""
    return FPOClient((url or "").rstrip("/").removesuffix("/slime") or None)


def _prompt(sample: Any) -> Any:
    if isinstance(sample.prompt, str):
        return sample.prompt
    return [{"role": one["role"], "content": one["content"]} for one in sample.prompt]


def _known(found: dict[str, list[float | None]]) -> list[float]:
    known = [value for value in found["effective"] if value is not None]
    if len(known) < len(found["effective"]):
        raise RunError(f"sample {found['effective'].index(None)}: it cannot be scored")
    return known
