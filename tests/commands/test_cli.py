"""The command line: what goes where, and what it exits with."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import klora
from klora import cli
from klora.commands import analyze
from klora.fusion.policies import POLICIES
from klora.settings import options, shown_options
from tests.report.test_document import check
from tests.support.lora_files import write_lora
from tests.support.models import module_shapes
from tests.support.pairs import ATTENTION, shapes, write_pair
from tests.support.pipelines import sd_pipeline

Files = tuple[Path, Path]
ROOT = Path(klora.__file__).parent.parent


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return write_pair(tmp_path)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process; gives exit code, stdout, stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in argv])
        out, err = capfd.readouterr()
        return code, out, err

    return call


Run = Callable[..., tuple[int, str, str]]


def python(*argv: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, text=True, **options)  # type: ignore[call-overload,no-any-return]


class TestEveryCommand:
    def test_help_and_version_go_to_stdout(self, run: Run) -> None:
        code, out, err = run("--help")
        assert (code, err) == (0, "")
        assert all(command in out for command in ("analyze", "generate", "demo"))
        assert run("--version") == (0, f"klora {klora.__version__}\n", "")

    @pytest.mark.parametrize("command", ["analyze", "generate"])
    def test_every_setting_is_an_option_that_explains_itself(self, run: Run, command: str) -> None:
        _, out, _ = run(command, "--help")
        for name, option in shown_options().items():
            flag = "selection-seed" if (name, command) == ("seed", "generate") else name.replace("_", "-")
            assert f"--{flag} " in out
            assert "|".join(option.choices) in out
        assert all(policy in out for policy in POLICIES)
        assert "--engine" not in out
        # What is empty by default says nothing of it.
        assert "()" not in out

    @pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS)])
    def test_help_fits_80_columns(self, run: Run, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        _, out, _ = run(*command, "--help")
        assert max(map(len, out.splitlines())) <= 80

    @pytest.mark.parametrize(
        "command",
        [
            ["analyze", "nowhere.safetensors", "ink.safetensors"],
            ["merge", "nowhere.safetensors", "ink.safetensors", "--policy=direct", "-o", "x.safetensors"],
        ],
    )
    def test_a_file_that_is_not_there_needs_no_torch(self, command: list[str]) -> None:
        code = f"import sys; from klora import cli; print(cli.main({command})); sys.exit('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "2\n")
        assert "nowhere.safetensors: does not exist" in done.stderr

    def test_a_pair_that_was_analysed_before_needs_no_torch(
        self, files: Files, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        command = ["analyze", *map(str, files), "--json", "-"]
        _, before, _ = run(*command)
        code = f"import sys; from klora import cli; cli.main({command}); sys.exit('torch' in sys.modules)"
        again = python("-c", code, capture_output=True)
        assert (again.returncode, again.stdout) == (0, before)

    def test_help_needs_no_torch(self) -> None:
        code = "import sys; from klora import cli; cli.main(['analyze', '--help']); sys.exit('torch' in sys.modules)"
        assert python("-c", code, stdout=subprocess.DEVNULL).returncode == 0

    @pytest.mark.parametrize(
        ("argv", "named"),
        [
            ([], "COMMAND"),
            (["generate"], "generate"),
            (["analyze"], "SUBJECT"),
            (["analyze", "a", "b", "c"], "c"),
            (["analyze", "a", "b", "--scal", "s"], "--scal"),
            (["analyze", "a", "b", "--alpha", "x"], "--alpha"),
            (["analyze", "a", "b", "--alpha", "nan"], "--alpha"),
            (["analyze", "a", "b", "--balance", "3"], "--balance"),
            (["analyze", "a", "b", "--scale", "t"], "--scale"),
            (["analyze", "a", "b", "--policy", "best"], "--policy"),
            (["analyze", "a", "b", "--steps", "0"], "--steps"),
            (["analyze", "a", "b", "--scale", "s*", "--alpha", "0"], "--alpha"),
            (["analyze", "a", "b", "--balance", "1", "--share", "0.5"], "--share"),
            (["analyze", "a", "b", "--policy", "random", "--share", "0.5"], "--share"),
            (["analyze", "a", "b", "--picture", "map.jpg"], "--picture"),
            (["generate", "--model", "m"], "--subject"),
            (["demo", "now"], "now"),
        ],
    )
    def test_a_bad_argument_is_one_line_that_names_it(self, run: Run, argv: list[str], named: str) -> None:
        code, out, err = run(*argv)
        assert (code, out) == (2, "")
        assert err.startswith("klora: error: ")
        assert err.count("\n") == 1
        assert named in err

    def test_an_interrupt_exits_with_130_and_one_line(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(analyze, "read_settings", interrupted)
        assert run("analyze", "a", "b") == (130, "", "klora: interrupted\n")

    def test_a_missing_package_is_named_with_its_cure(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
        code, _, err = run("demo")
        assert (code, err) == (2, 'klora: error: klora demo needs diffusers; pip install "klora[demo]"\n')


class TestAnalyze:
    def test_the_summary_goes_to_stdout(self, run: Run, files: Files) -> None:
        code, out, err = run("analyze", *files, "--steps", 12)
        assert (code, err) == (0, "")
        assert "contested 24 of 27 modules" in out
        assert "24 modules × 12 steps" in out

    def test_json_to_stdout_is_all_that_is_there(self, run: Run, files: Files) -> None:
        code, out, err = run("analyze", *files, "--json", "-", "--steps", 12, "--scale", "s*")
        assert (code, err) == (0, "")
        found = check(json.loads(out))
        assert found["subject"]["file"] == str(files[0])
        assert (found["steps"], found["scale"]["kind"]) == (12, "s*")

    def test_json_and_picture_go_to_files_beside_the_summary(self, run: Run, files: Files, tmp_path: Path) -> None:
        code, out, _ = run("analyze", *files, "--json", tmp_path / "a.json", "--picture", tmp_path / "a.png")
        assert code == 0
        assert "contested" in out
        check(json.loads((tmp_path / "a.json").read_text()))
        with Image.open(tmp_path / "a.png") as image:
            assert image.format == "PNG"
        assert not list(tmp_path.glob(".klora*"))

    def test_settings_reach_the_plan(self, run: Run, files: Files) -> None:
        rule = ("--variant", "official", "--alpha", 1.2, "--beta", 0.3, "--balance", -0.5, "--k", 5)
        found = json.loads(run("analyze", *files, *rule, "--steps", 7, "--json", "-")[1])
        assert found["scale"] == {"kind": "s", "alpha": 1.2, "beta": 0.3, "balance": -0.5}
        assert (found["variant"], found["steps"], found["modules"][0]["k"]) == ("official", 7, 5)

    def test_warnings_go_to_stderr_and_leave_the_json_alone(self, run: Run, files: Files) -> None:
        save_file({**load_file(files[1]), "something.else": torch.zeros(2)}, files[1])
        code, out, err = run("analyze", *files, "--json", "-")
        assert code == 0
        assert json.loads(out)["coverage"]["unmatched"] == ["something.else"]
        assert err.startswith("klora: warning: 1 key not understood")
        assert err.count("\n") == 1

    def test_a_second_run_gives_the_same_bytes(self, run: Run, files: Files) -> None:
        assert run("analyze", *files, "--json", "-") == run("analyze", *files, "--json", "-")

    @pytest.mark.parametrize("damage", ["missing", "folder", "empty", "text", "cut", "nan", "pickle", "shape"])
    def test_a_bad_file_is_one_line_that_names_it(self, run: Run, files: Files, damage: str) -> None:
        bad = files[1]
        if damage == "nan":
            save_file({key: t * float("nan") for key, t in load_file(bad).items()}, bad)
        elif damage == "shape":
            write_lora(bad, shapes(ATTENTION, size=16))
        elif damage == "pickle":
            bad = bad.with_suffix(".pt")
            torch.save({}, bad)
        else:
            whole = bad.read_bytes()
            bad.unlink()
            if damage == "folder":
                bad.mkdir()
            elif damage != "missing":
                bad.write_bytes({"empty": b"", "text": b"no tensors here", "cut": whole[: len(whole) // 2]}[damage])
        code, out, err = run("analyze", files[0], bad, "--json", "-")
        assert (code, out) == (2, "")
        assert err.startswith("klora: error: ")
        assert err.count("\n") == 1
        assert bad.name in err

    def test_a_file_name_of_any_characters_stays_on_one_line(self, run: Run, files: Files, tmp_path: Path) -> None:
        code, _, err = run("analyze", tmp_path / "a\nb\x1b[31m.safetensors", files[1])
        assert code == 2
        assert err.count("\n") == 1
        assert "\x1b" not in err

    @pytest.mark.parametrize(
        ("words", "named"),
        [(("--subject-blocks", "nope: 1"), "--subject-blocks"), (("--policy", "b-lora"), "--policy")],
    )
    def test_a_setting_that_does_not_suit_the_files_is_named_as_its_option(
        self, run: Run, files: Files, tmp_path: Path, words: tuple[str, ...], named: str
    ) -> None:
        command = "merge" if named == "--policy" else "analyze"
        target = ("-o", tmp_path / "a.safetensors") if command == "merge" else ()
        code, out, err = run(command, *files, *words, *target)
        assert (code, out) == (2, "")
        assert err.startswith(f"klora: error: {named}: ")

    def test_a_path_is_told_with_all_its_spaces(self, run: Run, files: Files, tmp_path: Path) -> None:
        missing = tmp_path / "two  spaces" / " my  dog.safetensors"
        assert run("analyze", missing, files[1])[2] == f"klora: error: {missing}: does not exist; check the path\n"


class TestOutputs:
    def unwritten(self, run: Run, files: Files, *argv: object) -> str:
        before = [path.read_bytes() for path in files]
        code, out, err = run("analyze", *files, *argv)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert [path.read_bytes() for path in files] == before
        return err

    def test_a_folder_that_is_not_there_is_refused(self, run: Run, files: Files, tmp_path: Path) -> None:
        assert "no folder" in self.unwritten(run, files, "--json", tmp_path / "no" / "a.json")

    def test_a_folder_in_place_of_a_file_is_refused(self, run: Run, files: Files, tmp_path: Path) -> None:
        assert "is a folder" in self.unwritten(run, files, "--json", tmp_path)

    def test_an_input_is_never_overwritten(self, run: Run, files: Files, tmp_path: Path) -> None:
        assert "overwritten" in self.unwritten(run, files, "--json", files[0])
        link = tmp_path / "link.png"
        link.symlink_to(files[1])
        assert "overwritten" in self.unwritten(run, files, "--picture", link)

    def test_one_file_for_two_things_is_refused(self, run: Run, files: Files, tmp_path: Path) -> None:
        target = tmp_path / "a.png"
        assert "two files" in self.unwritten(run, files, "--json", target, "--picture", target)

    def test_a_target_is_refused_before_the_files_are_read(self, run: Run, tmp_path: Path) -> None:
        _, _, err = run("analyze", "missing", "missing", "--json", tmp_path / "no" / "a.json")
        assert "no folder" in err

    def test_a_link_is_written_through_and_a_device_is_written_to(self, run: Run, files: Files, tmp_path: Path) -> None:
        (tmp_path / "real.json").write_text("old")
        (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
        assert run("analyze", *files, "--json", tmp_path / "link.json")[0] == 0
        assert (tmp_path / "link.json").is_symlink()
        check(json.loads((tmp_path / "real.json").read_text()))
        assert run("analyze", *files, "--json", os.devnull)[0] == 0
        assert stat.S_ISCHR(os.stat(os.devnull).st_mode)

    def test_a_failing_write_leaves_what_was_there(
        self, run: Run, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "a.json"
        target.write_text("old")

        def full(self: Path, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        code, _, err = run("analyze", *files, "--json", target)
        assert code == 2
        assert "No space left" in err
        assert target.read_text() == "old"
        assert not list(tmp_path.glob(".klora*"))

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk_behind_stdout_is_one_line(
        self, run: Run, files: Files, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with open("/dev/full", "w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            code, _, err = run("analyze", *files)
        assert code == 2
        assert err.count("\n") == 1

    def test_a_reader_that_leaves_is_no_error(self, files: Files) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        done = python("-m", "klora", "analyze", *files, "--json", "-", stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        assert (done.returncode, done.stderr) == (0, "")

    def test_a_terminal_without_greek_costs_question_marks(
        self, run: Run, files: Files, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", terminal)
        assert run("analyze", *files) == (0, "", "")
        assert "contested 24" in terminal.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def generator_args(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments of `klora generate` for a tiny random pipeline and a pair that fits it."""
    folder = tmp_path_factory.mktemp("generator_args")
    pipe = sd_pipeline(folder / "tokenizer", levels=1)
    pipe.save_pretrained(folder / "model")
    attention = {name: shape for name, shape in module_shapes(pipe.unet).items() if ".attn" in name}
    subject = write_lora(folder / "dog.safetensors", attention, "kohya", rank=4, seed=1)
    style = write_lora(folder / "ink.safetensors", attention, "peft", rank=8, seed=2)
    options = {"model": folder / "model", "subject": subject, "style": style, "prompt": "a dog, in ink", "steps": 2}
    return ("generate", *(word for key, value in options.items() for word in (f"--{key}", str(value))), "--size", "32")


