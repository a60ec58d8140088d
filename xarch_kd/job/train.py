"""Train a plan: stages one after another into a run folder that can be resumed after any step."""

from __future__ import annotations

import resource
import shlex
import sys
import time
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xarch_kd.calibration.aligned_mixers import set_mixer_weights
from xarch_kd.calibration.head import fold_projector
from xarch_kd.calibration.projector_report import ProjectorCheck, ProjectorReport, write_reports
from xarch_kd.data.rows import BatchOrder, Rows
from xarch_kd.display import byte_text
from xarch_kd.errors import UsageError
from xarch_kd.files import write_tensors
from xarch_kd.job.caches import StageCaches
from xarch_kd.job.calibrate import calibrated, prepare_stage, report_maps, start_head
from xarch_kd.job.card import write_card
from xarch_kd.job.evaluate import measure
from xarch_kd.job.fingerprint import mapping_fingerprint, run_fingerprint
from xarch_kd.job.held_out import held_out_batches, held_out_rows
from xarch_kd.job.layer_choice import Chosen, select_layers
from xarch_kd.job.models import RunModels, config_fingerprint, device_of, load_models, load_run_tokenizer
from xarch_kd.job.prefixes import check_prefixes, stage_prefixes
from xarch_kd.job.record_mixing import record_mixing
from xarch_kd.job.report import report_at_end
from xarch_kd.job.resuming import restore_stage, resume_point, usable_checkpoint
from xarch_kd.job.run import Run
from xarch_kd.job.split import split_notices
from xarch_kd.job.texts import draw_lines, run_text
from xarch_kd.job.tracking import tracked
from xarch_kd.mapping_file.schema import MappingFile
from xarch_kd.models.loading.load import DTYPES
from xarch_kd.models.loading.save import save_student
from xarch_kd.models.mamba_ssm.format import export_mamba_ssm
from xarch_kd.planning.disk import check_disk
from xarch_kd.planning.plan import Plan, StagePlan
from xarch_kd.planning.render import disk_line, plan_as_dict
from xarch_kd.planning.resolve import make_plan, with_steps
from xarch_kd.run.fingerprint import Fingerprint, changed_patches, changed_releases, check_unchanged
from xarch_kd.run.folder import RunFolder, State
from xarch_kd.run.processes import Processes, joined_processes
from xarch_kd.run.progress import StageProgress
from xarch_kd.run.report import Reporter, clock
from xarch_kd.run.signals import StopSignals
from xarch_kd.taps.layout import layout_of
from xarch_kd.teacher.reader import TeacherFeatures
from xarch_kd.training.aligner import Aligner
from xarch_kd.training.checkpoints import STATE_FILE, remove_checkpoints, step_of, write_state
from xarch_kd.training.trainer import StageTrainer


