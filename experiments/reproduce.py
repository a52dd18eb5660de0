"""Many runs of moto.py and of the baselines, then one table and the learning curves.

    python experiments/reproduce.py --tasks hammer drawer-open --variants moto bc iql --seeds 6 7 8
    python experiments/reproduce.py --tasks hammer --seeds 6 7 8 --jobs 2 --online-episodes 50
    python experiments/reproduce.py experiments/runs/*-seed*    # table and curves of these folders

The first two start one run per task, variant and seed, `--jobs` of them at once, each a process
of its own in <--logdir, or runs>/<task>-<variant>-seed<n>, with its output in log.txt there. All
flags of moto.py apply to every run, except that a variant keeps the numbers that make it what it
is. Finished runs are skipped, so the same command continues after a stop of any kind. `--executor
slurm` runs them on a cluster through submitit; sbatch's own variables (SBATCH_PARTITION, ...) set
partition, account and time limit.
"""
import argparse
import contextlib
import dataclasses
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from baselines import moto                              # with iql, cql and sac among its variants
import pictures
from moto import UserError

GAP = "promised minus real return\n(units of 1 / (1 - gamma))"
EXECUTORS = "process", "slurm", "local"
NOT_COMPARED = {"seed", "logdir", "preset", "device", "precision", "workers", "cache",
                "eval_every", "final_episodes", "log_every", "save_every"}


# --------------------------------------------------------------------------------------------------
# Reading runs
# --------------------------------------------------------------------------------------------------

def read_run(folder):
    """A run's folder -> (config, {online episode: row of metrics}).

    The rows are the run's evaluations; episode 0 is the end of the offline phase. There are none
    while a run has only begun. Raises UserError on a folder that is no run.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_text())["config"]
        rows = moto.read_metrics(Path(folder) / "metrics.jsonl")
        start = min((row["updates"] for row in rows if row.get("evaluation") == "offline"),
                    default=math.inf)
        each = config["updates_per_episode"]
        config["task"], config["variant"], config["seed"], config["online_episodes"]
        return config, {(row["updates"] - start) / each: row for row in rows
                        if "evaluation" in row and row["updates"] >= start}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no run folder ({error}); give folders that training has made"
                        ) from None


def read_runs(folders):
    """Run folders -> [(config, rows) of each that has a score]; the others are named on stderr.
    Raises UserError where none has one."""
    runs = {folder: read_run(folder) for folder in folders}
    begun = ", ".join(str(folder) for folder, (_, rows) in runs.items() if not rows)
    scored = [run for run in runs.values() if run[1]]
    if not scored:
        raise UserError(f"no score yet in {begun}; repeat this after their offline phase")
    if begun:
        print(f"left out, without a score yet: {begun}", file=sys.stderr)
    return scored


def grouped(runs):
    """[(config, rows)] -> {task: {label: the runs of one configuration}}, in the order of
    moto.VARIANTS."""
    tasks, order = {}, [*moto.VARIANTS]
    for run in runs:
        groups = tasks.setdefault(run[0]["task"], [])
        for group in groups:
            if not moto.differences(group[0][0], run[0], NOT_COMPARED):
                group.append(run)
                break
        else:
            groups.append([run])
    labelled = {}
    for task, groups in sorted(tasks.items()):
        variants = [group[0][0]["variant"] for group in groups]
        groups.sort(key=lambda group: (order + variants).index(group[0][0]["variant"]))
        configs = [group[0][0] for group in groups]
        labelled[task] = {label(config, configs): group for config, group in zip(configs, groups)}
    return labelled


def label(config, others):
    """A configuration's name: its variant, and what sets it apart from others of that variant."""
    apart = {name for other in others if other["variant"] == config["variant"]
             for name in moto.differences(other, config, NOT_COMPARED)}
    changes = [f"{name} {config.get(name, 'nothing')}" for name in sorted(apart)]
    return ", ".join([config["variant"], *changes])


# --------------------------------------------------------------------------------------------------
# Scores: table and curves
# --------------------------------------------------------------------------------------------------

def solved(row):
    """An evaluation's score in [0, 1]: the share of successful episodes; in Franka Kitchen, of
    objects in place."""
    if "evaluation/completed" in row:
        return row["evaluation/completed"] / 4
    return row["evaluation/success"]


def gap(row):
    """The value estimate minus the real return, both in units of 1 / (1 - gamma); None without an
    estimate."""
    if "evaluation/value_estimate" in row:
        return row["evaluation/value_estimate"] - row["evaluation/infinite_horizon_return"]


