"""The command line: fast help, one-line errors, options that carry their units."""

import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module

import pytest
import yaml
from argon import crystal_file, model_file

import mdplug
from mdplug import cli


def call(*words: str, capsys) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command, in this process."""
    code = 0
    try:
        cli.main([str(word) for word in words])
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(autouse=True)
def _keep_warnings(monkeypatch):
    import warnings

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


def test_help_is_fast_because_nothing_heavy_is_imported():
    code = (
        "import sys\nfrom mdplug.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'openmm', 'ase', 'mdtraj', 'pymatgen', 'matplotlib', 'numpy', 'scipy'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    for words, allowed in ((["--help"], "[]"), (["md", "--help"], "['numpy']"), (["relax", "--help"], "['numpy']")):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == f"heavy: {allowed}"
        assert "Usage: mdplug" in done.stdout


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help_for_every_option(name, capsys):
    code, out, _ = call(name, "--help", capsys=capsys)
    assert code == 0
    config = import_module(cli.COMMANDS[name].module).Config
    for key in config.model_fields:
        positional = key == cli.COMMANDS[name].positional
        assert (key if positional else f"--{cli.SPELLED.get(key, key)}") in out
    assert "--config" in out


PURE = ("charge", "spin", "distance_max", "bias_strength")


@pytest.mark.parametrize("name", ["md", "relax", "singlepoint", "analyze", "info", "convert", "export", "doctor"])
def test_numbers_carry_their_unit(name):
    """A number that is no count ends in its unit, and its help names it."""
    units = ("_K", "_bar", "_ps", "_fs", "_A", "_eV", "_GPa", "_amu", "_eV_A", "_per_ps")
    for key, field in import_module(cli.COMMANDS[name].module).Config.model_fields.items():
        assert field.description, key
        if cli._kind(field.annotation)[0] is float and key not in PURE:
            assert key.endswith(units), key
            assert key.rpartition("_")[2] in re.split(r"[^A-Za-z]+", field.description), key


def test_version_and_unknown_words(capsys):
    assert call("--version", capsys=capsys) == (0, f"{mdplug.__version__}\n", "")
    code, _, err = call("dance", capsys=capsys)
    assert code == 2
    assert "No such command 'dance'" in err
    code, _, err = call("md", "--temprature_K", "3", capsys=capsys)
    assert code == 2
    assert "--temperature_K" in err


def test_errors_are_one_line_and_exit_2(tmp_path, capsys):
    model = model_file(tmp_path)
    cases = [
        (["md", tmp_path / "no.xyz", "--model", model], "no structure file"),
        (["md", "--model", model], "option 'structure' is missing"),
        (["md", "x.xyz", "--model", model, "--time_ps", "-1"], "time_ps: Input should be greater than 0, got -1"),
        (["info", tmp_path / "no.safetensors"], "no model file"),
        (["analyze", tmp_path], "give a folder that `mdplug md` wrote"),
        (["convert", tmp_path / "no.model", "-o", tmp_path / "x.safetensors"], "no.model"),
        (["relax", tmp_path / "no.cif", "--model", model, "--pressure_GPa", "1"], "pressure_GPa needs cell"),
    ]
    for words, message in cases:
        code, _, err = call(*words, capsys=capsys)
        lines = [line for line in err.splitlines() if line.startswith("mdplug:")]
        assert code == 2, err
        assert len(lines) == 1
        assert message in lines[0]
        assert "Traceback" not in err


def test_debug_shows_the_traceback(tmp_path):
    words = [sys.executable, "-m", "mdplug.cli", "info", str(tmp_path / "no.safetensors")]
    plain = subprocess.run(words, capture_output=True, text=True, check=False)
    assert plain.returncode == 2
    assert plain.stderr.count("\n") <= 2
    assert "Traceback" not in plain.stderr
    loud = subprocess.run([*words, "--debug"], capture_output=True, text=True, check=False)
    assert loud.returncode != 0
    assert "Traceback" in loud.stderr


def test_yaml_and_command_line_meet_and_the_command_line_wins(tmp_path, capsys):
    (tmp_path / "md.yaml").write_text(
        yaml.safe_dump({"model": str(model_file(tmp_path)), "temperature_K": 40, "timestep_fs": 2, "minimise": False})
    )
    out = tmp_path / "run"
    words = ["md", crystal_file(tmp_path), "--config", tmp_path / "md.yaml", "-o", out]
    words += ["--temperature_K", "60", "--time_ps", "0.02", "--ensemble", "nve"]
    code, said, err = call(*words, capsys=capsys)
    assert code == 0, err
    assert "steps: 10" in said
    assert "10/10" in err
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["temperature_K"], config["timestep_fs"], config["minimise"]) == (60.0, 2.0, False)
    # The merged config is a config: it says the same run.
    code, said, err = call("md", "--config", out / "config.yaml", capsys=capsys)
    assert code == 0, err
    assert "continued: True" in said
    (tmp_path / "md.yaml").write_text("tempreature_K: 3\n")
    code, _, err = call(*words[:6], capsys=capsys)
    assert code == 2
    assert "unknown option 'tempreature_K'; did you mean temperature_K?" in err


def test_info_export_and_booleans(tmp_path, capsys):
    model = model_file(tmp_path)
    code, said, _ = call("info", model, capsys=capsys)
    assert code == 0
    assert "cutoff_A" in said
    assert "mdplug.potentials.pair:LennardJones" in said
    code, said, _ = call("info", model, "--as_json", capsys=capsys)
    assert '"cutoff": 7.0' in said
    code, said, err = call("export", model, "-o", tmp_path / "lj.pt", capsys=capsys)
    assert code == 0, err
    assert mdplug.load(tmp_path / "lj.pt").spec.name == "lj"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_command_says_so_and_goes_on(tmp_path, number, code):
    words = [
        sys.executable,
        "-m",
        "mdplug.cli",
        "md",
        str(crystal_file(tmp_path)),
        "--model",
        str(model_file(tmp_path)),
    ]
    words += ["--time_ps", "20", "--timestep_fs", "2", "-o", str(tmp_path / "md")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    log = tmp_path / "md" / "log.csv"
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert f"stopped by {signal.Signals(number).name} at step" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert (tmp_path / "md" / "checkpoint.npz").exists()
