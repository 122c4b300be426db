"""Weights & Biases for every stage. Offline unless the user is logged in; needs no network, no key.

    with track("train", "billing", settings.model_dump(), workdir) as run:
        run.log({"train/loss": 1.2, "train/lr": 0.02}, step=10)

`WANDB_MODE` (`online`, `offline`, `disabled`) wins over what is found. Offline runs lie under
`<workdir>/wandb` and go to a server later with `wandb sync <workdir>/wandb/offline-run-*`.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cartridges.config import Arm
from cartridges.errors import UserError

if TYPE_CHECKING:
    import wandb

PROJECT = "cartridges"
MODES = ("online", "offline", "disabled")
ONLINE_TIMEOUT_SECONDS = 20
"""A server that does not answer within this time costs the run nothing more: it goes on offline."""

ARMS: tuple[str, ...] = get_args(Arm)
ARM_METRICS = ("contains", "exact_match", "f1", "nll_per_token", "choice_accuracy",
               "choice_accuracy_per_token", "chrf")
"""Those of `cartridges.evaluation.report_card`, which is slow to import."""

METRICS: dict[str, str] = {
    "synthesize/conversations": "conversations finished so far, kept or dropped",
    "synthesize/kept": "conversations kept so far",
    "synthesize/dropped": "conversations dropped so far, all reasons together",
    "synthesize/conversations_per_s": "finished conversations per second",
    "synthesize/tokens_per_s": "tokens of kept conversations per second",
    "synthesize/tokens": "tokens of the kept conversations",
    "synthesize/topk_mass": "mean probability inside the teacher's stored top-k",
    "synthesize/teacher_entropy": "mean entropy (nats) of the teacher's stored distribution",
    "synthesize/duplicate_share": "share of finished conversations dropped as duplicates",
    "synthesize/seconds": "wall-clock of the stage",
    "train/loss": "context distillation loss: cross-entropy with the top-k, nats per loss token",
    "train/kl": "KL to the teacher, tail included as one bucket, nats per loss token",
    "train/teacher_entropy": "entropy of the teacher's targets, nats per loss token",
    "train/topk_mass": "mean probability inside the teacher's top-k",
    "train/lr": "learning rate of the step",
    "train/grad_norm": "gradient norm before clipping",
    "train/tokens_per_s": "conversation tokens (no padding) per second",
    "train/step_seconds": "wall-clock of one optimiser step",
    "train/loss_tokens": "loss tokens of the step, over all workers",
    "train/matmul_share": "matrix products that the trained layers need, of this machine's rate for the same ones",
    "train/memory_bytes": "most memory that the first worker has taken (on a GPU: by tensors)",
    "train/eta_seconds": "estimated seconds to the last step",
    "train/held_out_contains": "share of the held-out self-study questions answered (train.evaluate_every)",
    "train/held_out_nll_per_token": "NLL of the held-out questions' answers, nats a token",
    "train/seconds": "wall-clock of the stage",
    "evaluate/seconds": "wall-clock of the stage",
    "evaluate/compression_ratio": "corpus tokens / p",
    "evaluate/cartridge_bytes": "bytes of the published cartridge",
    **{f"evaluate/{arm}/{metric}": f"mean {metric} of the arm {arm}"
       for arm in ARMS for metric in ARM_METRICS},
    **{f"evaluate/{arm}/kv_bytes": f"KV cache bytes of the arm {arm}" for arm in ARMS},
}
"""Every key that `Run.log` takes. The workspace in `dashboards/` draws from this table alone."""

CARD_COLUMNS = ("arm", "metric", "mean", "low", "high", "n", "kv_bytes")
PAIRED_COLUMNS = ("difference", "metric", "mean", "low", "high", "n")


class Run:
    """One stage's run. Every method does nothing when W&B is disabled (`wandb_run` is None)."""

    def __init__(self, wandb_run: "wandb.Run | None"):
        self._run = wandb_run

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        """Log numbers under keys of `METRICS`. Raises `ValueError` for a key that is not there."""
        unknown = sorted(values.keys() - METRICS.keys())
        if unknown:
            raise ValueError(f"not in workflows.runtime.tracking.METRICS: {', '.join(unknown)}")
        if self._run is not None:
            self._run.log(values, step=step)

    def report_card(self, card: dict[str, Any]) -> None:
        """The report card as two tables (arms, paired differences) and as summary numbers."""
        if self._run is None:
            return
        import wandb

        self._run.log({
            "evaluate/report_card": wandb.Table(columns=list(CARD_COLUMNS), data=card_rows(card)),
            "evaluate/paired": wandb.Table(columns=list(PAIRED_COLUMNS), data=paired_rows(card)),
        })
        for key, value in card_summary(card).items():
            self._run.summary[key] = value

    def artifact(self, directory: Path, name: str, kind: str) -> None:
        """Attach `directory` (a dataset or a cartridge) to the run.

        The files are referred to where they lie, not copied: what a stage has finished is never
        written again.
        """
        if self._run is None:
            return
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9._-]", "-", name), type=kind)
        for file in sorted(path for path in Path(directory).rglob("*") if path.is_file()):
            artifact.add_file(str(file), name=file.relative_to(directory).as_posix(),
                              policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact)


