"""Whatever characters a value has, it reaches sbatch, srun and the program byte for byte, or is refused."""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nemo_rlhf.cli import main
from nemo_rlhf.config import load
from nemo_rlhf.config.slurm import ContainerConfig, SlurmConfig, SlurmSectionConfig, check_slurm
from nemo_rlhf.launch.slurm import Job, directive, render
from tests.slurm import why_not

NASTY = [
    "", " ", "a b", " a", "a ", "'", "''", '"', '""', "it's", 'say "so"', "'\"'", "$", "$HOME", "${HOME}",
    "$(touch /x)", "`touch /x`", "\\", "\\\\", "\\n", "a\\", "\\'", '\\"', "\n", "a\nb", "\n\n",
    "#SBATCH --nodes=99", "a\n#SBATCH -N9\n", "\t", "a\tb", "\r", "a\r\nb", "\v", "\f", "\x01", "\x1b[31m",
    "\x7f", "\x85", "\u2028", "\u2029", "\ufeff", "\u200b", "é", "日本語", "😀", "e\u0301", "*", "?", "[a-z]",
    "{a,b}", "~", "~/x", "~root", "#", "# a", "a#b", "a #b", "-", "--", "-n", "--help", "-rf", "-e\\n", "!",
    "!!", "&", "&&", "|", ";", ";;", "<", ">", ">(x)", "<<EOF", "(", ")", "((", "[[", "]]", "%", "%j", "%%",
    "%s", "@", "^", "=", "a=b", "==", "+", "+=", ",", "a,b", ":", "::", ".", "..", "/", "//", "0", "-0", "1e3",
    "0123", "null", "true", "x" * 5000, "é" * 3000, "' " * 500, "\\x41", "$'a'", "\\u0041", "EOF", "\n EOF\n",
    "\\\n", "$\n", "a \\\n b", "'\n'", '"\n"', "${x:-y}", "$((1+1))", "$1", "$@", "$*", "$$", "$?", "{{ x }}",
    "{% raw %}", "{#", "#}", "{{", "job.lines", "a  b", "a   'b'   c", "last",
]  # fmt: skip


def nasty() -> list[str]:
    """200 values: those above, and random ones of the same signs."""
    chance, signs = random.Random(0), "".join(sorted(set("".join(NASTY))))
    return NASTY + ["".join(chance.choices(signs, k=chance.randint(1, 12))) for _ in range(200 - len(NASTY))]


def read_by_sbatch(line: str) -> list[str]:
    """The words of a line of directives, as SLURM's _get_argument reads them."""
    words, place = [], 0
    while place < len(line):
        if line[place].isspace():
            place += 1
            continue
        assert line[place] != ":"
        if line[place] == "#":
            break
        word, quote = "", ""
        while place < len(line) and (quote or not line[place].isspace()):
            sign = line[place]
            if sign == "\\":
                place += 1
                word += line[place]
            elif quote and sign == quote:
                quote = ""
            elif not quote and sign in "\"'":
                quote = sign
            elif not quote and sign == "#":
                return [*words, word]
            else:
                word += sign
            place += 1
        words.append(word)
    return words


STUB = """#!/bin/bash
case " $* " in *" preflight "*) exit 0 ;; esac
printf '%s\\0' "$@" >"$CALLS/arguments"
env -0 >"$CALLS/environment"
"""


