"""The files of a submitted run, and what they tell: script, settings, log, exit code, job numbers.

FOLDER/
    NAME.json              the newest submission: scheduler, ids, script, logs
    NAME_TIME.sh           its job script
    NAME_TIME.yaml         the settings it reads; a later submission does not change them
    NAME_TIME.exit         "ID EXIT_CODE" of the job that ended last
    NAME_TIME.started      the first job has begun
    NAME.ID.log            what a job printed

FOLDER is `job/` in step 2's --output_model_dir, and `NAME.job/` beside step 4's --output_dir, which appears only when
the run is done.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

from train import outputs


@dataclass(frozen=True)
class JobFiles:
    """Names of one submission's files.

    Attributes:
        root: the folder.
        name: the run's name.
        stamp: what tells submissions of the run apart.
    """

    root: Path
    name: str
    stamp: str

    @property
    def script(self) -> Path:
        return self.root / f"{self.name}_{self.stamp}.sh"

    @property
    def settings(self) -> Path:
        return self.root / f"{self.name}_{self.stamp}.yaml"

    @property
    def exit_record(self) -> Path:
        return self.root / f"{self.name}_{self.stamp}.exit"

    @property
    def started(self) -> Path:
        return self.root / f"{self.name}_{self.stamp}.started"

    @property
    def log_prefix(self) -> str:
        """The log's path up to the job's number."""
        return str(self.root / f"{self.name}.")

    def log(self, job_id: str) -> Path:
        return Path(f"{self.log_prefix}{job_id}.log")


@dataclass(frozen=True)
class JobRecord:
    """What is known of a submission.

    Attributes:
        scheduler: slurm, gridengine or pbs.
        ids: the jobs of the chain, in order.
        script: the job script.
        settings: the settings that it reads; None when the script holds all flags.
        logs: one for each job.
        exit_record: where the jobs leave their exit codes.
        submitted_at: UTC, ISO 8601.
    """

    scheduler: str
    ids: tuple[str, ...]
    script: Path
    settings: Path | None
    logs: tuple[Path, ...]
    exit_record: Path
    submitted_at: str


@dataclass(frozen=True)
class JobFolder:
    """Where a run's submissions are kept.

    Attributes:
        root: the folder.
        name: the run's name in it.
        run: the folder that status.sh is asked about; None when it tells nothing of this job.
    """

    root: Path
    name: str
    run: Path | None = None

    @classmethod
    def of_pretraining(cls, output_model_dir: Path, job_name: str) -> JobFolder:
        return cls(output_model_dir.absolute() / "job", job_name, output_model_dir.absolute())

    @classmethod
    def of_finetuning(cls, output_dir: Path) -> JobFolder:
        output = output_dir.absolute()
        return cls(output.with_name(f"{output.name}.job"), output.name, output)

    @property
    def record(self) -> Path:
        return self.root / f"{self.name}.json"

    def new_files(self) -> JobFiles:
        """Names that no submission has yet."""
        stamp = time.strftime("%Y%m%d_%H%M%S")
        files, number = JobFiles(self.root, self.name, stamp), 1
        while files.script.exists():
            number += 1
            files = JobFiles(self.root, self.name, f"{stamp}_{number}")
        return files

    def write(self, record: JobRecord) -> None:
        text = json.dumps(dataclasses.asdict(record), indent=2, default=str, ensure_ascii=False)
        outputs.write_text(self.record, text + "\n")

    def read(self) -> JobRecord | None:
        """The newest submission; None without one, and for a file that is damaged."""
        try:
            found = json.loads(self.record.read_text(encoding="utf-8"))
            return JobRecord(
                scheduler=str(found["scheduler"]),
                ids=tuple(map(str, found["ids"])),
                script=Path(found["script"]),
                settings=Path(found["settings"]) if found["settings"] else None,
                logs=tuple(map(Path, found["logs"])),
                exit_record=Path(found["exit_record"]),
                submitted_at=str(found["submitted_at"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None


def read_exit(file: Path) -> tuple[str, int] | None:
    """The job that ended last and its exit code; None when none has ended."""
    try:
        job_id, code = file.read_text(encoding="utf-8").split()
        return job_id, int(code)
    except (OSError, ValueError):
        return None
