"""The README and the pages in docs/ are true: their commands, tables, links and pins."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from small_runs import ROOT, SMALL, configure

README = (ROOT / "README.md").read_text()
DOCS = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
TEXT = "\n".join([README, *DOCS.values()])
COMMANDS = re.findall(r"(?:python|uv run) dreamer\.py *((?:[^\s#`]+ ?)*)", TEXT)


def table_rows(text, first_column):
    """The rows of the table whose first column has this name, each a list of cells."""
    table = text.split(f"| {first_column} |")[1].split("\n\n")[0]
    lines = table.splitlines()[2:]  # what is left of the names, and the dashes
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def functions(path):
    """The names of all functions of a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def all_tests():
    """The names of all tests."""
    paths = (ROOT / "tests").rglob("test_*.py")
    return {name for path in paths for name in functions(path) if name.startswith("test_")}


def test_the_equation_table_names_files_functions_and_tests_that_exist():
    tests, rows = all_tests(), table_rows(README, "equation")
    assert len(rows) >= 10
    for equation, _, *places in rows:
        file, function, test = (re.fullmatch(r"`([\w./]+)`", place)[1] for place in places)
        assert function in functions(ROOT / file), equation
        assert test in tests, equation


def test_the_table_of_faults_names_tests_that_exist():
    tests, rows = all_tests(), table_rows(DOCS["fault-tolerance"], "fault")
    named = [re.findall(r"`(test_\w+)`", row[-1]) for row in rows]
    assert all(named) and sum(map(len, named)) >= 16
    assert [name for names in named for name in names if name not in tests] == []


def test_every_test_that_is_named_anywhere_exists():
    assert set(re.findall(r"`(test_\w+)`", TEXT)) - all_tests() == set()


def test_every_link_to_a_file_leads_to_one():
    broken = []
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
        files = [link for link in links if not link.startswith("https://")]
        broken += [(path.name, file) for file in files if not (path.parent / file).exists()]
    assert broken == []


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
    there_is_no_such_run = "resume=", "export="
    words = [word for word in words if not word.startswith(there_is_no_such_run)]
    assert configure(*words, name=name).run_dir.startswith("runs/")


def test_the_page_begins_with_the_clone_and_the_activation():
    """So that no later command ends at `python: command not found`."""
    first = README.index("python dreamer.py", README.index("## Install"))
    clone, activation = README.index("git clone"), README.index(". .venv/bin/activate")
    assert clone < activation < first
    assert "On a GPU nothing has been measured" in README[:clone]


def test_every_script_that_is_named_exists():
    scripts = set(re.findall(r"python ((?:benchmarks|tests)/[\w/]+\.py)", TEXT))
    assert len(scripts) >= 4
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_the_citation_names_the_paper_and_the_license():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = cff["preferred-citation"]
    assert cff["license"] == "MIT" and (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert paper["title"] in " ".join(README.split()) and paper["year"] == 2020


def test_the_training_command_trains(tmp_path):
    line = r"^python (dreamer\.py --config-name config_laptop) "
    command = re.search(line, README, re.MULTILINE)
    small = [word for word in SMALL if not word.startswith(("env.name", "env.task", "env.from"))]
    flags = [*small, f"run_dir={tmp_path / 'run'}", "logger.video=true", "logger.mode=offline"]
    flags += ["eval.episodes=1", "eval.time_limit=40"]
    words = [sys.executable, *command[1].split(), *flags]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr, done.stderr
    rows, times = (
        [json.loads(row) for row in (tmp_path / "run" / name).open()]
        for name in ("metrics.jsonl", "throughput.jsonl")
    )
    assert rows[-1]["environment_steps"] == 240 and rows[-1]["updates"] == 6
    assert len(list((tmp_path / "run" / "videos").glob("*.mp4"))) == 3 * 3
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert set(rows[-1]) | set(times[-1]) <= documented_metrics()


def documented_metrics():
    """The names in the first column of the table of metrics, and those of the x axes above it."""
    x_axes = DOCS["metrics"].split("| metric |")[0]
    names = " ".join(row[0] for row in table_rows(DOCS["metrics"], "metric"))
    return set(re.findall(r"`([\w/]+)`", x_axes + names))


def test_the_speed_tables_are_what_the_benchmark_wrote():
    rows = [line for line in DOCS["performance"].splitlines() if line.startswith("| ")]
    pages = (ROOT / "benchmarks" / "results").glob("throughput*.md")
    written = [line for page in pages for line in page.read_text().splitlines()]
    assert len(rows) > 20
    assert [row for row in rows if row not in written] == []


@pytest.mark.parametrize("page", ["README.md", "docs/learning.md"])
def test_every_table_with_a_command_is_what_the_command_prints(page):
    marks = r"<!-- (\w+): python (.*?) --into (\S+) -->\n(.*?)\n<!-- end of \1 -->"
    text = (ROOT / page).read_text()
    tables = re.findall(marks, text, re.DOTALL)
    assert len(tables) == text.count(" --into ") == text.count("<!-- end of ") >= 1
    for _, words, into, table in tables:
        assert into == page
        command = [sys.executable, *words.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == table


def test_every_pin_is_exact_and_requirements_txt_is_the_only_list():
    pins = (ROOT / "requirements.txt").read_text().split()
    assert [pin for pin in pins if not re.fullmatch(r"[\w-]+==\d+(\.\d+)+", pin)] == []
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)
    assert project["project"]["dynamic"] == ["dependencies"]
    dynamic = project["tool"]["setuptools"]["dynamic"]
    assert dynamic == {"dependencies": {"file": ["requirements.txt"]}}
    assert "==" not in text
    assert "# /// script" not in (ROOT / "dreamer.py").read_text()  # dependencies of one file


def test_the_example_of_an_own_environment_trains(tmp_path):
    section = README.split("## Your own environment")[1].split("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    [command] = re.findall(r"python (dreamer\.py .*)", section)
    (tmp_path / "point.py").write_text(code)
    small = [word for word in SMALL if not word.startswith(("env.name", "env.task"))]
    done = subprocess.run(
        [sys.executable, *command.split(), *small, f"run_dir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (card["state"], card["task"]) == ("finished", "point:Point-v0")
