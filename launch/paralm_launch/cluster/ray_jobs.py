"""Ray's Jobs API: submit, look, stop. Ray runs a job once; :mod:`paralm_launch.cluster.watch` submits it again."""

from __future__ import annotations

import os
import re
from typing import Any

from paralm.config import Config
from paralm.errors import RunError
from paralm_launch.cluster.slurm import Status

_ACTIVE = {"PENDING", "RUNNING"}


class Unreachable(RunError):
    """No Ray cluster answers at the address."""


class UnansweredError(Unreachable):
    """The job was sent and no answer came: the cluster may have it."""


def address_of(config: Config, given: str | None) -> str:
    """Of the Jobs API: given, or of the configuration, or of the environment."""
    found = given or config.cluster.ray or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not found:
        raise RunError(
            "which Ray cluster? give --address http://HOST:8265, or set cluster.ray or RAY_API_SERVER_ADDRESS"
        )
    if not found.startswith(("http://", "https://")):
        raise RunError(f"{found}: the Jobs API has an address such as http://HOST:8265, which is the dashboard's")
    return found


def client(address: str) -> Any:
    """Of a cluster's Jobs API. Raises Unreachable, one line."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise RunError(f"'paralm submit ray' needs Ray ({error}); install paralm[ray]") from None
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:  # also of a cluster that is just being started: its token comes with it
        raise _unreachable(address, error) from None
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise _unreachable(address, error) from None


def _unreachable(address: str, error: Exception) -> Unreachable:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return Unreachable(f"{address}: no Ray cluster answers there: {first.strip().rstrip('.')}")


def submit(address: str, job: str, entrypoint: str, grace: float, run: str) -> str:
    """Submit and return the job's id. ``grace``: seconds a stopped job gets to save before it is killed. Raises
    Unreachable where nothing was sent, UnansweredError where it may have arrived, RunError where Ray refuses it.
    """
    there = client(address)
    try:
        submitted: str = there.submit_job(
            entrypoint=entrypoint,
            submission_id=job,
            # Ray gives a job three seconds otherwise.
            runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(int(grace) + 30)}},
            metadata={"paralm_run": run},
        )
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise RunError(f"Ray refused the job: {lines[-1].strip() if lines else type(error).__name__}") from None
    except (ConnectionError, OSError) as error:
        raise UnansweredError(f"{_unreachable(address, error)}; job {job} may have arrived") from None
    return submitted


def status(address: str, job: str) -> Status | None:
    """What the cluster knows of a job; None where it knows none of that id. Raises Unreachable."""
    try:
        details = client(address).get_job_info(job)
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            return None
        raise _unreachable(address, error) from None
    except (ConnectionError, OSError) as error:
        raise _unreachable(address, error) from None
    state = str(details.status.value if hasattr(details.status, "value") else details.status)
    message = "" if state in _ACTIVE else " ".join((details.message or "").split())
    code = re.search(r"exit code (\d+)", message)
    reason = f"exit code {code.group(1)}" if code else message[:200]
    seconds = ((details.end_time or 0) - (details.start_time or 0)) // 1000
    elapsed = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}" if seconds > 0 else ""
    return Status(state, elapsed, reason="" if state == "SUCCEEDED" else reason)


def is_active(found: Status) -> bool:
    return found.state in _ACTIVE


def stop(address: str, job: str) -> None:
    """Ask a job to save and end."""
    try:
        client(address).stop_job(job)
    except RuntimeError as error:
        if "404" not in str(error) and "does not exist" not in str(error):
            raise _unreachable(address, error) from None
    except (ConnectionError, OSError) as error:
        raise _unreachable(address, error) from None
