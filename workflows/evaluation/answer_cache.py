"""Answers on disk while a run lasts, so that a killed run asks only what it had not asked."""

from collections.abc import Callable, Sequence
from pathlib import Path

from cartridges.config import EvaluateSettings
from cartridges.engines.base import Engine, Prefix
from cartridges.evaluation.asking import Answered, Item, ask, num_requests
from cartridges.models import BaseModel
from workflows.runtime.manifests import fingerprint, read_manifest, write_manifest


class AnswerCache:
    """`ask` through `engine`, with a file in `directory` for each prefix and its questions."""

    def __init__(self, directory: Path, engine: Engine, base: BaseModel, settings: EvaluateSettings):
        self.directory, self.engine, self.settings = directory, engine, settings
        self.model = [base.identity.weights_digest, base.identity.template_hash, str(base.dtype), base.device]
        self.files: list[Path] = []

    def ask(self, items: Sequence[Item], prefix: Prefix, report: Callable[[int], None]) -> list[Answered]:
        """As `cartridges.evaluation.asking.ask`; of answers that were kept, without what chrF is computed from."""
        file = self.directory / f"answers-{self._fingerprint(items, prefix)}.json"
        self.files.append(file)
        kept = read_manifest(file)
        if kept is not None:
            report(num_requests(items))
            return [Answered(item, **row) for item, row in zip(items, kept["answers"], strict=True)]
        answered = ask(self.engine, items, prefix, self.settings.max_answer_tokens, report)
        write_manifest(file, {"answers": [
            {"values": one.values, "output": one.output, "finish_reason": one.finish_reason} for one in answered]})
        return answered

    def forget(self) -> None:
        """The run is done."""
        for file in self.files:
            file.unlink(missing_ok=True)

    def _fingerprint(self, items: Sequence[Item], prefix: Prefix) -> str:
        asked = [[item.generation_ids, item.input_ids, item.candidate_ids, item.gold, item.question.answers]
                 for item in items]
        return fingerprint([self.model, prefix and prefix.digest, self.settings.max_answer_tokens, asked])