def interval(rows, draws=10_000):
    """95 % interval (low, high) of the mean of `solved` over seeds; `rows`: one evaluation a seed.

    A bootstrap: seeds are drawn with replacement, and for each its share of episodes with each
    outcome (failure or success; in Franka Kitchen 0 to 4 objects) from the Dirichlet distribution
    that its episodes leave open, with a prior that weighs one episode.
    """
    rng, means = np.random.default_rng(0), []
    for row in rows:
        n, k = row["evaluation/episodes"], row["evaluation/success"] * row["evaluation/episodes"]
        counts = np.array(row.get("evaluation/counts", (n - k, k)))
        shares = rng.dirichlet(counts + 1 / len(counts), (draws, len(rows)))
        means.append(shares @ np.linspace(0, 1, len(counts)))
    seeds = rng.integers(len(rows), size=(1, draws, len(rows)))
    drawn = np.take_along_axis(np.stack(means), seeds, 0)                # (1, draws, seeds)
    return np.quantile(drawn.mean(-1), (0.025, 0.975))


def print_table(tasks):
    """A line of scores per task and configuration, as Markdown."""
    print("| task | variant | which seeds | offline | final | 95 % interval | online episodes |")
    print("|---|---|---|---|---|---|---|")
    for task, groups in tasks.items():
        for name, members in groups.items():
            seeds = ", ".join(str(config["seed"]) for config, _ in members)
            first, last = ([rows[end(rows)] for _, rows in members] for end in (min, max))
            offline, final = (np.mean([solved(row) for row in ends]) for ends in (first, last))
            low, high = interval(last)
            print(f"| {task} | {name} | {seeds} | {offline:.0%} | {final:.0%} | "
                  f"{low:.0%} to {high:.0%} | {members[0][0]['online_episodes']} |")


def draw_groups(tasks, ylabel, value, **limits):
    """A figure with a panel per task, a line per configuration: value(row) over online episodes,
    the mean over seeds and a band from the lowest to the highest."""
    columns, colors, handles = min(5, len(tasks)), {}, {}
    lines = math.ceil(len(tasks) / columns)
    size = 3.6 * columns, 3 * lines
    fig, axes = pictures.figure(*size, lines, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(tasks):]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel(ylabel)
    for axis, (task, groups) in zip(axes.flat, tasks.items()):
        for name, members in groups.items():
            measured = [{e for e, row in rows.items() if value(row) is not None}
                        for _, rows in members]
            common = sorted(set.intersection(*measured))
            y = np.array([[value(rows[e]) for e in common] for _, rows in members])
            color = colors.setdefault(name, f"C{len(colors)}")
            if len(common) > 1:
                handles[name], = axis.plot(common, y.mean(0), "o-", ms=3, color=color)
                axis.fill_between(common, y.min(0), y.max(0), color=color, alpha=0.15)
            elif common:                                  # no online phase: a level to compare with
                line = axis.axhline(y.mean(), ls="--", color=color, lw=1)
                handles.setdefault(name, line)
        counts = sorted({len(members) for members in groups.values()})
        seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
        axis.set(title=f"{task} ({seeds} seed{'s' * (counts[-1] > 1)})", **limits)
        axis.axhline(0, color="black", lw=0.8)
        axis.grid(alpha=0.3)
        if not axis.collections:
            axis.set_xticks([])                           # levels alone: no episodes to count
    fig.supxlabel("online episodes (0: after the offline phase)", fontsize="medium")
    fig.legend(handles.values(), handles, loc="outside upper center", ncols=2 * columns)
    return fig


def plot(folders):
    """Print the table of the runs in `folders`, and draw curves.png (success) and gap.png (by how
    much the critics overestimate) into the folder that holds them. A folder counts once. Raises UserError on one that is no run, and where no run has a score."""
    folders = list(dict.fromkeys(Path(folder).expanduser().resolve() for folder in folders))
    tasks = grouped(read_runs(folders))
    parent = folders[0].parent
    with contextlib.suppress(ValueError):                                # of two drives
        parent = Path(os.path.commonpath([folder.parent for folder in folders]))
    ylabel = "success rate"
    if any(task in moto.KITCHENS for task in tasks):
        ylabel += "\n(kitchen: objects in place / 4)"
    for name, *drawn, limits in (
            ("curves.png", tasks, ylabel, solved, dict(ylim=(-0.03, 1.03))),
            ("gap.png", tasks, GAP, gap, {})):
        with pictures.decorative(name):
            pictures.save_figure(draw_groups(*drawn, **limits), parent / name)
            print(f"wrote {parent / name}", file=sys.stderr)
    print_table(tasks)


