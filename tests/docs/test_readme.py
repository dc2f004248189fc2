"""The README is true: its commands, its tables, its pins."""

import ast
import json
import re
import subprocess
import sys
import tomllib

import pytest
from small_runs import ROOT, SMALL, configure

import dreamer
import dreamer_utils as utils

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"python dreamer\.py *((?:[^\s#`]+ ?)*)", README)


def test_the_equation_table_names_functions_and_tests_that_exist():
    table = README.split("| equation |")[1].split("\n\n")[0]
    rows = re.findall(r"\| `(\w+)` \| `(\w+)` \|$", table, re.MULTILINE)
    assert len(rows) >= 10
    tests = {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    for function, test in rows:
        assert callable(getattr(dreamer, function)), function
        assert test in tests, test


def test_the_table_of_faults_names_tests_that_exist():
    table = README.split("| fault |")[1].split("\n\n")[0]
    named = re.findall(r"`(test_\w+)`", table)
    assert len(named) >= 16
    text = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert [name for name in named if f"def {name}(" not in text] == []


@pytest.mark.parametrize("arguments", sorted(set(COMMANDS)))
def test_every_command_has_a_valid_configuration(arguments):
    words = arguments.split()
    if "-m" in words:
        words = [word.split(",")[0] for word in words if word != "-m"]
    name = "config"
    if "--config-name" in words:
        at = words.index("--config-name")
        name = words[at + 1]
        words = words[:at] + words[at + 2 :]
    assert configure(*utils.quoted(words), name=name).run_dir.startswith("runs/")


def test_the_training_command_trains(tmp_path):
    line = r"\.venv/bin/python (dreamer\.py --config-name config_laptop)$"
    command = re.search(line, README, re.MULTILINE)
    small = [word for word in SMALL if not word.startswith(("env.name", "env.task", "env.from"))]
    flags = [*small, f"run_dir={tmp_path / 'run'}", "logger.video=true", "logger.mode=offline"]
    words = [sys.executable, *command[1].split(), *flags]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr, done.stderr
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").open()]
    assert rows[-1]["environment_steps"] == 240 and rows[-1]["updates"] == 6
    assert len(list((tmp_path / "run" / "videos").glob("*.mp4"))) == 3 * 3
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert set(rows[-1]) - metrics_in_the_readme() == set()


def metrics_in_the_readme():
    text = README.split("## Metrics")[1].split("## Troubleshooting")[0]
    return set(re.findall(r"`([\w/]+)`", text))


def test_the_speed_tables_are_what_the_benchmark_wrote():
    section = README.split("## Speed")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    written = (ROOT / "benchmarks" / "results" / "throughput.md").read_text().splitlines()
    assert len(rows) > 20
    assert [row for row in rows if row not in written] == []


def test_the_table_of_results_is_what_the_cards_say():
    marks = r"<!-- results: python (.*?) --readme -->\n(.*?)\n<!-- end"
    words, table = re.search(marks, README, re.DOTALL).groups()
    script, pattern = words.split()
    command = [sys.executable, script, *sorted(map(str, ROOT.glob(pattern)))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == table


def test_pins_are_the_same_everywhere():
    pins = (ROOT / "requirements.txt").read_text().split()
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", dreamer_source())
    lines = (line[2:] for line in block["content"].splitlines())
    script = tomllib.loads("\n".join(lines))
    assert sorted(script["dependencies"]) == sorted(pins)
    assert all("==" in pin for pin in pins)


def dreamer_source():
    return (ROOT / "dreamer.py").read_text()


def test_the_files_keep_to_the_floor_plan():
    for name, limit in (("dreamer.py", 450), ("dreamer_utils.py", 1800)):
        text = (ROOT / name).read_text()
        assert len(text.splitlines()) <= limit, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 45, f"{name}: {node.name}"
    assert utils.__doc__ and dreamer.__doc__
