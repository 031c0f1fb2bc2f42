"""Compares sageLLM with other engines on this machine, unattended and with resume: one JSON file per process.

    python benchmarks/peers/run.py --prepare                   # any time: files, first starts, correctness
    python benchmarks/peers/run.py --minutes 24 --out FILE     # on a quiet machine: measures, prints the table

Rounds alternate: a round runs every engine in turn, each in a fresh process that measures all workloads, several times
each. A process waits until others use at most 0.15 cores for a second, and a figure during which they use more is
dropped. `--no-wait` measures nevertheless, and marks the result. What the folder `--state` already has is not repeated;
after `--minutes` no further process is started. Engines without an environment (`make peers-setup`) stay empty.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from correctness import problem_of
from environments import default_folder, python_of
from gguf_file import write_floats
from load import wait_until_quiet
from shapes import SHAPES, check_checkpoint, checkpoint
from table import result_of, text_of
from variants import ISA_SETTINGS, VARIANTS, Variant, environment, has_amx, is_restricted
from workloads import STANDARD, WORKLOADS

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
RESTRICTED_WORKLOADS = ["decode", "prefill_1024"]
RESTRICTED_SHAPES = ["135m"]
PROCESS_LIMIT_S = 1200
SAMPLING_S = 40
"""Seconds of a process after which a workload is measured only once."""


@dataclass(frozen=True, slots=True)
class Job:
    """One process: a variant on a shape with an instruction set, in a round."""

    shape: str
    variant: Variant
    isa: str
    round: int
    workloads: list[str]

    @property
    def file(self) -> str:
        return f"{self.shape}.{self.variant.name}.{self.isa}.{self.round}.json"


class Runner:
    """Runs processes and keeps their results in files."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.state: Path = options.state
        self.state.mkdir(parents=True, exist_ok=True)
        self.variants = [VARIANTS[name] for name in options.variants.split(",") if self._is_installed(VARIANTS[name])]
        self.shapes: list[str] = options.shapes.split(",")
        self.until = time.monotonic() + 60 * options.minutes

    def _is_installed(self, variant: Variant) -> bool:
        python = self._python(variant)
        if not Path(python).exists():
            print(f"{variant.name} is skipped, since it is not installed; run make peers-setup", file=sys.stderr)
        return Path(python).exists()

    def _python(self, variant: Variant) -> str:
        return sys.executable if variant.engine == "ours" else str(python_of(variant.engine, self.options.envs))

    def prepare(self) -> None:
        """Files in the forms of the engines, first starts on each shape, and the correctness check."""
        for shape in self.shapes:
            folders = checkpoint(shape, self.options.cache), check_checkpoint(shape, self.options.cache)
            for variant in self.variants:
                self._kept(
                    f"first-start.{shape}.{variant.name}.files.json", lambda v=variant, f=folders: self._files(v, f)
                )
                self._check(shape, variant, folders[1])
                self._kept(
                    f"first-start.{shape}.{variant.name}.json", lambda v=variant, s=shape: self._first_start(s, v)
                )
                print(f"{shape} {variant.name} is prepared", file=sys.stderr)
        for isa in self._isas():
            for shape in RESTRICTED_SHAPES:
                for variant in self.variants:
                    if is_restricted(variant, isa):
                        name = f"first-start.{shape}.{variant.name}.{isa}.json"
                        self._kept(name, lambda v=variant, s=shape, i=isa: self._first_start(s, v, i))

    def _files(self, variant: Variant, folders: Sequence[Path]) -> dict[str, Any]:
        """Writes the checkpoints in the form of the engine; an error or nothing."""
        for folder in folders:
            if variant.engine == "llama":
                write_floats(folder, variant.form)
            done = self._worker(variant, "native", {"task": "prepare", "folder": str(folder)})
            if "error" in done:
                return done
        return {}

    def _check(self, shape: str, variant: Variant, folder: Path) -> None:
        def check() -> dict[str, Any]:
            answer = self._worker(variant, "native", {"task": "check", "folder": str(folder)})
            if "error" in answer:
                return answer
            argument = json.dumps({variant.name: answer["tokens"]})
            found = self._run([sys.executable, str(HERE / "correctness.py"), str(folder), argument], {})[variant.name]
            return {**found, "problem": problem_of(found, variant.tie_limit)}

        self._kept(f"check.{shape}.{variant.name}.json", check)

    def _first_start(self, shape: str, variant: Variant, isa: str = "native") -> dict[str, Any]:
        """Compiles what an engine compiles on its first start, which is kept for the later ones."""
        return self._measure(Job(shape, variant, isa, 0, []))

    def measure(self) -> None:
        """Limits, all jobs in turn, limits again."""
        self._limits("first")
        for job in self._jobs():
            if time.monotonic() > self.until:
                print("the time is over: run the command again for the rest", file=sys.stderr)
                break
            self._kept(job.file, lambda job=job: self._measured_quietly(job))
        self._limits(f"last-{int(time.time())}")

    def _jobs(self) -> Iterator[Job]:
        """The first round of everything, then the others: a run that is cut short has all rows."""
        for number in range(self.options.rounds):
            for shape in self.shapes:
                for variant in self.variants:
                    yield Job(shape, variant, "native", number, self.options.workloads.split(","))
            for isa in self._isas():
                for shape in (shape for shape in RESTRICTED_SHAPES if shape in self.shapes):
                    for variant in self.variants:
                        if is_restricted(variant, isa) and variant.kind == "16-bit":
                            yield Job(shape, variant, isa, number, RESTRICTED_WORKLOADS)

    def _isas(self) -> list[str]:
        return [isa for isa in self.options.isas.split(",") if isa and (isa != "avx512" or has_amx())]

    def _measured_quietly(self, job: Job) -> dict[str, Any]:
        if job.round == 0 and self.options.drop_caches:
            drop_caches()
        is_quiet = self.options.no_wait or wait_until_quiet()
        found = self._measure(job)
        return {**found, "waited": not self.options.no_wait, "quiet": is_quiet}

    def _measure(self, job: Job) -> dict[str, Any]:
        task = {
            "task": "measure",
            "folder": str(checkpoint(job.shape, self.options.cache)),
            "workloads": job.workloads,
            "round": job.round,
            "seconds": SAMPLING_S,
            "started": time.time(),
        }
        return self._worker(job.variant, job.isa, task)

    def _limits(self, name: str) -> None:
        def measure() -> dict[str, Any]:
            if not self.options.no_wait:
                wait_until_quiet()
            return self._run([sys.executable, str(HERE / "roofline.py"), str(self.options.threads)], {})

        self._kept(f"limits.{name}.json", measure)

    def _worker(self, variant: Variant, isa: str, task: dict[str, Any]) -> dict[str, Any]:
        argument = json.dumps({**task, "variant": variant.name, "threads": self.options.threads})
        settings = environment(variant, isa, self.options.threads, self.options.envs)
        return self._run([self._python(variant), str(HERE / "worker.py"), argument], settings)

    def _run(self, command: Sequence[str], settings: dict[str, str]) -> dict[str, Any]:
        """The JSON of the last line, or an error as a result: the other engines are measured all the same."""
        # Bytecode is kept, or every start would compile all modules again where the shell forbids that.
        kept = {"PYTHONDONTWRITEBYTECODE": "", "OMP_NUM_THREADS": str(self.options.threads)}
        environment = {**os.environ, **kept, **settings}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROCESS_LIMIT_S)
        except subprocess.TimeoutExpired:
            return {"error": f"took more than {PROCESS_LIMIT_S} s"}
        if done.returncode:
            return {"error": done.stderr[-1500:] or f"exit status {done.returncode}"}
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def _kept(self, name: str, make: Any) -> None:
        path = self.state / name
        if path.exists() and not (self.options.retry and "error" in json.loads(path.read_text(encoding="utf-8"))):
            return
        start = time.monotonic()
        found = make()
        draft = path.with_suffix(".partial")
        draft.write_text(json.dumps(found) + "\n", encoding="utf-8")
        draft.rename(path)
        problem = f", failed: {found['error'].strip().splitlines()[-1][:150]}" if "error" in found else ""
        print(f"{path.stem}: {time.monotonic() - start:.0f} s{problem}", file=sys.stderr)


