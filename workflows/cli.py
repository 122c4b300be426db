"""The command line. Parsing only: each command calls a function of its own module.

Exit code 0 is success, 2 a user's mistake (one line on stderr), 130 Ctrl-C, 1 anything else. With
`--json` stdout holds one JSON object and nothing else; whatever a stage prints goes to stderr.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from workflows import commands
from workflows.exits import PartlyDone, exit_code
from workflows.results import report

RESUMABLE = ("build", "ablate", "synthesize", "train", "compose-test")
REFERENCE = "NAME, NAME@VERSION or NAME@ALIAS"
CORPUS = "folder, text/Markdown/HTML/PDF file, JSONL, Parquet, or Hugging Face dataset on disk"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"cartridges: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parse(argv)

    def run() -> None:
        with _clean_stdout(args.json):
            result = args.run(args)
        report(args, result)
        if result and result.get("failed"):
            raise PartlyDone(f"{len(result['failed'])} of the cartridges could not be built; the same command tries "
                             "them again")

    return exit_code(run, resumable=args.command in RESUMABLE)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    if args.command == "submit":  # its build arguments are parsed here, and again on the cluster
        args.build = args.build[1:] if args.build[:1] == ["--"] else args.build
        checker = Parser(prog="cartridges submit", add_help=False, allow_abbrev=False)
        checker.add_argument("--json", action="store_true")
        _add_build_arguments(checker)
        args.checked = checker.parse_args(args.build)
        args.json = args.json or args.checked.json
    return args


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="cartridges",
                    description="Small KV caches, trained by self-study to stand in for a corpus.")
    parser.add_argument("--version", action="version", version=f"cartridges {_version()}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    _add_stages(parsers)
    _add_use(parsers)
    _add_registry(parsers)
    _add_bench(parsers)
    return parser


def _add_stages(parsers: Any) -> None:
    build = _command(parsers, "build", commands.run_build,
                     "corpus to published cartridge: synthesize, train, evaluate, publish")
    _add_build_arguments(build)

    ablate = _command(parsers, "ablate", commands.run_ablate,
                      "what settings are worth on a corpus: cartridges that differ in nothing else, asked the same")
    ablate.add_argument("corpus", metavar="CORPUS", help=CORPUS)
    ablate.add_argument("--vary", action="append", default=[], metavar="STAGE.KEY=VALUE[;...]",
                        help="settings that one more cartridge is made with, such as train.loss=next_token; may be "
                             "repeated")
    ablate.add_argument("--questions", metavar="FILE", help="JSONL of rows with `questions`; default: the corpus' own")
    ablate.add_argument("--workdir", metavar="DIR", help="where stages keep their work; default: runs/ablation")
    _settings_options(ablate, "model", "num_tokens", "init", "loss", "budget", "seed", "corpus_id")
    _registry_option(ablate)

    synthesize = _command(parsers, "synthesize", commands.run_synthesize, "corpus to conversations")
    synthesize.add_argument("corpus", metavar="CORPUS", help=CORPUS)
    synthesize.add_argument("--output", required=True, metavar="DIR", help="where the conversations go")
    _settings_options(synthesize, "model", "seed", "corpus_id", "budget")

    inspect = _command(parsers, "inspect", commands.run_inspect, "what is in a data set: its card, and samples")
    inspect.add_argument("dataset", metavar="DATASET", help="output directory of `cartridges synthesize`")
    inspect.add_argument("--html", metavar="FILE", help="write a page of samples that a person can read")
    inspect.add_argument("--samples", type=int, default=6, metavar="N",
                         help="kept conversations of each family on the page; default 6")
    inspect.add_argument("--seed", type=int, default=0, metavar="N", help="draws the samples; default 0")

    train = _command(parsers, "train", commands.run_train, "conversations to cartridge")
    train.add_argument("dataset", metavar="DATASET", help="output directory of `cartridges synthesize`")
    train.add_argument("--corpus", required=True, metavar="CORPUS", help="the corpus of the conversations")
    train.add_argument("--output", required=True, metavar="DIR", help="where the cartridge goes")
    _settings_options(train, "model", "num_tokens", "init", "loss", "seed", "corpus_id")

    evaluate = _command(parsers, "evaluate", commands.run_evaluate, "report card of a published cartridge")
    evaluate.add_argument("name", metavar="NAME", help=REFERENCE)
    evaluate.add_argument("--questions", required=True, metavar="FILE", help="JSONL of rows with `questions`")
    evaluate.add_argument("--corpus", metavar="CORPUS", help="where the questions' rows have no `text`")
    evaluate.add_argument("--arms", metavar="A,B", help="such as closed_book,cartridge; default: all")
    _settings_options(evaluate, "model", "seed", "corpus_id")
    _registry_option(evaluate)

    together = _command(parsers, "compose-test", commands.run_compose_test,
                        "does a cartridge still answer with others loaded beside it?")
    together.add_argument("name", metavar="NAME", help=f"{REFERENCE}; or a pattern ('kb.*'): each that it matches")
    together.add_argument("--with", required=True, dest="partners", metavar="A,B",
                          help="other cartridges, or patterns; 1, 3 and 7 of them are loaded beside it")
    together.add_argument("--questions", required=True, metavar="FILE", help="JSONL of NAME's `questions`")
    together.add_argument("--workdir", metavar="DIR", help="where answers are kept until it is done; default: "
                                                           "runs/compose-test")
    _settings_options(together, "model", "seed", "corpus_id")
    _registry_option(together)


def _add_build_arguments(build: argparse.ArgumentParser) -> None:
    build.add_argument("corpus", metavar="CORPUS", help=CORPUS)
    build.add_argument("--name", required=True, metavar="NAME", help="name of the cartridge in the registry")
    build.add_argument("--each", action="store_true",
                       help="a cartridge NAME.ID for each corpus_id of a JSONL or table, or document of a folder, "
                            "trained side by side")
    build.add_argument("--questions", metavar="FILE",
                       help="JSONL of rows with `questions`; default: held-out self-study questions")
    build.add_argument("--workdir", metavar="DIR", help="where stages keep their work; default: runs/NAME")
    _settings_options(build, "model", "num_tokens", "init", "loss", "budget", "seed", "corpus_id", "curriculum")
    _registry_option(build)


def _add_use(parsers: Any) -> None:
    serve = _command(parsers, "serve", commands.run_serve, "the OpenAI-compatible HTTP service")
    _settings_options(serve, "model", "host", "port", "engine")
    _registry_option(serve)

    chat = _command(parsers, "chat", commands.run_chat, "ask a served or a local cartridge")
    chat.add_argument("name", metavar="NAME", help=REFERENCE)
    chat.add_argument("message", nargs="?", metavar="MESSAGE", help="one question; without it, a dialogue")
    chat.add_argument("--url", metavar="URL", help="a running service, such as http://127.0.0.1:8000")
    _registry_option(chat)

    _add_keys(parsers)

    submit = _command(parsers, "submit", commands.run_submit, "run `build` as a job on a Ray cluster",
                      usage="cartridges submit [--address URL] [--no-wait] [--env KEY=VALUE] [--json] "
                            "[--] CORPUS --name NAME --registry ROOT [build options]")
    submit.add_argument("--address", metavar="URL",
                        help="the cluster's dashboard; default: RAY_API_SERVER_ADDRESS")
    submit.add_argument("--no-wait", action="store_true", help="return once the job is submitted")
    submit.add_argument("--env", action="append", default=[], metavar="KEY=VALUE",
                        help="the job's environment (not for secrets); may be repeated")
    submit.add_argument("build", nargs=argparse.REMAINDER, metavar="BUILD ARGUMENTS", help="as for `build`")


def _add_keys(parsers: Any) -> None:
    about = "API keys of the HTTP service"
    keys = parsers.add_parser("keys", help=about, description=about, allow_abbrev=False)
    actions = keys.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    add = _command(actions, "add", commands.run_keys_add, "make a key; it is printed once and kept nowhere")
    add.add_argument("tenant", metavar="TENANT", help="whose key it is")
    add.add_argument("--corpora", default="*", metavar="A,B*",
                     help="names or shell patterns of the cartridges it may use; default: all")
    add.add_argument("--rate", type=float, default=0, metavar="N", help="requests a minute; default: no limit")
    add.add_argument("--manage", action="store_true", help="may load, pin and scale cartridges, read metrics")
    listed = _command(actions, "list", commands.run_keys_list, "the keys, without the keys themselves")
    revoke = _command(actions, "revoke", commands.run_keys_revoke, "take a key out; it stops within a second")
    revoke.add_argument("id", metavar="ID", help="as `cartridges keys list` shows it")
    for action in (add, listed, revoke):
        action.add_argument("--file", default=os.environ.get("CARTRIDGES_KEYS") or "runs/keys.yaml", metavar="FILE",
                            help="serve.keys_file; default: CARTRIDGES_KEYS or runs/keys.yaml")


def _add_registry(parsers: Any) -> None:
    _registry_option(_command(parsers, "list", commands.run_list, "names in the registry"))
    show = _command(parsers, "show", commands.run_show, "a cartridge's manifest and report card")
    promote = _command(parsers, "promote", commands.run_promote, "let an alias mean a version")
    delete = _command(parsers, "delete", commands.run_delete, "delete a version, or a name with all of them")
    export = _command(parsers, "export", commands.run_export, "write a version to a tar file")
    for command in (show, promote, delete, export):
        command.add_argument("name", metavar="NAME", help=REFERENCE)
        _registry_option(command)
    promote.add_argument("version", nargs="?", metavar="VERSION", help="default: the latest")
    promote.add_argument("--alias", default="prod", metavar="ALIAS",
                         help="default: prod, which a bare NAME means")
    delete.add_argument("--force", action="store_true", help="delete a version that an alias means")
    export.add_argument("--output", metavar="FILE", help="default: NAME-VERSION.tar")
    import_ = _command(parsers, "import", commands.run_import, "publish a tar file written by `export`")
    import_.add_argument("file", metavar="FILE")
    import_.add_argument("--name", metavar="NAME", help="default: the name it was exported with")
    _registry_option(import_)


def _add_bench(parsers: Any) -> None:
    about = "performance as ratios against named peers, interleaved in one run"
    bench = parsers.add_parser("bench", help=about, description=about, allow_abbrev=False)
    benches = bench.add_subparsers(dest="bench", required=True, metavar="WHAT", parser_class=Parser)

    train = _command(benches, "train", commands.run_bench_train,
                     "our trainer against PEFT's cartridge tuner and a plain padded loop")
    train.add_argument("--rounds", type=_count, default=5, metavar="N", help="counted rounds; default 5")
    train.add_argument("--steps", type=_count, default=4, metavar="N", help="steps of a round; default 4")
    train.add_argument("--data", metavar="DIR", help="output of `synthesize`; default: rule-made conversations")
    train.add_argument("--conversations", type=_count, default=256, metavar="N",
                       help="rule-made conversations to plan; default 256")
    _settings_options(train, "model", "num_tokens", "pack_tokens", "seed")

    serve = _command(benches, "serve", commands.run_bench_serve,
                     "cartridges against full context with its prompts resident")
    serve.add_argument("--contexts", default="1024,2048,4096,8192", metavar="N,N", help="tokens of the contexts")
    serve.add_argument("--num-tokens", type=_count, metavar="P",
                       help="slots of the cartridges; default: a tenth of the context")
    serve.add_argument("--kv-budget", type=_count, default=512, metavar="MIB",
                       help="KV memory that each side's batch must fit; default 512 MiB")
    serve.add_argument("--output-tokens", type=_count, default=64, metavar="N", help="length of answers; default 64")
    serve.add_argument("--max-batch", type=_count, default=64, metavar="N", help="largest batch; default 64")
    serve.add_argument("--runs", type=_count, default=3, metavar="N", help="counted runs; default 3")
    serve.add_argument("--one-corpus", action="store_true",
                       help="measure as well requests that all ask about one corpus and share its KV")
    _settings_options(serve, "model", "engine")

    synthesis = _command(benches, "synthesize", commands.run_bench_synthesize,
                         "self-study on Ray Data against a plain loop over the same engine")
    synthesis.add_argument("--corpus", metavar="PATH", help="default: the sample corpus")
    synthesis.add_argument("--engines", default="transformers", metavar="NAME,NAME",
                           help="transformers, vllm or both; default transformers")
    synthesis.add_argument("--actors", default="1,2", metavar="N,N", help="actors of the pipelines; default 1,2")
    synthesis.add_argument("--conversations", type=_count, default=768, metavar="N",
                           help="conversations to plan; default 768")
    synthesis.add_argument("--rounds", type=_count, default=2, metavar="N", help="rounds; default 2")
    _settings_options(synthesis, "model", "seed")

    load = _command(benches, "load", commands.run_bench_load,
                    "many registered corpora, asked unevenly, on one replica that holds a few")
    load.add_argument("--corpora", type=_count, default=1000, metavar="N", help="registered corpora; default 1000")
    load.add_argument("--resident", type=_count, default=50, metavar="N", help="of which fit at once; default 50")
    load.add_argument("--requests", type=_count, default=200, metavar="N", help="requests of a run; default 200")
    load.add_argument("--clients", type=_count, default=8, metavar="N", help="clients at once; default 8")
    load.add_argument("--skew", type=float, default=1.0, metavar="S",
                      help="corpus i is asked in proportion to 1 / i ** S; default 1")
    load.add_argument("--num-tokens", type=_count, default=64, metavar="P", help="slots of each; default 64")
    load.add_argument("--output-tokens", type=_count, default=16, metavar="N", help="most of an answer; default 16")
    load.add_argument("--runs", type=_count, default=3, metavar="N", help="counted runs; default 3")
    _settings_options(load, "model", "engine")

    route = _command(benches, "route", commands.run_bench_route,
                     "how often `model: \"auto\"` finds the corpus that a question belongs to")
    route.add_argument("corpora", nargs="+", metavar="FILE", help="JSONL, each row a corpus with questions; or "
                       "PATH::ID for one corpus of it, or by pattern several rows as one")
    route.add_argument("--questions", type=_count, default=100, metavar="N", help="at most N a corpus; default 100")
    _settings_options(route, "model")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _command(parsers: Any, name: str, run: Any, about: str, **options: Any) -> argparse.ArgumentParser:
    # allow_abbrev=False: an abbreviation would change its meaning when an option is added.
    command = parsers.add_parser(name, help=about, description=about, allow_abbrev=False, **options)
    command.add_argument("--json", action="store_true", help="one JSON object on stdout, logs on stderr")
    command.set_defaults(run=run)
    return command


def _registry_option(command: argparse.ArgumentParser) -> None:
    default = os.environ.get("CARTRIDGES_REGISTRY") or "runs/registry"
    command.add_argument("--registry", default=default, metavar="ROOT",
                         help="path or URL (s3://...); default: CARTRIDGES_REGISTRY or runs/registry")


def _settings_options(command: argparse.ArgumentParser, *dials: str) -> None:
    """`--config`, `--set`, and the named dials."""
    known: dict[str, dict[str, Any]] = {
        "model": {"metavar": "ID", "help": "hub id or directory of the base model"},
        "num_tokens": {"type": int, "metavar": "P", "help": "slots of the cartridge (p)"},
        "pack_tokens": {"type": int, "metavar": "N", "help": "tokens of a pack (a micro batch)"},
        "init": {"metavar": "METHOD", "help": "start of training, such as sampled_chunks or attention_matching"},
        "loss": {"metavar": "LOSS", "help": "distillation, next_token, or none (publish the start)"},
        "budget": {"metavar": "BUDGET", "help": "how much to do: a time (10m), 2000conversations or 500000tokens"},
        "seed": {"type": int, "metavar": "N", "help": "seed of everything random"},
        "curriculum": {"action": "store_const", "const": 4, "help": "up to four rounds: each asks more where the "
                       "cartridge so far knows least, and goes on from it"},
        "corpus_id": {"metavar": "ID", "help": "row of a JSONL corpus, or a pattern that joins several"},
        "host": {"metavar": "HOST", "help": "address to listen on; default 127.0.0.1"},
        "port": {"type": int, "metavar": "PORT", "help": "default 8000"},
        "engine": {"metavar": "ENGINE", "help": "auto, transformers or vllm"},
    }
    for dial in dials:
        command.add_argument(f"--{dial.replace('_', '-')}", **known[dial])
    command.add_argument("--config", metavar="FILE", help="YAML of settings")
    command.add_argument("--set", action="append", default=[], metavar="STAGE.KEY=VALUE",
                         help="one setting, such as train.epochs=4; may be repeated")


@contextlib.contextmanager
def _clean_stdout(as_json: bool) -> Iterator[None]:
    """While a stage runs under `--json`, stdout is stderr, for its libraries and processes too."""
    if not as_json:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _version() -> str:
    from cartridges import __version__

    return __version__


if __name__ == "__main__":
    sys.exit(main())
