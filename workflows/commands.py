"""From parsed arguments to plain values: one function a command, which calls the command's own module.

The heavy modules are imported inside, after the settings are read: `--help` and a mistyped setting
answer at once.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cartridges.errors import UserError

DIALS = {"model": "model.name", "num_tokens": "train.num_tokens", "pack_tokens": "train.pack_tokens",
         "init": "train.init", "loss": "train.loss",
         "budget": "budget", "seed": "seed", "corpus_id": "corpus.corpus_id", "host": "serve.host",
         "port": "serve.port", "engine": "serve.engine", "curriculum": "curriculum.rounds"}
"""Options that are short for a setting of `BuildSettings`."""


def settings_from(args: argparse.Namespace, more: list[str] | None = None) -> Any:
    """`BuildSettings`: defaults < `--config` < dials < `--set` < `more`, which is written as for `--set`."""
    from cartridges.config import BuildSettings
    from cartridges.settings import load

    given = vars(args)
    dials = [f"{key}={json.dumps(given[dial])}" for dial, key in DIALS.items() if given.get(dial) is not None]
    return load(BuildSettings, args.config, dials + args.set + (more or []))


def run_build(args: argparse.Namespace) -> dict[str, Any]:
    from cartridges.registry import check_name

    check_name(args.name)
    settings = settings_from(args)
    from workflows.build import build
    from workflows.collection import build_each

    made = build_each if args.each else build
    return made(args.corpus, args.name, settings, args.registry, args.questions, args.workdir)


def run_ablate(args: argparse.Namespace) -> dict[str, Any]:
    given = settings_from(args)
    if not args.vary:
        raise UserError("nothing to compare; give settings with --vary, such as --vary train.loss=next_token")
    from workflows.ablate import Variation, ablate

    varied = [Variation(text, _varied(args, text)) for text in args.vary]
    return ablate(args.corpus, given, varied, args.registry, args.questions, args.workdir)


def _varied(args: argparse.Namespace, text: str) -> Any:
    """The settings given, and those of one `--vary`."""
    try:
        return settings_from(args, [one.strip() for one in text.split(";") if one.strip()])
    except UserError as error:
        raise UserError(f"--vary {text}: {error}") from None


def run_synthesize(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    if settings.budget is not None:
        from cartridges.corpus import load_corpus
        from workflows.planning import settle_synthesis

        settings = settle_synthesis(load_corpus(args.corpus, settings.corpus.corpus_id), settings, Path(args.output))
    from workflows.synthesize import synthesize

    return synthesize(args.corpus, args.output, settings)


def run_inspect(args: argparse.Namespace) -> dict[str, Any]:
    if args.samples < 0:
        raise UserError(f"--samples {args.samples} is below 0")
    from workflows.inspect_dataset import read_card

    card = read_card(Path(args.dataset))
    if args.html is not None:
        from workflows.dataset_page import write_page

        write_page(Path(args.dataset), card, Path(args.html), args.samples, args.seed)
    return card


def run_train(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    if settings.budget is not None:
        raise UserError("train has no budget: it goes by --set train.epochs=N or train.steps=N; `cartridges build "
                        "--budget` plans steps for a time")
    from workflows.train import train

    return train(args.dataset, args.corpus, args.output, settings)


def run_evaluate(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    arms = tuple(arm.strip() for arm in args.arms.split(",")) if args.arms is not None else None
    if arms is not None:
        _check_arms(arms)
    from workflows.evaluate import evaluate

    return evaluate(args.name, args.registry, args.questions, args.corpus, settings, arms)


def _check_arms(arms: tuple[str, ...]) -> None:
    from typing import get_args

    from cartridges.config import Arm

    unknown = [arm for arm in arms if arm not in get_args(Arm)]
    if unknown:
        raise UserError(f"--arms: no arm {unknown[0]!r}; there are {', '.join(get_args(Arm))}")


def run_compose_test(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    partners = [name.strip() for name in args.partners.split(",") if name.strip()]
    from workflows.compose_test import compose_test

    return compose_test(args.name, partners, args.questions, args.registry, settings, args.workdir)


def run_serve(args: argparse.Namespace) -> None:
    settings = settings_from(args)
    from workflows.serve import serve

    serve(args.registry, settings)


def run_keys_add(args: argparse.Namespace) -> dict[str, Any]:
    from workflows.keys_commands import add

    corpora = tuple(pattern.strip() for pattern in args.corpora.split(",") if pattern.strip())
    return add(args.tenant, args.file, corpora, args.rate, args.manage)


def run_keys_list(args: argparse.Namespace) -> dict[str, Any]:
    from workflows.keys_commands import list_keys

    return list_keys(args.file)


def run_keys_revoke(args: argparse.Namespace) -> dict[str, Any]:
    from workflows.keys_commands import revoke

    return revoke(args.id, args.file)


def run_chat(args: argparse.Namespace) -> dict[str, Any] | None:
    from workflows.chat import chat

    # With --json stdout holds one JSON object and nothing else.
    return chat(args.name, args.message, args.registry, args.url, out=sys.stderr if args.json else None)


def run_submit(args: argparse.Namespace) -> dict[str, Any]:
    settings_from(args.checked)  # mistakes are named here, not minutes later on the cluster
    from workflows.submit import submit

    env = dict(_pair(pair) for pair in args.env)
    job = submit(args.build, args.address, not args.no_wait, env)
    if job["status"] in ("FAILED", "STOPPED"):
        raise SystemExit(f"cartridges: job {job['job_id']} {job['status']}: {job['message']}")
    return job


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UserError(f"--env {text!r} is not KEY=VALUE")
    return key, value


def run_bench_train(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    from workflows.bench.train import bench_train

    return bench_train(settings, args.rounds, args.steps, args.conversations, args.data)


def run_bench_serve(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    contexts = _numbers("--contexts", args.contexts)
    if args.output_tokens < 2:
        raise UserError("--output-tokens must be at least 2: decoding is timed after the first token")
    from workflows.bench.serve import bench_serve

    return bench_serve(settings, contexts, args.num_tokens, args.kv_budget << 20, args.output_tokens, args.runs,
                       args.max_batch, args.one_corpus)


def run_bench_synthesize(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    engines = [engine.strip() for engine in args.engines.split(",")]
    if unknown := set(engines) - {"transformers", "vllm"}:
        raise UserError(f"--engines {sorted(unknown)[0]!r} is neither transformers nor vllm")
    actors = _numbers("--actors", args.actors)
    least = 3 * max(actors) * settings.synthesize.batch_size
    if args.conversations < least:
        raise UserError(f"--conversations {args.conversations} is less than three batches for each of {max(actors)} "
                        f"actors; give {least}, or a smaller synthesize.batch_size ({settings.synthesize.batch_size})")
    wanted = settings.synthesize.model_copy(update={"num_conversations": args.conversations})
    from workflows.bench.synthesize import bench_synthesize

    return bench_synthesize(settings.model_copy(update={"synthesize": wanted}), args.corpus, engines, actors,
                            args.rounds)


def run_bench_load(args: argparse.Namespace) -> dict[str, Any]:
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


def run_bench_route(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    from cartridges.models import load_tokenizer, resolve_model_dir
    from workflows.bench.route import bench_route

    return bench_route(args.corpora, load_tokenizer(resolve_model_dir(settings.model)), args.questions)


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"{option} {text!r} is not a list of whole numbers, such as 1024,4096")
    return [int(part) for part in parts]


def run_list(args: argparse.Namespace) -> dict[str, Any]:
    from workflows import registry_commands

    return registry_commands.list_cartridges(args.registry)


def run_show(args: argparse.Namespace) -> dict[str, Any]:
    from workflows import registry_commands

    return registry_commands.show(args.name, args.registry)


def run_promote(args: argparse.Namespace) -> dict[str, Any]:
    from workflows import registry_commands

    return registry_commands.promote(args.name, args.version, args.alias, args.registry)


def run_delete(args: argparse.Namespace) -> dict[str, Any]:
    from workflows import registry_commands

    return registry_commands.delete(args.name, args.registry, args.force)


def run_export(args: argparse.Namespace) -> dict[str, Any]:
    from workflows import registry_commands

    return registry_commands.export(args.name, args.output, args.registry)


def run_import(args: argparse.Namespace) -> dict[str, Any]:
    from workflows import registry_commands

    return registry_commands.import_archive(args.file, args.name, args.registry)
