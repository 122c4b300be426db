"""`cartridges bench train | serve | synthesize | load | route`."""

import argparse
import sys
from typing import Any

from cartridges.errors import UserError
from workflows.bench import tables
from workflows.cli.options import add_command, add_group, count, numbers, settings_from, settings_options


def add_to(parsers: Any) -> None:
    benches = add_group(parsers, "bench", "performance as ratios against named peers, interleaved in one run", "WHAT")
    _add_train(benches)
    _add_serve(benches)
    _add_synthesize(benches)
    _add_load(benches)
    _add_route(benches)


def _add_train(benches: Any) -> None:
    command = add_command(benches, "train", run_train,
                          "our trainer against PEFT's cartridge tuner and a plain padded loop",
                          lambda result, args: tables.print_train(result, sys.stdout))
    command.add_argument("--rounds", type=count, default=5, metavar="N", help="counted rounds; default 5")
    command.add_argument("--steps", type=count, default=4, metavar="N", help="steps of a round; default 4")
    command.add_argument("--data", metavar="DIR", help="output of `synthesize`; default: rule-made conversations")
    command.add_argument("--conversations", type=count, default=256, metavar="N",
                         help="rule-made conversations to plan; default 256")
    settings_options(command, "model", "num_tokens", "pack_tokens", "seed")


def run_train(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    from workflows.bench.train import bench_train

    return bench_train(settings, args.rounds, args.steps, args.conversations, args.data)


def _add_serve(benches: Any) -> None:
    command = add_command(benches, "serve", run_serve,
                          "cartridges against full context with its prompts resident",
                          lambda result, args: tables.print_serve(result, sys.stdout))
    command.add_argument("--contexts", default="1024,2048,4096,8192", metavar="N,N", help="tokens of the contexts")
    command.add_argument("--num-tokens", type=count, metavar="P",
                         help="slots of the cartridges; default: a tenth of the context")
    command.add_argument("--kv-budget", type=count, default=512, metavar="MIB",
                         help="KV memory that each side's batch must fit; default 512 MiB")
    command.add_argument("--output-tokens", type=count, default=64, metavar="N", help="length of answers; default 64")
    command.add_argument("--max-batch", type=count, default=64, metavar="N", help="largest batch; default 64")
    command.add_argument("--runs", type=count, default=3, metavar="N", help="counted runs; default 3")
    command.add_argument("--one-corpus", action="store_true",
                         help="measure as well requests that all ask about one corpus and share its KV")
    settings_options(command, "model", "engine")


def run_serve(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    contexts = numbers("--contexts", args.contexts)
    if args.output_tokens < 2:
        raise UserError("--output-tokens must be at least 2: decoding is timed after the first token")
    from workflows.bench.serve import bench_serve

    return bench_serve(settings, contexts, args.num_tokens, args.kv_budget << 20, args.output_tokens, args.runs,
                       args.max_batch, args.one_corpus)


def _add_synthesize(benches: Any) -> None:
    command = add_command(benches, "synthesize", run_synthesize,
                          "self-study on Ray Data against a plain loop over the same engine",
                          lambda result, args: tables.print_synthesize(result, sys.stdout))
    command.add_argument("--corpus", metavar="PATH", help="default: the sample corpus")
    command.add_argument("--engines", default="transformers", metavar="NAME,NAME",
                         help="transformers, vllm or both; default transformers")
    command.add_argument("--actors", default="1,2", metavar="N,N", help="actors of the pipelines; default 1,2")
    command.add_argument("--conversations", type=count, default=768, metavar="N",
                         help="conversations to plan; default 768")
    command.add_argument("--rounds", type=count, default=2, metavar="N", help="rounds; default 2")
    settings_options(command, "model", "seed")


def run_synthesize(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    engines = [engine.strip() for engine in args.engines.split(",")]
    if unknown := set(engines) - {"transformers", "vllm"}:
        raise UserError(f"--engines {sorted(unknown)[0]!r} is neither transformers nor vllm")
    actors = numbers("--actors", args.actors)
    least = 3 * max(actors) * settings.synthesize.batch_size
    if args.conversations < least:
        raise UserError(f"--conversations {args.conversations} is less than three batches for each of {max(actors)} "
                        f"actors; give {least}, or a smaller synthesize.batch_size ({settings.synthesize.batch_size})")
    wanted = settings.synthesize.model_copy(update={"num_conversations": args.conversations})
    from workflows.bench.synthesize import bench_synthesize

    return bench_synthesize(settings.model_copy(update={"synthesize": wanted}), args.corpus, engines, actors,
                            args.rounds)


def _add_load(benches: Any) -> None:
    command = add_command(benches, "load", run_load,
                          "many registered corpora, asked unevenly, on one replica that holds a few",
                          lambda result, args: tables.print_load(result, sys.stdout))
    command.add_argument("--corpora", type=count, default=1000, metavar="N", help="registered corpora; default 1000")
    command.add_argument("--resident", type=count, default=50, metavar="N", help="of which fit at once; default 50")
    command.add_argument("--requests", type=count, default=200, metavar="N", help="requests of a run; default 200")
    command.add_argument("--clients", type=count, default=8, metavar="N", help="clients at once; default 8")
    command.add_argument("--skew", type=float, default=1.0, metavar="S",
                         help="corpus i is asked in proportion to 1 / i ** S; default 1")
    command.add_argument("--num-tokens", type=count, default=64, metavar="P", help="slots of each; default 64")
    command.add_argument("--output-tokens", type=count, default=16, metavar="N", help="most of an answer; default 16")
    command.add_argument("--runs", type=count, default=3, metavar="N", help="counted runs; default 3")
    settings_options(command, "model", "engine")


def run_load(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    if args.corpora < args.resident:
        raise UserError(f"--resident {args.resident} of --corpora {args.corpora}: nothing would have to be loaded")
    if args.resident < args.clients:
        raise UserError(f"--resident {args.resident} is less than --clients {args.clients}: all that is held may be "
                        "in use, and then nothing can be loaded")
    if args.skew < 0:
        raise UserError(f"--skew {args.skew:g} is below 0; 0 asks all corpora alike")
    from workflows.bench.load import Load, bench_load

    return bench_load(settings, Load(args.corpora, args.resident, args.requests, args.clients, args.skew,
                                     args.num_tokens, args.output_tokens), args.runs)


def _add_route(benches: Any) -> None:
    command = add_command(benches, "route", run_route,
                          "how often `model: \"auto\"` finds the corpus that a question belongs to",
                          lambda result, args: tables.print_route(result, sys.stdout))
    command.add_argument("corpora", nargs="+", metavar="FILE", help="JSONL, each row a corpus with questions; or "
                         "PATH::ID for one corpus of it, or by pattern several rows as one")
    command.add_argument("--questions", type=count, default=100, metavar="N", help="at most N a corpus; default 100")
    settings_options(command, "model")


def run_route(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    from cartridges.models import load_tokenizer, resolve_model_dir
    from workflows.bench.route import bench_route

    return bench_route(args.corpora, load_tokenizer(resolve_model_dir(settings.model)), args.questions)
