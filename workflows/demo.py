"""`make demo`: build the sample corpus, serve it, ask two questions over HTTP, stop everything.

Leaves the registry in runs/demo/registry (cartridge `sample`) and the report card in
runs/demo/report_card.json. Run again, it takes the finished build and only serves and asks.
"""

import argparse
import sys
from importlib.resources import files
from pathlib import Path

from cartridges.config import BuildSettings
from cartridges.settings import load
from workflows.cli.exit_codes import exit_code

QUESTIONS = 2
WORK = Path("runs/demo")


def main() -> None:
    from workflows.building.build import build
    from workflows.evaluation.report_card_table import print_report_card
    from workflows.runtime.manifests import write_manifest

    settings = _settings()
    sample = files("workflows") / "sample"
    result = build(str(sample / "corpus"), "sample", settings, str(WORK / "registry"),
                   str(sample / "questions.jsonl"), str(WORK / "sample"))
    card = result["report_card"]
    write_manifest(WORK / "report_card.json", card)
    print_report_card(card, sys.stdout)
    print(f"\npublished sample@{result['version']} in {WORK / 'registry'}\n", flush=True)
    ask_over_http(settings, _questions(sample / "questions.jsonl"))


def _settings() -> BuildSettings:
    parser = argparse.ArgumentParser(prog="python -m workflows.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--config", metavar="FILE", help="YAML of settings (default: configs/demo.yaml)",
                        default=str(files("workflows") / "configs" / "demo.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="one setting, such as train.num_tokens=256; may be repeated")
    args = parser.parse_args()
    return load(BuildSettings, args.config, ["serve.port=0", *args.set])


def _questions(file) -> list[str]:
    from cartridges.corpus import load_questions

    return [question.question for question in load_questions(str(file))[:QUESTIONS]]


def ask_over_http(settings: BuildSettings, questions: list[str]) -> list[str]:
    """Start the service, ask `sample` with the `openai` client, streamed to stdout; stop the service."""
    from openai import OpenAI

    from workflows.serving.serve import running_service

    print("starting the service", file=sys.stderr, flush=True)
    with running_service(str(WORK / "registry"), settings) as service:
        with OpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
            return [_ask(client, question) for question in questions]


def _ask(client, question: str) -> str:
    print(f"> {question}\n  ", end="", flush=True)
    pieces = []
    messages = [{"role": "user", "content": question}]
    stream = client.chat.completions.create(
        model="sample", messages=messages, max_tokens=48, temperature=0, stream=True)
    for event in stream:
        piece = event.choices[0].delta.content if event.choices else None
        if piece:
            pieces.append(piece)
            print(piece, end="", flush=True)
    print(flush=True)
    return "".join(pieces)


if __name__ == "__main__":
    sys.exit(exit_code(main, resumable=True))
