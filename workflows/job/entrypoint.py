"""The job's entry point on the cluster: `python -m workflows.job.entrypoint BUILD-ARGUMENTS`."""

import json
import subprocess
import sys

from workflows.job.log import RESULT_MARK


def main(args: list[str]) -> int:
    """Run `cartridges build` and print its JSON as one marked line of the job's log; the build's exit code."""
    command = [sys.executable, "-m", "workflows.cli", "build", *args, "--json"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.stdout.strip():
        print(RESULT_MARK + json.dumps(json.loads(done.stdout)), flush=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