def drop_caches() -> None:
    """Empties the page cache if this process may, so that the next start reads from the disk."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1\n", encoding="ascii")
    except OSError:
        print("the page cache cannot be dropped here: cold starts are warm ones", file=sys.stderr)


def main() -> None:
    base = Path(tempfile.gettempdir()) / "sagellm-peers"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="prepare and check, without measuring")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="separated by commas")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="separated by commas")
    parser.add_argument("--workloads", default=",".join(STANDARD), help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--isas", default=",".join(name for name in ISA_SETTINGS if name != "native"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=24.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--envs", type=Path, default=default_folder())
    parser.add_argument("--cache", type=Path, default=base, help="folder of the checkpoints")
    parser.add_argument("--state", type=Path, default=base / "state", help="folder of the results by process")
    parser.add_argument("--no-wait", action="store_true", help="measure on a busy machine; the result is marked")
    parser.add_argument("--drop-caches", action="store_true", help="make the starts of the first round cold ones")
    parser.add_argument("--retry", action="store_true", help="run processes again that have failed")
    parser.add_argument("--out", type=Path, help="write all figures there as JSON")
    options = parser.parse_args()
    runner = Runner(options)
    runner.prepare()
    if options.prepare:
        return
    runner.measure()
    from machine import machine_facts

    result = result_of(options.state, {**machine_facts(), "threads": options.threads})
    print(text_of(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
