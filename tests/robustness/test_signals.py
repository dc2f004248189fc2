"""Signals: whoever gets them and whenever they come, a run saves or ends, and nothing is left."""

import os
import signal
import subprocess
import sys
import time

import pytest

import dreamer_utils as utils
from common.episodes import ResumableCollector
from common.signals import STOP_SIGNALS
from fingerprint import fingerprint
from small_runs import ROOT, SMALL, configure, small, start, wait_for

TWO = [
    "env.n_parallel_envs=2",
    "collector.random_steps=160",
    "collector.total_steps=640",
    "checkpoint.every=80",
    "logger.mode=offline",
]


def group_of(leader):
    """{process: its state} of all processes in the group of `leader` that are not zombies."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = open(f"/proc/{entry}/stat").read().rsplit(")", 1)[1].split()
            except OSError:  # it has just ended
                continue
            if int(stat[2]) == leader and stat[0] != "Z":
                found[int(entry)] = stat[0]
    return found


def start_group(run_dir, *overrides):
    """A run without a terminal, at the head of a process group of its own."""
    return start("dreamer.py", *SMALL, f"run_dir={run_dir}", *overrides, start_new_session=True)


@pytest.fixture(scope="module")
def two_copies(tmp_path_factory):
    """The fingerprint of the run of two copies, undisturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    small(run, *TWO, f"name={configure(*SMALL).name}")
    return fingerprint(run)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGHUP", "SIGQUIT"])
def test_a_signal_to_the_whole_group_saves_with_several_copies(tmp_path, two_copies, name):
    """Clusters signal the group: workers and the dashboard's processes get it too."""
    number = signal.Signals[name]
    process = start_group(tmp_path / "run", *TWO)
    rows = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: process.poll() is not None or rows.exists() and "updates" in rows.read_text())
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert "the same command goes on" in said and "Traceback" not in said
    wait_for(lambda: not group_of(process.pid), 10)
    saved = max((tmp_path / "run" / "checkpoints").iterdir()).name
    assert saved < "checkpoint-000000000640", "the signal came too late to prove anything"
    small(tmp_path / "run", *TWO, f"name={configure(*SMALL).name}")
    assert fingerprint(tmp_path / "run") == two_copies


@pytest.mark.parametrize("name", ["USR2", "HUP"])
def test_a_signal_to_the_whole_group_of_a_run_with_one_copy_leaves_no_noise(tmp_path, name):
    """Slurm signals every process of a job, multiprocessing's helper too."""
    steps = "collector.total_steps=40000", "checkpoint.every=20000"
    process = start_group(tmp_path / "run", *steps)
    rows = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: process.poll() is not None or rows.exists() and "eval" in rows.read_text())
    os.killpg(process.pid, signal.Signals[f"SIG{name}"])
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.Signals[f"SIG{name}"], said
    lines = [line for line in said.splitlines() if line]
    assert [line.split(":")[0] for line in lines] == [f"SIG{name}", lines[-1].split(":")[0]], said
    assert "the same command goes on" in lines[-1]


def test_a_stopped_worker_ends_in_a_sentence_and_not_in_a_hang(tmp_path, monkeypatch):
    """Within `ANSWER_SECONDS`, while TorchRL alone would wait for hours."""
    assert utils.ANSWER_SECONDS <= 600
    monkeypatch.setattr(utils, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(utils, "SHUTDOWN_SECONDS", 0.5)
    original, workers = ResumableCollector.collect, []

    def collect(self):
        if self.episodes[0] == 2 and not workers:
            workers.extend(self.collector.env.base_env._workers)
            os.kill(workers[0].pid, signal.SIGSTOP)
        return original(self)

    monkeypatch.setattr(ResumableCollector, "collect", collect)
    begin = time.monotonic()
    with pytest.raises(utils.UserError) as caught:
        small(tmp_path / "run", *TWO, "logger.mode=disabled")
    assert time.monotonic() - begin < 60
    assert "acting in the environment failed (" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert workers and not any(worker.is_alive() for worker in workers)


def test_several_copies_leave_the_signals_to_the_run(tmp_path):
    """TorchRL builds a worker's task in this process too, to look at its specs."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    utils.close_env(utils.make_env(configure(*SMALL, *TWO)))
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


BLOCKED = """
import re
import signal
import dreamer_utils as utils
from common.signals import STOP_SIGNALS
from multiprocessing import resource_tracker
from small_runs import SMALL, configure

if __name__ == "__main__":
    env = utils.make_env(configure(*SMALL, "env.n_parallel_envs=2", "collector.random_steps=160"))
    children = [worker.pid for worker in utils.workers_of(env)]
    for pid in [*children, resource_tracker._resource_tracker._pid]:
        masks = re.findall("Sig(?:Blk|Ign):.(.*)", open(f"/proc/{pid}/status").read())
        unheard = int(masks[0], 16) | int(masks[1], 16)
        print(all(unheard >> number - 1 & 1 for number in STOP_SIGNALS))
    print(not signal.pthread_sigmask(signal.SIG_BLOCK, []))
    utils.close_env(env)
"""


def test_no_stop_signal_reaches_a_child_and_all_reach_the_run(tmp_path):
    """In a fresh process: multiprocessing's own helper unblocks some when it starts."""
    script = tmp_path / "blocked.py"
    script.write_text(BLOCKED)
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["True"] * 4, done.stdout + done.stderr


def test_ctrl_c_stays_ignored_where_it_was():
    """A script's jobs with & ignore it from the start."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "from common.signals import end_at_once_on_ctrl_c; end_at_once_on_ctrl_c();"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN;"
        "signal.signal(signal.SIGINT, signal.default_int_handler); end_at_once_on_ctrl_c();"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_workers_end_silently_with_a_run_that_is_killed(tmp_path):
    process = start_group(tmp_path / "run", *TWO)
    rows = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: process.poll() is not None or rows.exists())
    assert len(group_of(process.pid)) >= 3, "the run and its workers"
    process.kill()
    _, said = process.communicate(timeout=60)
    wait_for(lambda: not group_of(process.pid), 10)
    assert "Traceback" not in said and "Error" not in said


@pytest.mark.parametrize("copies", [1, 2])
def test_ctrl_c_in_the_first_seconds_ends_at_once_and_silently(tmp_path, copies):
    """Ten moments, from the interpreter's start to the first updates."""
    flags = f"env.n_parallel_envs={copies}", "collector.random_steps=160"
    said = []
    for number in range(5):
        process = start_group(tmp_path / f"run{number}", *flags, "optimization.pretrain=100000")
        time.sleep(0.3 + (number + copies / 2) * 2.2)
        os.killpg(process.pid, signal.SIGINT)
        output, error = process.communicate(timeout=60)  # the 100,000 updates would take hours
        said.append((process.returncode, output + error))
        wait_for(lambda leader=process.pid: not group_of(leader), 10)
    for code, words in said:
        assert code in (130, -signal.SIGINT), words
        for noise in ("Traceback", "Error", "Warning"):
            assert noise not in words, words
