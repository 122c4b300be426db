"""General conversations, without a chunk: their teacher is the base model alone.

A small share of them preserves the model's behaviour outside the corpus (general data mixing, as in the
follow-ups to arXiv 2506.06266).
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from cartridges.records import Chunk
from cartridges.selfstudy.families import Proposal

NAME = "general"
"""The name of this seed family. Its share is `synthesize.general_share` and not in `families`."""

REQUESTS = (
    "What is {0}?", "Explain {0} to a child.", "Write two sentences about {0}.", "Why do people care about {0}?",
    "Give me three facts about {0}.", "What should a beginner know about {0}?", "Tell me a joke about {0}.",
    "Write a short poem about {0}.", "What are common mistakes with {0}?", "How has {0} changed over time?",
    "Name a good book or film about {0} and say why.", "What questions could I ask an expert on {0}?",
    "Write an opening line of a story in which {0} plays a part.", "What do I need for {0}?",
    "Translate into French: I would like to know more about {0}.", "Give one reason for and one against {0}.",
    "Describe {0} without naming it.", "Make a list of five words that go with {0}.",
)
TOPICS = (
    "bread", "chess", "gravity", "tax", "gardening", "the moon", "football", "sleep", "bicycles", "volcanoes",
    "money", "photosynthesis", "the piano", "email", "bees", "democracy", "running", "tea", "electricity",
    "the Roman Empire", "Python lists", "vaccines", "painting", "rivers", "friendship", "airports", "fractions",
    "coffee", "dinosaurs", "public speaking", "rain", "knitting", "the internet", "salt", "job interviews",
    "dogs", "earthquakes", "poetry", "glass", "the heart", "recycling", "maps", "swimming", "clocks", "sugar",
    "negotiation", "bridges", "camping", "the ocean", "proverbs", "trains", "statistics", "soup", "mirrors",
)


@dataclass(frozen=True)
class General:
    """Everyday requests. In the order of `ordinal`, none repeats before all have been used once."""

    decodes: ClassVar[bool] = True

    def propose(self, chunk: Chunk | None, rng: random.Random, ordinal: int) -> Proposal:
        order = random.Random(NAME).sample(range(len(REQUESTS) * len(TOPICS)), len(REQUESTS) * len(TOPICS))
        request, topic = divmod(order[ordinal % len(order)], len(TOPICS))
        return Proposal(user=REQUESTS[request].format(TOPICS[topic]))