def train(
    plan: Plan | str | Path | Mapping[str, Any] | MappingFile,
    output_dir: str | Path,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> Run:
    """Run every stage of a plan into `output_dir` and return the finished run.

    `plan` is a `Plan` or what `xarch_kd.plan` accepts: a path, a dict or a `MappingFile`. A finished run is returned as
    it is. An unfinished one resumes at its last whole checkpoint when `resume` is true; on a CPU the student is bitwise
    the one of an uninterrupted run.

    Under `python -m torch.distributed.run --nproc-per-node N` each process calls this with the same arguments, and the
    rows of each micro-batch are split over the processes: `batch_size` stays the size of the whole micro-batch, so N
    processes compute the same steps as one. Rank 0 writes and prints.

    Raises UsageError when the folder holds something else, or this run made from other text, models, tokenizer or
    package versions, or when the processes differ in them; Interrupted after Ctrl-C or SIGTERM, ProcessError when
    another process fails, and whatever the models, the data or the losses raise.

    >>> import xarch_kd as xkd
    >>> from rich.console import Console
    >>> from xarch_kd.testing.examples import write_example_files
    >>> write_example_files()  # teacher/, text.txt and mapping.yaml, all tiny
    >>> run = xkd.train("mapping.yaml", "runs/first", console=Console(quiet=True))
    >>> run.is_finished, list(run.stages)
    (True, ['mixers'])
    """
    if not isinstance(output_dir, str | PathLike):
        raise UsageError(
            "The output is not a path.", asked=f"output_dir={output_dir!r}", allowed="the path of a folder, str or Path"
        )
    plan = plan if isinstance(plan, Plan) else make_plan(plan)
    fingerprint, content = mapping_fingerprint(plan), plan.mapping.model_dump(mode="json")
    with joined_processes(device_of(plan)) as processes:
        folder = RunFolder(Path(output_dir), is_owner=processes.is_main)
        reporter = Reporter(console) if processes.is_main else Reporter.silent()
        command = shlex.join(
            [
                *("xarch-kd", "train", str(plan.path or folder.mapping), "--output", str(folder.root), "--resume"),
                *(() if plan.mapping.control == "none" else ("--control", plan.mapping.control)),
            ]
        )
        processes.check_same({"mapping file": fingerprint})
        processes.from_main(lambda: folder.state(fingerprint, content))
        with folder.locked(), StopSignals(command, lambda: resume_point(plan, folder)) as signals:
            state: State = processes.from_main(lambda: folder.state(fingerprint, content))
            if state == "unfinished" and not resume:
                raise UsageError(
                    "the output folder holds this run, unfinished", asked=folder.root, fix=f"resume it: {command}"
                )
            _Job(plan, folder, reporter, signals, processes).run(fingerprint, state)
            if state == "finished":
                return Run(folder.root, was_finished=True)
    return Run(folder.root)


class _Job:
    """One call of `train` on one process."""

    def __init__(
        self, plan: Plan, folder: RunFolder, reporter: Reporter, signals: StopSignals, processes: Processes
    ) -> None:
        self.plan = plan
        self.folder = folder
        self.reporter = reporter
        self.signals = signals
        self.processes = processes
        self.reports: list[ProjectorReport] = []
        self.held_out: Rows | None = None
        self.caches = StageCaches(folder)

    def run(self, fingerprint: str, state: State) -> None:
        """Check the inputs, then train unless the folder holds the finished run."""
        started = time.perf_counter()
        tokenizer = load_run_tokenizer(self.plan)
        self.text = text = run_text(self.plan, tokenizer, self.reporter)
        rows = text.training
        made_from = self._checked_inputs(run_fingerprint(self.plan, tokenizer, text), state)
        if state == "finished":
            self.processes.from_main(lambda: self.folder.verify(self.folder.plan, self.folder.student))
            return
        for notice in self.plan.warnings:
            self.reporter.line(f"warning: {notice}")
        free = self.processes.from_main(lambda: check_disk(self.plan, self.folder.root))
        self.reporter.line(f"disk: {disk_line(self.plan)}; {byte_text(free)} free")
        if self.processes.world_size > 1:
            for notice in split_notices(self.plan, self.processes.world_size):
                self.reporter.line(f"warning: {notice}")
        self.plan = self._with_steps(rows)
        for line in text.lines:
            self.reporter.line(line)
        self.held_out = held_out_rows(text, self.plan)
        chosen = self._choose_layers(tokenizer, fingerprint, made_from)
        models = load_models(self.plan, tokenizer, self.reporter, self.processes, teacher=chosen.teacher)
        if chosen.mixers is not None:
            set_mixer_weights(layout_of(models.student), chosen.mixers)
        check_prefixes(self.plan, models)
        self.processes.check_same(
            {
                "data": rows.fingerprint,
                "teacher": config_fingerprint(models.teacher.config),
                "student": config_fingerprint(models.student.config),
            }
        )
        # Recorded first, so that a calibration that is kept is known to be of these inputs.
        self.folder.start(self.plan.source, plan_as_dict(self.plan), fingerprint, made_from)
        with self.processes.main_first():
            start_head(self.plan, models, rows, self.reporter, kept=self.folder.head_map)
            self.plan = calibrated(self.plan, models, rows, self.reporter, kept=self.folder.calibration)
        self.folder.start(self.plan.source, plan_as_dict(self.plan), fingerprint, made_from)
        self.folder.event(
            "started",
            seconds_to_load=round(time.perf_counter() - started, 2),
            data_sha256=rows.fingerprint,
            processes=self.processes.world_size,
        )
        training = time.perf_counter()
        projectors = self._train_stages(models, rows)
        seconds = time.perf_counter() - training
        self._check_signals()
        if self.processes.is_main:
            self._save(models, projectors, seconds)
        # Measuring loads both models again, in float32.
        del models
        if self.processes.is_main:
            if self.plan.mapping.evaluate is not None:
                measure(self.plan, self.folder, self.reporter, text)
            write_card(self.plan, self.folder)
            self.folder.event("finished", seconds=round(time.perf_counter() - started, 2))
            self.folder.finish()
            report_at_end(self.folder, self.reporter)
        self.processes.barrier()

    def _choose_layers(self, tokenizer: PreTrainedTokenizerBase, fingerprint: str, made_from: Fingerprint) -> Chosen:
        """Give the plan the layers that its strategy chooses."""
        if not self.plan.is_unselected:
            return Chosen(plan=self.plan)
        # Recorded first, so that a selection that is kept is known to be of these inputs.
        self.folder.start(self.plan.source, plan_as_dict(self.plan), fingerprint, made_from)
        with self.processes.main_first():
            chosen = select_layers(self.plan, tokenizer, self.text, self.reporter, kept=self.folder.selection)
        self.plan = chosen.plan
        return chosen

    def _checked_inputs(self, found: Fingerprint, state: State) -> Fingerprint:
        """Return what the run was made from when it started. Raises UsageError if anything differs by now."""
        if state == "new":
            return found
        recorded = self.processes.from_main(self.folder.recorded)
        check_unchanged(recorded, found, folder=self.folder.root, finished=state == "finished")
        assert recorded is not None
        differing = changed_patches(recorded, found)
        if state == "finished":
            differing += changed_releases(recorded, found)
        for line in differing:
            self.reporter.line(f"warning: version of {line}")
        return recorded

    def _with_steps(self, rows: Rows) -> Plan:
        """Return the plan with a number of steps for each stage of epochs, and report it."""
        plan = with_steps(self.plan, rows=len(rows))
        for before, stage in zip(self.plan.stages, plan.stages, strict=True):
            if before.is_open:
                epochs = f"{before.stage.epochs:g}"
                self.reporter.line(f"stage {stage.stage.name}: {stage.steps:,} steps, from epochs: {epochs}")
        return plan

    def _check_signals(self) -> None:
        """Raise Interrupted on every rank if any received a signal."""
        self.signals.agree(self.processes.any_rank)
        self.signals.check()

    def _train_stages(self, models: RunModels, rows: Rows) -> dict[str, Tensor]:
        """Run all stages and return their projectors' weights, by stage and name."""
        projectors: dict[str, Tensor] = {}
        for stage in self.plan.stages:
            self._check_signals()
            aligner = self._stage(stage, models, rows)
            projectors |= {
                f"{stage.stage.name}.{name}": tensor.detach().clone()
                for name, tensor in aligner.projectors.state_dict().items()
            }
        return projectors

    def _stage(self, stage: StagePlan, models: RunModels, rows: Rows) -> Aligner:
        """Run one stage, or restore it if it was finished before."""
        aligner = Aligner(self.plan, teacher=models.teacher, student=models.student, stage=stage.index)
        path = self.folder.stage(stage.folder)
        done = path / STATE_FILE
        check = ProjectorCheck(self.plan, aligner, rows, path, self.reporter)
        if done.exists():
            restore_stage(aligner, done, self.processes)
            with self.processes.main_first():
                self.reports += check.after()
            self._fold(stage, aligner)
            self.caches.release(self.plan, stage)
            self.reporter.line(f"stage {stage.stage.name}: done before")
            return aligner
        began = time.perf_counter()
        checkpoint = usable_checkpoint(stage, path, self.folder, self.reporter, self.processes)
        first_step = step_of(checkpoint) if checkpoint else 0
        if checkpoint:
            self.folder.event("resumed", stage=stage.stage.name, step=first_step)
        else:
            with self.processes.main_first():
                prepare_stage(self.plan, stage, aligner, rows, path, self.reporter)
                check.before()
        caches = self.caches.of(self.plan, stage)
        reader = TeacherFeatures(
            layout_of(models.teacher, self.plan.mapping.teacher.paths),
            aligner.targets().sites,
            caches.cache,
            ahead=caches.ahead,
        )
        trainer = self._trainer(stage, aligner, reader, rows)
        progress = StageProgress(
            self.folder, self.reporter, stage=stage.stage.name, steps=stage.steps, first_step=first_step
        )
        writers = tracked(
            self.plan.mapping.tracking, self.folder.root, stage.stage.name, is_owner=self.processes.is_main
        )
        with writers, progress, self.signals.deferred(), warnings.catch_warnings():
            # Raised by torch when a scheduler's state is restored before the first step of this process.
            warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)`")
            trainer.progress = progress
            trainer.run(checkpoint)
        if trainer.state.global_step < stage.steps:
            self._check_signals()
        report_maps(stage, aligner, self.folder, self.reporter, step=self._end(stage, trainer))
        with self.processes.main_first():
            reports = check.after()
        self.reports += reports
        if self.processes.is_main:
            write_state(aligner, done)
            remove_checkpoints(path)
        self._fold(stage, aligner)
        self.caches.release(self.plan, stage)
        seconds = time.perf_counter() - began
        self.folder.event("stage-finished", stage=stage.stage.name, seconds=round(seconds, 2), peak_bytes=peak_bytes())
        self.reporter.line(f"stage {stage.stage.name}: {trainer.state.global_step} steps in {clock(seconds)}")
        for line in (line for report in reports for line in report.lines):
            self.reporter.line(line)
        return aligner

    def _end(self, stage: StagePlan, trainer: StageTrainer) -> int:
        """Give the student the weights that the stage ends with, report and record them, and return their step."""
        last, kept = trainer.state.global_step, trainer.finish()
        if trainer.stopped_early:
            self.reporter.line(
                f"stage {stage.stage.name}: stopped after step {last}: the evaluations stopped improving"
            )
        if kept != last:
            self.reporter.line(
                f"stage {stage.stage.name}: the student has the weights of step {kept}, the best evaluated"
            )
        if trainer.held_out is not None and trainer.held_out.notice is not None:
            self.reporter.line(f"warning: stage {stage.stage.name}: {trainer.held_out.notice}")
        is_averaged = trainer.average is not None
        if is_averaged:
            self.reporter.line(f"stage {stage.stage.name}: the student has the moving average of its weights")
        if is_averaged or stage.stage.evaluation is not None:
            self.folder.event(
                "weights-kept",
                stage=stage.stage.name,
                step=kept,
                stopped_early=trainer.stopped_early,
                is_averaged=is_averaged,
            )
        return kept

    def _fold(self, stage: StagePlan, aligner: Aligner) -> None:
        """Merge the stage's adapters into the student, and with `head: from_projector` its projector into the head."""
        aligner.adapters.merge()
        if stage.stage.head == "from_projector":
            self.reporter.line(f"stage {stage.stage.name}: {fold_projector(aligner)}")

    def _trainer(self, stage: StagePlan, aligner: Aligner, reader: TeacherFeatures, rows: Rows) -> StageTrainer:
        mapping = self.plan.mapping
        order = BatchOrder.of(
            rows,
            batch_size=stage.batch_size,
            distinct=stage.distinct_batches,
            seed=mapping.seed,
            stage=0 if mapping.data.order == "shared" else stage.index,
        )
        for line in draw_lines(stage, order, rows):
            self.reporter.line(line)
        if mapping.data.documents == "isolated" and mapping.data.packing != "none":
            reason = aligner.splitting_reason
            how = "position ids" if reason is None else f"rows of their own, as {reason}"
            self.reporter.line(f"stage {stage.stage.name}: documents of a row are kept apart by {how}")
        return StageTrainer(
            aligner,
            reader,
            self.text.source(order),
            stage,
            folder=self.folder.stage(stage.folder),
            seed=mapping.seed,
            cpu=device_of(self.plan).type == "cpu",
            processes=self.processes,
            tracking=mapping.tracking,
            signals=self.signals,
            held_out=held_out_batches(stage, self.held_out),
            prefixes=stage_prefixes(self.plan, stage, aligner, self.processes),
        )

    def _save(self, models: RunModels, projectors: dict[str, Tensor], seconds: float) -> None:
        record_mixing(self.plan, models, self.text.training, self.folder, self.reporter)
        student = models.student.cpu()  # type: ignore[call-arg]  # stubs expect a bound method
        student.requires_grad_(True).to(DTYPES[self.plan.mapping.student.dtype])  # type: ignore[arg-type]
        save_student(student, models.student_tokenizer, self.folder.student, overwrite=True)
        if self.plan.mapping.student.format == "mamba_ssm":
            export_mamba_ssm(student, self.folder.mamba_ssm, models.student_tokenizer, overwrite=True)
        if projectors:
            write_tensors(self.folder.projectors, projectors)
        if self.reports:
            write_reports(self.folder.projector_reports, self.reports)
        self.folder.event("saved", training_seconds=round(seconds, 2), peak_bytes=peak_bytes())


def peak_bytes() -> int:
    """Return the most memory this process has held so far: its resident set, or the device's if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
