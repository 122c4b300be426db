"""The loss mask of a conversation: the assistant's tokens in all rounds except the example turns."""

from collections.abc import Sequence

import numpy as np

from cartridges.records import Message
from cartridges.template import ChatTemplate


def with_loss_mask(template: ChatTemplate, turns: Sequence[Message], answer_ids: Sequence[int],
               rounds: int = 1) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """`(input_ids, loss_mask)` of `turns`, which end with the user's, followed by the answer `answer_ids`. The mask
    selects the answers of the last `rounds`.

    Raises `ValueError` if the chat template changes the rendering of an earlier turn when later ones follow.
    """
    prompt = template.conversation_ids(turns)
    ids, mask = [*prompt, *answer_ids], np.zeros(len(prompt) + len(answer_ids), bool)
    mask[len(prompt) - 1:-1] = True
    for back in range(1, rounds):
        begin = template.conversation_ids(turns[: len(turns) - 2 * back])
        if ids[: len(begin)] != begin:
            raise ValueError("the chat template rewrites earlier turns: plan no conversations of several rounds")
        # This answer extends to the end of its turn.
        mask[len(begin) - 1:ids.index(template.tokenizer.eos_token_id, len(begin))] = True
    return tuple(ids), tuple(mask.tolist())


def without_end_of_turn(ids: Sequence[int], mask: Sequence[bool], logprobs: np.ndarray, end: int) -> np.ndarray:
    """The `logprobs` at the loss positions except those of `end`, which say nothing about the answer."""
    targets = np.array(ids[1:])[np.array(mask[:-1])]
    return logprobs[targets != end]
