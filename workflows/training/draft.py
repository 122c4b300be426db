"""`train.loss=none` for a corpus with questions: the start of training as a cartridge of its own, without Ray.

    DIR/cartridge/     the artifact
    DIR/train.json     manifest, written last
"""

import time
from pathlib import Path
from typing import Any

from cartridges.config import BuildSettings
from cartridges.records import Corpus
from workflows.runtime.manifests import read_manifest, write_manifest
from workflows.synthesis.dataset import corpus_tokens, dataset_fingerprint
from workflows.training.records import MANIFEST
from workflows.training.train import train_fingerprint


def draft(corpus: Corpus, settings: BuildSettings, work: Path) -> tuple[dict[str, Any], Path]:
    """`(training manifest, artifact directory)` of `settings.train.init`; what is finished is not done again."""
    from cartridges import artifact
    from cartridges.distill.initialize import MOST_CHARACTERS, initialize
    from cartridges.models import load_base_model

    # There are no conversations, but their fingerprint tells corpus, model and template apart.
    expected = train_fingerprint(dataset_fingerprint(corpus, settings), settings)
    output = work / f"draft-{expected}"
    done = read_manifest(output / MANIFEST)
    if done is None:
        start = time.monotonic()
        base = load_base_model(settings.model)
        record = artifact.CorpusRecord(id=corpus.corpus_id, fingerprint=corpus.fingerprint,
                                       tokens=corpus_tokens(corpus, settings))
        cartridge = initialize(base, corpus.spread(MOST_CHARACTERS), settings.train, settings.seed)
        artifact.save(output / "cartridge", cartridge, model=base.identity, corpus=record, seed=settings.seed,
                      settings={"train": settings.train.model_dump(mode="json", exclude={"distractors"})})
        done = {"fingerprint": expected, "seconds": time.monotonic() - start, "steps": 0}
        write_manifest(output / MANIFEST, done)
    return done, output / "cartridge"
