"""What a command gives back: for a person, or as one JSON object."""

import argparse
import sys
from typing import Any


def report(args: argparse.Namespace, result: dict[str, Any] | None) -> None:
    """The result for a person, or as JSON."""
    from workflows.cli import registry_commands
    from workflows.runtime import console

    if args.json:
        print(console.to_json(result if result is not None else {}), flush=True)
    elif result is None or args.command == "chat":
        return
    elif args.command == "list":
        registry_commands.print_list(result, sys.stdout)
    elif args.command == "show":
        registry_commands.print_shown(result, sys.stdout)
    elif args.command == "inspect":
        from workflows.synthesis.inspect_dataset import print_card

        print_card(result, sys.stdout)
    elif args.command == "keys" and args.action == "list":
        from workflows.cli.keys_commands import print_keys

        print_keys(result, sys.stdout)
    elif args.command == "compose-test":
        from workflows.evaluation.composition import print_card as print_composition

        print_composition(result, sys.stdout)
    elif args.command == "bench":
        from workflows.bench import tables

        show = {"train": tables.print_train, "serve": tables.print_serve, "load": tables.print_load,
                "synthesize": tables.print_synthesize,
                "route": tables.print_route}
        show[args.bench](result, sys.stdout)
    elif args.command == "ablate":
        console.print_ablation(result, sys.stdout)
    elif args.command == "evaluate":
        console.print_report_card(result, sys.stdout)
    elif args.command == "build" and args.each:
        console.print_collection(result, sys.stdout)
    elif args.command == "build":
        console.print_report_card(result["report_card"], sys.stdout)
        print(f"\npublished {result['name']}@{result['version']} in {args.registry}")
    else:
        console.print_summary(result, sys.stdout)
    sys.stdout.flush()
