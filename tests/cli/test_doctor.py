"""``doctor``: what it says of this machine is so, nothing private is in it, and a broken job is told by the status."""

from __future__ import annotations

import getpass
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from toys.cli import Result, command, refused

from lightning_ssiuu.cli import doctor, doctor_checks
from lightning_ssiuu.cli.doctor_checks import CHECKS, bfloat16, eight_bit, hub


@pytest.fixture(scope="module")
def shown() -> Iterator[Result]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield command("doctor", "--json")


def test_every_check_was_made_and_the_main_job_works(shown: Result) -> None:
    found = json.loads(shown.out)
    assert (shown.status, found["works"]) == (0, True)
    assert [check["name"] for check in found["checks"]] == [*CHECKS, "hub"]
    by_name = {check["name"]: check for check in found["checks"]}
    for name in ("embedded model", "bfloat16", "processes", "cache"):
        assert by_name[name]["state"] == "works", by_name[name]
    answers = [re.search(r"answer ([\d.]+) %", by_name[n]["result"]) for n in ("embedded model", "bfloat16")]
    first, second = (float(answer[1]) for answer in answers if answer)
    assert first > 50  # the embedded model knows it
    assert second == pytest.approx(first, abs=5)
    assert by_name["hub"]["state"] == "skipped"


def test_versions_devices_and_extras_are_those_here(shown: Result) -> None:
    found = json.loads(shown.out)
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["devices"]["cpu"]["threads"] == torch.get_num_threads()
    assert len(found["devices"]["cuda"]) == torch.cuda.device_count()
    for name, extra in found["extras"].items():
        assert extra["installed"] or extra["install"] == f"pip install 'lightning-ssiuu[{name}]'"


def test_nothing_private(shown: Result) -> None:
    assert str(Path.home()) not in shown.out
    assert f"/{getpass.getuser()}/" not in shown.out


@pytest.mark.parametrize("home", ["/", ""])
def test_a_container_without_a_home(monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.setenv("HOME", home)
    text = "https://huggingface.co answers. It took / 5 s"
    assert doctor.private(text) == text


def test_as_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> str:
        raise OSError(f"cannot read {tmp_path}\nnor anything else")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "CHECKS", {"embedded model": broken, "cache": lambda: "well"})
    monkeypatch.setattr(doctor, "extras", lambda: {"rouge": [], "vllm": ["vllm>=1 (missing)"]})
    result = command("doctor")
    assert result.status == 1
    assert "NO  embedded model  OSError: cannot read ~ nor anything else (0.0 s)" in result.out
    assert "ok  cache           well" in result.out
    assert "vllm   pip install 'lightning-ssiuu[vllm]'" in result.out
    assert "rouge  installed" in result.out
    assert "The main job does not work" in result.out
    refused(command("doctor", "--jsn"), "--jsn", "--json")


def test_without_torch_it_still_says_so() -> None:
    text = (
        "import sys; sys.modules['torch'] = None\nfrom lightning_ssiuu.__main__ import main\nsys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1, done.stderr
    assert re.search("NO  embedded model  ModuleNotFoundError: .*torch", done.stdout)
    assert "CUDA  not known: torch cannot be imported" in done.stdout


def test_wrong_results_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "_probability", lambda dtype, bits=None: 80.0 if bits is None else 3.0)
    with pytest.raises(ArithmeticError, match=r"3\.0 % instead of 80\.0 %"):
        eight_bit()
    assert "80.0 %" in bfloat16()
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.sign)
    with pytest.raises(ArithmeticError, match="off"):
        bfloat16()


def test_requirements_by_version(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=999", "numpy>=1", 'nope-nope>=1; extra == "search"', 'numpy>=1; extra == "rouge"']
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    monkeypatch.setattr(metadata, "metadata", lambda name: Names())
    with pytest.raises(LookupError, match=r"^torch>=999 \(.* is installed\)$"):
        doctor_checks.requirements()
    assert doctor_checks.extras() == {"rouge": [], "search": ["nope-nope>=1 (missing)"]}


class Names:
    """Stands for the metadata of a distribution."""

    def get_all(self, name: str) -> list[str]:
        return ["search", "rouge"]


class Hub(BaseHTTPRequestHandler):
    """Knows nothing, but is there."""

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert hub(asked=True).endswith("answers with 404")
    with pytest.raises(OSError, match="refused"):
        hub(asked=True)