def run(script: str, tmp_path: Path) -> tuple[list[bytes], dict[bytes, bytes], str]:
    """Arguments and environment of the script's last step, and what module was told; SLURM's programs are stubs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", STUB), ("scontrol", "#!/bin/sh\necho n1\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_CPUS_PER_NODE": "8", "CALLS": str(tmp_path)}
    environment = {**os.environ, **job, "PATH": f"{programs}:{os.environ['PATH']}"}
    (tmp_path / "job.sh").write_text(script, newline="")
    prelude = (
        f'module() {{ printf "%s\\0" "$@" >"{tmp_path}/modules"; }}; export -f module; exec bash {tmp_path}/job.sh'
    )
    subprocess.run(["bash", "-c", prelude], cwd=tmp_path, env=environment, check=True, capture_output=True)
    arguments = (tmp_path / "arguments").read_bytes().split(b"\0")[:-1]
    pairs = (pair.partition(b"=") for pair in (tmp_path / "environment").read_bytes().split(b"\0"))
    return arguments, {name: value for name, _, value in pairs}, (tmp_path / "modules").read_bytes().decode()


def test_every_value_reaches_the_program(tmp_path: Path) -> None:
    values = nasty()
    assert len(values) == 200
    slurm = SlurmSectionConfig(environment={f"V{n}": value for n, value in enumerate(values)}, modules=values)
    check_slurm(SlurmConfig(slurm))
    words = ["nemo-rlhf", "ppo", *(f"key={value}" for value in values), *values]
    script = render(Job("name", words, reads=values[40], writes=str(tmp_path / "a run $x"), num_local=1), slurm)
    assert "\r" not in script  # sbatch refuses what looks like a text of DOS
    directives = [line for line in script.split("\n") if line.startswith("#SBATCH")]
    assert not any("99" in line or "N9" in line for line in directives)
    arguments, environment, modules = run(script, tmp_path)
    start = arguments.index(b"nemo-rlhf")
    assert arguments[start:] == [word.encode() for word in words]
    assert [environment[f"V{n}".encode()] for n in range(200)] == [value.encode() for value in values]
    assert modules.split("\0")[1:-1] == values
    assert (tmp_path / "a run $x").is_dir()


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_containers_get_their_mounts_and_image(runtime: str, tmp_path: Path) -> None:
    sources = ["/a$(touch${IFS}X)", "/$HOME", '/a"b', "/it's", "/`touch`", "/\\x", "/*", "/~", "/#", "/é", "/-n"]
    mounts = [f"{source}:/c" for source in sources]
    file = tmp_path / "cluster.yaml"
    container = {"runtime": runtime, "image": "/i $x 'y'.sif", "mounts": mounts}
    written = yaml.safe_dump({"slurm": {"container": container, "modules": ["m"]}})
    file.write_text(written.replace("${IFS}", r"\${IFS}"))  # no interpolation
    slurm = load("slurm", config_file=file, absolute=False).slurm
    arguments, _, _ = run(render(Job("name", ["nemo-rlhf", "sft"], reads="x", writes="run"), slurm), tmp_path)
    own = f"{tmp_path}:{tmp_path}"
    if runtime == "pyxis":
        assert f"--container-mounts={','.join([*mounts, own])}".encode() in arguments
        assert b"--container-image=/i $x 'y'.sif" in arguments
    else:
        assert [word.decode() for word in arguments if word.startswith(b"--bind=")] == [
            f"--bind={mount}" for mount in [*mounts, own]
        ]
        assert b"/i $x 'y'.sif" in arguments


def one_line() -> Iterator[str]:
    for value in nasty():
        try:
            check_slurm(SlurmConfig(SlurmSectionConfig(options=[f"--comment={value}"])))
        except ValueError as error:
            assert "\n" not in str(error) and str(error).endswith(".")
        else:
            yield value


def test_sbatch_reads_every_option_back() -> None:
    taken = list(one_line())
    assert len(taken) > 90
    assert not any(set(value) & set("\n\r\v\f\x01\x7f\x85\u2028\u2029") for value in taken)
    for value in taken:
        assert read_by_sbatch(directive(f"--comment={value}")) == [f"--comment={value}"]
        if value.strip() and not value[0].isspace():
            assert read_by_sbatch(directive(f"--comment {value}")) == ["--comment", value]
    assert directive("--constraint=a&b|c*2") == "--constraint=a&b|c*2"
    assert directive("--comment=hello world") == '"--comment=hello world"'


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_slurm_itself_reads_every_option_back(outside_of_any_job: None) -> None:
    from tests.slurm import cluster

    with cluster():
        for value in [value for value in one_line() if value.strip() == value != "" and len(value) < 1000][:40]:
            script = f"#!/bin/bash\n#SBATCH {directive(f'--comment={value}')}\ntrue\n"
            held = ["sbatch", "--partition=cpu", "--hold", "--parsable"]
            number = subprocess.run(held, input=script, text=True, capture_output=True, check=True).stdout.strip()
            asked = ["squeue", "-h", "-j", number, "-o", "%k"]
            assert subprocess.run(asked, text=True, capture_output=True, check=True).stdout == f"{value}\n"


PPO = ["ppo", "model.restore_from=/m", "data.prompts=p", "reward.function=a.b:c", "exp_manager.explicit_log_dir=run"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("options: ['--array=1-3']", "a job for each run"),
        ("options: ['-a 1-3']", "a job for each run"),
        ("options: ['--arr=1-3']", "a job for each run"),
        ("options: ['--nod=3']", "decided elsewhere"),
        ("options: [\"--comment=a\\rb\"]", "control characters"),
        ("options: [\"--comment=a\\vb\"]", "control characters"),
        ("options: [\"--comment=a\\u2028b\"]", "control characters"),
        ("options: ['--comment=\"a b\"']", "leave them out"),
        ("options: [null]", "slurm.options[0]"),
        ("options: [[--a]]", "slurm.options[0]"),
        ("options: {a: b}", "slurm.options"),
        ("environment: {A: null}", "slurm.environment.A"),
        ("environment: {A: [1, 2]}", "slurm.environment.A"),
        ("environment: {A: {B: c}}", "slurm.environment.A"),
        ("environment: {é: x}", "name of a variable"),
        ("environment: {UID: 5}", "slurm.environment.UID would not reach the run"),
        ("environment: {nodes: 5}", "slurm.environment.nodes would not reach the run"),
        ("environment: {A٣: x}", "name of a variable"),
        ('environment: {A: "a\\0b"}', "slurm.environment has 'a\\x00b'"),
        ("time: ٠٤:00:00", "is not a time"),
        ("account: bücher", "slurm.account"),
        ("modules: [null]", "slurm.modules[0]"),
        ("setup: [~]", "slurm.setup[0]"),
        ("log_dir: 'a%jb'", "slurm.log_dir"),
        ("log_dir: \"a\\nb\"", "slurm.log_dir"),
        ("container: {runtime: pyxis, image: i, mounts: [\"/a\\x01:/b\"]}", "slurm.container.mounts"),
    ],
)  # fmt: skip
def test_what_could_not_be_given_is_refused(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(f"slurm:\n  {text}\n")
    assert main(["slurm", *PPO, "--cluster", str(file)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_no_variable_of_the_script_is_given_by_others() -> None:
    """Whatever name a script assigns is refused, but for the one that it takes over."""
    slurm = SlurmSectionConfig(container=ContainerConfig("pyxis", "i"), cpus_per_task=2)
    text = render(Job("name", ["nemo-rlhf", "ppo"], "r", "w", resumes=True), slurm)
    assigned = set(re.findall(r"^\s*(?:export )?([A-Za-z_]\w*)=", text, re.MULTILINE)) - {"OMP_NUM_THREADS"}
    assert {"run_dir", "MASTER_ADDR", "in_vain", "code"} <= assigned
    for name in assigned:
        with pytest.raises(ValueError, match=f"slurm.environment.{name} would not reach"):
            check_slurm(SlurmConfig(SlurmSectionConfig(environment={name: "x"})))


def test_times_and_numbers_of_a_cluster_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "slurm:\n  time: 12:00:00\n  account: 0123\n  qos: 1e3\n  partition: no\n  memory: 1_000\n"
        "  environment: {on: 0x10, A: 22, B: 1.10}\n"
    )
    assert main(["slurm", *PPO, "--cluster", str(file)]) == 0
    script = capsys.readouterr().out
    for line in ("--time=12:00:00", "--account=0123", "--qos=1e3", "--partition=no", "--mem=1_000"):
        assert f"#SBATCH {line}\n" in script
    for line in ("export on=0x10", "export A=22", "export B=1.10"):
        assert f"{line}\n" in script


def test_the_script_is_for_its_owner_alone(tmp_path: Path) -> None:
    out = tmp_path / "job.sh"
    out.write_text("")
    out.chmod(0o644)
    assert main(["slurm", *PPO, "slurm.environment.TOKEN=x", "--out", str(out)]) == 0
    assert out.stat().st_mode & 0o777 == 0o700
    out.unlink()
    out.symlink_to("/dev/null")  # as --out=/dev/stdout
    assert main(["slurm", *PPO, "--out", str(out)]) == 0
    assert Path("/dev/null").is_char_device() and Path("/dev/null").stat().st_mode & 0o777 == 0o666


def test_paths_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Home is replaced, and what is relative stays so, to the directory where the job is submitted."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["slurm", *PPO[:-1], "exp_manager.explicit_log_dir=~/a run", "slurm.log_dir=~/logs"]) == 0
    script = capsys.readouterr().out
    assert f"\nrun_dir='{tmp_path}/a run'\n" in script and f"#SBATCH --output={tmp_path}/logs/%x-%j.log\n" in script
    assert main(["slurm", *PPO[:-1], "exp_manager.explicit_log_dir=-run"]) == 0
    assert "\nrun_dir=./-run\n" in capsys.readouterr().out