@contextmanager
def track(stage: str, name: str, settings: dict[str, Any], workdir: Path,
          job: str | None = None) -> Iterator[Run]:
    """A W&B run for one stage of building `name`; failed if the block raises.

    `settings` becomes the run's configuration. Runs of one build share the group `job` (default
    `name`). Raises `UserError` for a `WANDB_MODE` that does not exist.
    """
    mode = os.environ.get("WANDB_MODE", "")
    if mode and mode not in MODES:
        raise UserError(f"WANDB_MODE={mode} does not exist; use one of {', '.join(MODES)}")
    if mode == "disabled":
        yield Run(None)
        return
    workdir = Path(workdir).resolve()
    with _directories_under(workdir):
        run = _start(stage, name, settings, job or name, mode)
        exit_code = 1
        try:
            yield Run(run)
            exit_code = 0
        finally:
            run.finish(exit_code=exit_code)


def card_rows(card: dict[str, Any]) -> list[list[Any]]:
    """One row of `CARD_COLUMNS` for each arm and metric of a report card."""
    return [[arm, metric, *_interval(value), row.get("kv_bytes")]
            for arm, row in card["arms"].items() for metric, value in row["metrics"].items()]


def paired_rows(card: dict[str, Any]) -> list[list[Any]]:
    """One row of `PAIRED_COLUMNS` for each pair of arms and metric."""
    return [[pair, metric, *_interval(value)]
            for pair, metrics in card.get("paired", {}).items() for metric, value in metrics.items()]


def card_summary(card: dict[str, Any]) -> dict[str, float]:
    """A report card's numbers under flat keys, as `evaluate/<arm>/<metric>`."""
    summary = {f"evaluate/{arm}/{metric}": mean for arm, metric, mean, *_ in card_rows(card)}
    for arm, row in card["arms"].items():
        summary[f"evaluate/{arm}/kv_bytes"] = row.get("kv_bytes")
    cartridge = card.get("cartridge") or {}
    summary["evaluate/compression_ratio"] = cartridge.get("compression_ratio")
    summary["evaluate/cartridge_bytes"] = cartridge.get("bytes")
    for stage, seconds in card.get("build", {}).get("seconds", {}).items():
        summary[f"{stage}/seconds"] = seconds
    return {key: value for key, value in summary.items() if value is not None}


def _interval(value: dict[str, Any]) -> list[Any]:
    return [value["mean"], value["low"], value["high"], value["n"]]


def _start(stage: str, name: str, settings: dict[str, Any], group: str, mode: str) -> "wandb.Run":
    import wandb

    def start(chosen: str) -> "wandb.Run":
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=f"{name}/{stage}", group=group,
            job_type=stage, config=settings, mode=chosen, dir=os.environ["WANDB_DIR"],
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True,
                                    x_disable_stats=True, init_timeout=ONLINE_TIMEOUT_SECONDS))

    mode = mode or ("online" if logged_in() else "offline")
    try:
        return start(mode)
    except wandb.errors.AuthenticationError as error:
        raise _bad_key(error) from None
    except wandb.errors.CommError as error:
        if mode != "online":
            raise
        print(f"W&B did not answer ({str(error).splitlines()[0]}); this run is kept offline",
              file=sys.stderr)
        return start("offline")


def logged_in() -> bool:
    """Whether a W&B key is at hand: in the environment, or in netrc for the configured server.

    Raises `UserError` if the key in netrc cannot be one.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    # Not our own reading of netrc: the host's name changed over time, and only W&B knows the old ones.
    from wandb.sdk.lib.wbauth import read_netrc_auth

    try:
        return read_netrc_auth(host=wandb.setup().settings.base_url) is not None
    except wandb.errors.AuthenticationError as error:
        raise _bad_key(error) from None


def _bad_key(error: Exception) -> UserError:
    return UserError(f"W&B refuses the key it found ({str(error).splitlines()[0]}): log in again with "
                     "`wandb login`, or set WANDB_MODE=offline")


@contextmanager
def _directories_under(workdir: Path) -> Iterator[None]:
    """Keep all that W&B writes under `workdir`, unless the user has set the places."""
    places = {"WANDB_DIR": workdir, "WANDB_DATA_DIR": workdir / "wandb" / "data",
              "WANDB_CACHE_DIR": workdir / "wandb" / "cache"}
    added = {name: str(path) for name, path in places.items() if not os.environ.get(name)}
    for path in added.values():
        Path(path).mkdir(parents=True, exist_ok=True)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
