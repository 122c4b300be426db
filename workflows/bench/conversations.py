"""What the training bench trains on: conversations made by rule, or a data set; and a round's share of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cartridges.config import BuildSettings
from cartridges.distill.packing import PackPlan, own_lengths
from cartridges.distill.schedule import Order
from cartridges.errors import UserError
from cartridges.models import BaseModel
from cartridges.records import Conversation
from cartridges.selfstudy.families import DEFAULT_MIXTURE, FAMILIES

BY_RULE = {name: share for name, share in DEFAULT_MIXTURE.items() if not FAMILIES[name].decodes}
"""The families of the default mixture for which nothing has to be decoded, in its proportions."""


@dataclass(frozen=True)
class Work:
    """A round: `plans[s]` are the packs of step `s`, `chosen` their conversations in order.

    `batch_size` is how many conversations a step has on average: the peers' batches, so that all
    sides take as many optimiser steps for the same conversations.
    """

    conversations: Sequence[Conversation]
    plans: list[list[PackPlan]]
    chosen: list[Conversation]
    batch_size: int

    @property
    def tokens(self) -> int:
        """Tokens of the conversations, their example turns included."""
        return sum(len(conversation.input_ids) for conversation in self.chosen)


def choose_work(conversations: Sequence[Conversation], settings: BuildSettings, steps: int) -> Work:
    """The first `steps` steps of our trainer. Every side and every round takes the same.

    Conversations longer than a pack are left out: ours would cut them, the peers would not. Raises
    `UserError` where none remains.
    """
    lengths = own_lengths(conversations)
    conversations = [one for one, length in zip(conversations, lengths, strict=True)
                     if length <= settings.train.pack_tokens]
    if not conversations:
        raise UserError(f"every conversation is longer than a pack of {settings.train.pack_tokens} tokens; "
                        "raise --pack-tokens")
    order = Order(conversations, settings.train, settings.seed)
    plans = [order.plans(step) for step in range(steps)]
    chosen = [conversations[index] for step in plans for plan in step for row in plan.rows for index in row]
    return Work(conversations, plans, chosen, max(1, round(len(chosen) / steps)))


SAMPLE = files("workflows") / "sample" / "corpus"


def sample_corpus():
    """The corpus that comes with the package."""
    from cartridges.corpus import load_corpus

    return load_corpus(str(SAMPLE))


def write_conversations(base: BaseModel, settings: BuildSettings, count: int, directory: Path) -> int:
    """Plan `count` rule-made conversations of the sample corpus, write the kept ones; how many they are."""
    from cartridges.chunking import chunk_corpus
    from cartridges.engines.transformers import TransformersEngine
    from cartridges.selfstudy.plan import plan
    from cartridges.selfstudy.storage import schema, to_row
    from cartridges.selfstudy.synthesizer import Synthesizer

    # Speed does not depend on whether the teacher likes the answer.
    wanted = settings.synthesize.model_copy(
        update={"num_conversations": count, "families": BY_RULE, "max_teacher_nll": float("inf"),
                "min_information_gain": None})
    chunks = chunk_corpus(sample_corpus(), base.tokenizer, wanted.chunk)
    by_id = {chunk.chunk_id: chunk for chunk in chunks}
    results = Synthesizer(TransformersEngine(base), base.template, by_id, wanted).run(
        plan(chunks, wanted, settings.seed))
    rows = [to_row(result) for result in results if isinstance(result, Conversation)]
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema()), directory / "part-00000.parquet")
    return len(rows)