# --------------------------------------------------------------------------------------------------
# Running: tasks x variants x seeds, as separate processes that can be resumed
# --------------------------------------------------------------------------------------------------

def flags(values):
    """A dict of config values -> the words of a command line."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def program(variant):
    """The script that trains a variant: moto.py, or the file that adds its agent."""
    return Path(inspect.getfile(moto.AGENTS.get(variant, moto.MOTO))).resolve()


def finished(cfg):
    """Whether cfg.logdir holds the result of this very config."""
    folder = Path(cfg.logdir)
    try:
        then = json.loads((folder / "config.json").read_text())["config"]
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError, KeyError):
        return False
    done = result["updates"], result["eval_episodes"]
    same = not moto.differences(then, dataclasses.asdict(cfg), moto.MAY_CHANGE - {"data"})
    return same and done == (moto.planned_updates(cfg), cfg.final_episodes)


def train_here(source, argv, log, threads):
    """In a process of its own: the run of `source` with the flags `argv`, its output in the file
    `log`. It saves and stops when its parent process ends, however that ends."""
    with contextlib.suppress(AttributeError):                            # Windows
        os.setsid()                                                      # Ctrl-C is for the parent
    with open(log, "ab", 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()

    def stop_with_parent():
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=stop_with_parent, daemon=True).start()
    sys.exit(moto.main(argv))


class Process:
    """A run on this machine, with the methods of a submitit job that are used here."""

    def __init__(self, *args):
        self.process = multiprocessing.get_context("spawn").Process(target=train_here, args=args)
        self.process.start()

    def done(self):
        return not self.process.is_alive()

    def result(self):
        """Raises RuntimeError where the run has failed."""
        if self.process.exitcode:
            raise RuntimeError(f"exit code {self.process.exitcode}")

    def cancel(self):
        """Have it save and stop, and wait until it has."""
        self.process.terminate()
        self.process.join()


def submitted(source, argv, log, threads, cluster):
    """A run as a submitit job: on Slurm or, with "local", on this machine as Slurm would run it."""
    import submitit
    executor = submitit.AutoExecutor(folder=Path(log).parent / "submitit", cluster=cluster)
    executor.update_parameters(name="moto", timeout_min=24 * 60, cpus_per_task=threads,
                               gpus_per_node=int(torch.cuda.is_available()))
    command = ["sh", "-c", 'exec "$@" >>"$0" 2>&1', str(log), sys.executable, str(source), *argv]
    return executor.submit(submitit.helpers.CommandFunction(command))


def start(values, executor, threads):
    """Start the run with these config values -> its job. Raises UserError on a disk that cannot be
    written to."""
    log = Path(values["logdir"]) / "log.txt"
    moto.write_atomically(log.with_name(".sweep"), lambda file: None)
    run = program(values["variant"]), flags(values), log, threads
    return Process(*run) if executor == "process" else submitted(*run, executor)


def last_words(log):
    """The last line that the program itself wrote in a log: the sentence of a UserError, as a
    rule. Empty without one."""
    with contextlib.suppress(OSError):
        for line in reversed(log.read_text(errors="replace").splitlines()):
            if line.startswith("moto: "):
                return line[6:] if len(line) < 206 else line[6:206] + " ..."
    return ""


def planned(tasks, variants, seeds, root, threads, shared):
    """{run folder: config values}, one run per task, variant and seed; the seed changes fastest.
    shared: the flags of all runs; a variant keeps its own numbers (moto.VARIANTS)."""
    runs = {}
    for variant, task, seed in itertools.product(variants, tasks, seeds):
        folder = root / moto.run_name(task, variant, seed)
        kept = moto.VARIANTS.get(variant, {})
        runs[folder] = {
            "workers": threads, **{name: v for name, v in shared.items() if name not in kept},
            "task": task, "variant": variant, "seed": seed, "logdir": str(folder)}
    return runs


def run_all(waiting, jobs, executor, threads, bar):
    """Work through `waiting`, {run folder: config values}, `jobs` runs at once, `threads` for each
    -> {run folder: why it failed}. On a stop the runs under way save and stop."""
    waiting, running, failed = list(waiting.items()), {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                folder, values = waiting.pop(0)
                running[folder] = start(values, executor, threads)
            for folder in [folder for folder, job in running.items() if job.done()]:
                bar.update()
                try:
                    running.pop(folder).result()
                    result = json.loads((folder / "result.json").read_text())
                    bar.write(f"{folder.name}: success {result['offline_success']:.0%} offline, "
                              f"{result['final_success']:.0%} at the end")
                except Exception as error:                   # whatever it was, the others go on
                    failed[folder] = last_words(folder / "log.txt") or error
                    bar.write(f"{folder.name}: failed")
            time.sleep(0.2)
            moto.exit_if_asked()
    finally:
        for job in running.values():
            job.cancel()
    return failed


def sweep(options, shared):
    """Run what is not finished yet, then plot all runs of this command that are.

    options: tasks, variants, seeds, jobs, executor; shared: flags of moto.py for all runs. Raises
    UserError on a value that cannot work, before any run starts; and at the end, naming the runs
    that failed.
    """
    jobs, executor = options.get("jobs", 1), options.get("executor", "process")
    if executor not in EXECUTORS or jobs < 1:
        raise UserError(f"--executor is one of {', '.join(EXECUTORS)}, and --jobs at least 1")
    if executor != "process" and importlib.util.find_spec("submitit") is None:
        raise UserError(f"--executor {executor} needs submitit; pip install submitit")
    root, threads = Path(shared.pop("logdir", "runs")).expanduser(), max(1, moto.cores() // jobs)
    runs = planned(options.get("tasks", [moto.Config.task]),
                   options.get("variants", [moto.Config.variant]),
                   options.get("seeds", [moto.Config.seed]), root, threads, shared)
    waiting = {folder: values for folder, values in runs.items()
               if not finished(moto.build_config(**values))}
    before = len(runs) - len(waiting)
    print(f"{len(runs)} runs in {root}: {before} finished before, {len(waiting)} to do, {jobs} at "
          "once")
    with tqdm(total=len(runs), initial=before, desc="runs") as bar:
        failed = run_all(waiting, jobs, executor, threads, bar)
    if len(failed) < len(runs):
        plot([folder for folder in runs if folder not in failed])
    if failed:
        why = "; ".join(f"{folder.name} ({reason}; its log: {folder / 'log.txt'})"
                        for folder, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {why}")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

def parse(argv):
    """Words of a command line -> (run folders, options of the sweep, flags of moto.py), the last
    two as dicts of what is given. Raises UserError on flags that do not go together."""
    parser = argparse.ArgumentParser(
        prog="reproduce.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        usage="reproduce.py [--tasks TASK ...] [--variants V ...] [--seeds N ...] [--jobs N] "
        "[--executor E] [--FLAG VALUE ...] | FOLDER ...", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="finished runs, to show alone")
    for name, kind in (("tasks", str), ("variants", str), ("seeds", int)):
        parser.add_argument(f"--{name}", type=kind, nargs="+", metavar=name[:-1].upper(),
                            help=f"the {name} to run (default: {getattr(moto.Config, name[:-1])})")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: 1)")
    parser.add_argument("--executor", help="process (default), slurm, or local: submitit's own")
    moto.add_config_flags(parser)
    shared = vars(parser.parse_args(argv))
    folders = shared.pop("folders", [])
    options = {name: shared.pop(name) for name in ("tasks", "variants", "seeds", "jobs", "executor")
               if name in shared}
    for name in ("task", "variant", "seed"):
        if name in shared:
            raise UserError(f"--{name} is for a single run with moto.py; give --{name}s here")
    names = [f"--{name.replace('_', '-')}" for name in (*options, *shared)]
    if folders and names:
        raise UserError(f"run folders and {', '.join(names)} do not go together: the folders are "
                        "shown as they are; leave one out")
    if not folders and not names:
        raise UserError("name what to run, as in --tasks drawer-open --seeds 0 1 2, or the run "
                        "folders to show")
    return folders, options, shared


def reproduce(argv):
    """Run and show, or only show the folders that are given. Raises UserError."""
    folders, options, shared = parse(argv)
    if folders:
        plot(folders)
    else:
        sweep(options, shared)


def main(argv=None):
    """Returns the exit code: as moto.main."""
    return moto.exit_code(reproduce, argv)


if __name__ == "__main__":
    sys.exit(main())
