"""The command line.

Exit code 0 is success, 2 a user's mistake (one line on stderr), 130 Ctrl-C, 1 anything else. With
`--json` stdout holds one JSON object and nothing else; whatever a stage prints goes to stderr.
"""

from workflows.cli.exit_codes import PartialFailure, exit_code
from workflows.cli.output import clean_stdout, report
from workflows.cli.parser import build_parser

__all__ = ["build_parser", "main"]


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(argv)

    def run() -> None:
        with clean_stdout(args.json):
            result = args.run(args)
        report(args, result)
        if result and result.get("failed"):
            raise PartialFailure(f"{len(result['failed'])} of the cartridges could not be built; the same command "
                                 "tries them again")

    return exit_code(run, args.resumable)