class TestGenerate:
    def test_pictures_carry_all_that_made_them(self, run: Run, generator_args: tuple[str, ...], tmp_path: Path) -> None:
        out = tmp_path / "new" / "folder"
        words = ("--images", 2, "--seed", 7, "--negative-prompt", "bad", "--guidance", 3, "--balance", 0.5, "--map")
        code, printed, err = run(*generator_args, "--out", out, *words)
        assert code == 0, err
        names = ["00000-7.png", "00000-7-map.png", "00001-8.png", "00001-8-map.png"]
        assert printed.splitlines() == [str(out / name) for name in names]
        assert "picture 2 of 2" in err
        with Image.open(out / "00001-8.png") as image:
            facts = json.loads(image.text["klora"])
            readable = image.text["parameters"]
            assert image.size == (32, 32)
        assert {key: facts[key] for key in ("prompt", "negative_prompt", "seed", "steps", "guidance_scale")} == {
            "prompt": "a dog, in ink",
            "negative_prompt": "bad",
            "seed": 8,
            "steps": 2,
            "guidance_scale": 3.0,
        }
        assert set(facts["settings"]) == set(options())
        assert (facts["settings"]["scale"], facts["settings"]["beta"], facts["balance"]) == ("s", 0.5, 0.5)
        assert facts["subject"]["file"] == "dog.safetensors"
        assert len(facts["style"]["sha256"]) == 64
        assert facts["model"] == "model"
        assert readable.splitlines()[:2] == ["a dog, in ink", "Negative prompt: bad"]
        assert "Steps: 2, Sampler: DDIMScheduler, CFG scale: 3.0, Seed: 8, Size: 32x32" in readable

    def test_a_seed_means_one_picture_and_none_is_overwritten(
        self, run: Run, generator_args: tuple[str, ...], tmp_path: Path
    ) -> None:
        run(*generator_args, "--out", tmp_path, "--images", 2, "--seed", 1)
        run(*generator_args, "--out", tmp_path, "--seed", 2)
        run(*generator_args, "--out", tmp_path, "--seed", 2, "--policy", "direct")
        first, second, again, other = (Image.open(path) for path in sorted(tmp_path.glob("*.png")))
        assert second.tobytes() == again.tobytes()
        assert first.tobytes() != second.tobytes()
        assert other.tobytes() != second.tobytes()

    @pytest.mark.parametrize(
        ("words", "named"),
        [
            (["--model", "nowhere"], "nowhere"),
            (["--model", "no/where"], "no/where"),
            (["--model", "."], "model_index.json"),
            (["--model", "pyproject.toml"], "is a file"),
            (["--device", "cuda:99"], "--device"),
            (["--device", "toaster"], "--device"),
            (["--size", "33"], "--size"),
            (["--size", "64x"], "--size"),
            (["--images", "0"], "--images"),
            (["--seed", "-1"], "--seed"),
            (["--guidance", "inf"], "--guidance"),
            (["--dtype", "int8"], "--dtype"),
            (["--out", "pyproject.toml"], "name a folder"),
            (["--subject", "nowhere.safetensors"], "nowhere.safetensors"),
            (["--variant", "mine"], "--variant"),
        ],
    )
    def test_bad_input_is_one_line_that_names_it(
        self, run: Run, generator_args: tuple[str, ...], words: list[str], named: str, tmp_path: Path
    ) -> None:
        code, out, err = run(*generator_args, "--out", tmp_path, *words)
        assert (code, out) == (2, "")
        assert err.startswith("klora: error: ")
        assert err.count("\n") == 1
        assert named in err
        assert not list(tmp_path.iterdir())

    def test_a_damaged_model_is_one_line(self, run: Run, generator_args: tuple[str, ...], tmp_path: Path) -> None:
        (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        code, _, err = run(*generator_args, "--model", tmp_path, "--out", tmp_path / "out")
        assert (code, err.count("\n")) == (2, 1)

    def test_files_for_another_model_are_one_line(
        self, run: Run, generator_args: tuple[str, ...], tmp_path: Path
    ) -> None:
        other = dict.fromkeys(ATTENTION, (48, 48))
        subject = write_lora(tmp_path / "a.safetensors", other)
        style = write_lora(tmp_path / "b.safetensors", other, seed=1)
        code, _, err = run(*generator_args, "--subject", subject, "--style", style, "--out", tmp_path / "out")
        assert (code, err.count("\n")) == (2, 1)
        assert "a.safetensors" in err
