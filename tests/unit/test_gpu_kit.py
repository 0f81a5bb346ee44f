"""What travels to a machine without a network: plan, parts, what is blanked, the way back."""

import json
import struct
import zipfile

import pytest
from packaging.requirements import Requirement

from benchmark.gpu import assemble, prepare
from benchmark.gpu.assemble import sha256_of
from benchmark.gpu.kit import pack, rehearsal
from benchmark.gpu.kit.blank import blank, images, sections, unused
from benchmark.gpu.kit.closure import distributions
from benchmark.gpu.kit.plan import Rules, Target, Verdict, as_rows, decide, linked_names
from benchmark.gpu.kit.wheels import in_folder, platform_flags

TARGET = Target("3.12", "2.39", 90, {"there": "2.0", "unknown": None, "old": "1.0", "lib": "9.1"})
NO_RULES = Rules({}, {}, {}, {}, {}, {})


def _decided(needed, requires, rules=NO_RULES):
    parsed = {name: [Requirement(line) for line in lines] for name, lines in requires.items()}
    versions = dict.fromkeys(needed, "2.0")
    return {one.name: one for one in decide(versions, parsed, TARGET, rules)}


# The plan


def test_modules_are_mapped_to_distributions():
    packages = {"yaml": ["PyYAML"], "google": ["protobuf", "googleapis_common"]}
    found = distributions({"yaml", "google", "os", "nowhere"}, packages)
    assert found == {"pyyaml", "protobuf", "googleapis-common"}


def test_what_is_there_is_subtracted():
    found = _decided(["there", "new"], {})
    assert found["there"].verdict is Verdict.SERVED
    assert (found["new"].verdict, found["new"].reason) == (Verdict.TRAVELS, "not there")


@pytest.mark.parametrize(
    ("requirement", "verdict"),
    [
        ("old>=1.0", Verdict.SERVED),
        ("old==2.0", Verdict.TRAVELS),
        ("old==2.0; python_version < '3.12'", Verdict.SERVED),
        ("unknown>=5", Verdict.SERVED),
        ("unknown==5", Verdict.TRAVELS),
        ("unknown<6", Verdict.TRAVELS),
    ],
)
def test_versions_must_satisfy_whoever_travels(requirement, verdict):
    name = Requirement(requirement).name
    assert _decided(["new", name], {"new": [requirement]})[name].verdict is verdict


def test_requirements_of_what_stays_behind_and_of_ours_do_not_count():
    rules = Rules({}, {}, {}, {}, {"sound": "not needed"}, {})
    requires = {"sound": ["old==7"], "econoserve": ["old==8"]}
    found = _decided(["sound", "econoserve", "old"], requires, rules)
    assert found["old"].verdict is Verdict.SERVED
    assert found["sound"].verdict is Verdict.LEFT_OUT
    assert "econoserve" not in found


def test_rules_overrule():
    rules = Rules({}, {}, {"there": "built for another"}, {"lib": "same library"}, {}, {})
    found = _decided(["new", "there", "lib"], {"new": ["lib==9.2"]}, rules)
    assert (found["there"].verdict, found["there"].reason) == (Verdict.TRAVELS, "built for another")
    assert (found["lib"].verdict, found["lib"].reason) == (Verdict.SERVED, "9.1: same library")


def test_linked_libraries_are_found_through_extras():
    lines = {
        "root": ["toolkit[blas]==1", "other; extra == 'never'"],
        "toolkit": ["blas==2; extra == 'blas'", "fft==3; extra == 'fft'"],
        "blas": ["jit"],
    }
    parsed = {name: [Requirement(line) for line in given] for name, given in lines.items()}
    assert linked_names(["root"], parsed, TARGET) == {"toolkit", "blas", "jit"}


def test_the_machine_can_be_described_by_what_pip_lists_there(tmp_path):
    listed = tmp_path / "pip.json"
    listed.write_text('[{"name": "Ruamel.Yaml", "version": "0.18"}]')
    assert TARGET.with_installed(listed).installed == {"ruamel-yaml": "0.18"}
    listed.write_text('{"no": "list"}')
    with pytest.raises(ValueError, match="pip list --format json"):
        TARGET.with_installed(listed)


def test_the_shipped_target_and_rules_can_be_read():
    target, rules = Target.read(), Rules.read()
    assert target.installed["torch"] == "2.11.0"
    assert not set(rules.left_out) & (set(rules.forced) | set(rules.added) | set(rules.strip))
    assert all(reason for table in (rules.left_out, rules.served) for reason in table.values())


def test_pip_is_asked_for_every_platform_that_the_c_library_runs():
    flags = platform_flags(TARGET)
    assert "manylinux_2_39_x86_64" in flags
    assert "manylinux_2_17_x86_64" in flags
    assert "manylinux_2_40_x86_64" not in flags


# What is blanked


def _image(kind, architecture, payload):
    header = struct.pack("<HHIQIIII", kind, 0x101, 64, len(payload), 0, 0, 0, architecture)
    return header.ljust(64, b"\1") + payload


def _container(*parts):
    body = b"".join(parts)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def _elf(**named):
    """A file with the sections of an ELF file, and nothing else of it."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in named) + b".names\0"
    contents = {**named, ".names": (names, False)}
    at, headers, body = 64, [struct.pack("<IIQQQQIIQQ", *[0] * 10)], b""
    for name, (content, loaded) in contents.items():
        offset = names.index(b"\0" + name.encode() + b"\0") + 1
        fields = (offset, 1, 2 if loaded else 0, 0, at, len(content), 0, 0, 0, 0)
        headers.append(struct.pack("<IIQQQQIIQQ", *fields))
        body += content
        at += len(content)
    head = bytearray(64)
    head[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", head, 0x28, at)
    struct.pack_into("<HHH", head, 0x3A, 64, len(headers), len(headers) - 1)
    return bytearray(bytes(head) + body + b"".join(headers))


def test_code_of_other_gpus_and_debug_sections_are_blanked_and_nothing_moves():
    code = _container(
        _image(2, 80, b"ampere!!"), _image(2, 90, b"hopper!!"), _image(1, 90, b"ptx!")
    )
    contents = {".text": (b"code", True), ".nv_fatbin": (code, True)}
    elf = _elf(**contents, **{".debug_info": (b"dwarf", False)})
    before = bytes(elf)
    assert [section.name for section in sections(elf)] == [
        "",
        ".text",
        ".nv_fatbin",
        ".debug_info",
        ".names",
    ]
    assert blank(elf, 90) == len(b"ampere!!") + len(b"ptx!") + len(b"dwarf")
    assert len(elf) == len(before)
    for gone in (b"ampere!!", b"ptx!", b"dwarf"):
        assert gone not in elf
    for kept in (b"hopper!!", b"code", b".debug_info"):
        assert kept in elf
    begin = elf.index(code[:16])
    assert [one.architecture for one in images(elf[begin : begin + len(code)])] == [80, 90, 90]


def test_ptx_stays_where_there_is_no_machine_code():
    section = _container(_image(1, 80, b"old"), _image(2, 120, b"new")) + _container(
        _image(1, 120, b"newer ptx"), _image(2, 90, b"own")
    )
    dropped = [(one.machine_code, one.architecture) for one in unused(list(images(section)), 90)]
    assert dropped == [(True, 120), (False, 120)]


def test_unknown_gpu_code_is_refused():
    with pytest.raises(ValueError, match="magic"):
        list(images(b"something else, long enough"))
    assert blank(bytearray(b"a text file"), 90) == 0


# The parts, and the way back


FILES = {
    "big/data.bin": bytes(range(256)) * 2000,
    "big/tests/skipped.bin": b"s" * 5000,
    "big-2.0.dist-info/METADATA": b"Name: big\nVersion: 2.0\n",
    "big-2.0.data/scripts/tool": b"#!/bin/sh\n",
    "big-2.0.data/headers/tool.h": b"not installed",
    "big-2.0.data/purelib/pure.py": b"x = 1\n",
}


def _wheel(folder, name, files):
    path = folder / f"{name}-2.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in files.items():
            wheel.writestr(member, content)
    return path


@pytest.fixture
def kit(tmp_path):
    """Two distributions in parts of 700 bytes, and the manifest."""
    import random

    noise = random.Random(1).randbytes(3000)
    wheels = {
        "big": _wheel(tmp_path, "big", {**FILES, "big/noise": noise}),
        "small": _wheel(tmp_path, "small", {"small.py": b"y = 2\n"}),
    }
    archives = [
        pack.pack(path, name, "2.0", ["*/tests/*"], 90, tmp_path / "archives")
        for name, path in wheels.items()
    ]
    parts = pack.cut(archives, tmp_path / "archives", tmp_path / "parts", 700)
    here = f"{assemble.sys.version_info.major}.{assemble.sys.version_info.minor}"
    made = pack.manifest(archives, parts, here, [])
    (tmp_path / "parts" / pack.MANIFEST).write_text(json.dumps(made))
    return tmp_path / "parts", made


def test_parts_are_full_and_their_checksums_right(kit):
    folder, made = kit
    sizes = [part["bytes"] for part in made["parts"]]
    assert len(sizes) > 4
    assert sizes[:-1] == [700] * (len(sizes) - 1)
    assert sum(sizes) == sum(archive["bytes"] for archive in made["archives"])
    for part in made["parts"]:
        assert sha256_of(folder / part["name"]) == part["sha256"]
        assert (folder / part["name"]).stat().st_size == part["bytes"]
    big = made["archives"][0]
    assert big["left_out_bytes"] == 5000
    assert made["archives"][1]["start"] == big["bytes"]


def test_what_was_packed_before_is_not_packed_again(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "_write", lambda *_: pytest.fail("packed again"))
    wheel = in_folder(tmp_path, "big", "2.0")
    again = pack.pack(wheel, "big", "2.0", ["*/tests/*"], 90, tmp_path / "archives")
    assert again.distribution == "big"


def _assemble(folder, target, *more):
    return assemble.main([str(folder), "--target", str(target), "--no-doctor", *more])


def test_parts_arrive_one_by_one_in_any_order(kit, tmp_path, capsys):
    folder, made = kit
    target, load = tmp_path / "target", tmp_path / "load"
    names = [part["name"] for part in made["parts"]][::-1]
    for number, name in enumerate(names):
        load.mkdir()
        (folder / name).rename(load / name)
        if number == 0:
            (load / pack.MANIFEST).write_bytes((folder / pack.MANIFEST).read_bytes())
        status = _assemble(load, target)
        printed = capsys.readouterr().out
        if number + 1 < len(names):
            assert status == assemble.INCOMPLETE
            assert ", ".join(sorted(names[number + 1 :])) in printed
        for file in load.iterdir():
            file.unlink()
        load.rmdir()
    assert status == assemble.DONE
    assert f"export PYTHONPATH={target}/site:{target}/project:" in printed
    site = target / "site"
    assert (site / "big/data.bin").read_bytes() == FILES["big/data.bin"]
    assert (site / "pure.py").read_text() == "x = 1\n"
    assert (site / "bin/tool").exists()
    assert (site / "small.py").exists()
    assert not (site / "big/tests").exists()
    assert not list(site.rglob("tool.h"))
    # Nothing to do: nothing is installed again.
    load.mkdir()
    assert _assemble(load, target) == assemble.DONE
    assert "installing" not in capsys.readouterr().out


def test_a_damaged_part_is_refused(kit, tmp_path, capsys):
    folder, made = kit
    first = folder / made["parts"][0]["name"]
    first.write_bytes(b"x" + first.read_bytes()[1:])
    assert _assemble(folder, tmp_path / "target") == assemble.FAILED
    assert f"{first.name}: its checksum is wrong" in capsys.readouterr().err


def test_another_python_and_a_missing_manifest_are_refused(kit, tmp_path, capsys):
    folder, made = kit
    assert _assemble(tmp_path / "archives", tmp_path / "nothing") == assemble.FAILED
    assert "manifest.json" in capsys.readouterr().err
    (folder / pack.MANIFEST).write_text(json.dumps({**made, "python": "3.9"}))
    assert _assemble(folder, tmp_path / "target") == assemble.FAILED
    assert "the parts are for 3.9" in capsys.readouterr().err


def test_econoserve_and_its_plug_ins_are_found_in_the_target(kit, tmp_path):
    import subprocess
    import sys

    folder, _ = kit
    target = tmp_path / "target"
    assert _assemble(folder, target) == assemble.DONE
    script = (
        "import econoserve.patches, econoserve, importlib.metadata as m\n"
        "print(econoserve.__file__, econoserve.patches.__file__, m.version('econoserve'))\n"
        "print([p.value for p in m.entry_points(group='sglang.srt.plugins')])\n"
    )
    environment = assemble.Layout(target).environment(assemble.ROOT)
    written = (target / "environment.sh").read_text()
    assert f"export PYTHONPATH={environment['PYTHONPATH']}\n" in written
    command = [sys.executable, "-S", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert str(target / "project/econoserve/patches/__init__.py") in done.stdout, done.stderr
    assert "econoserve.runtime.plugin:register" in done.stdout


def test_the_plan_is_shown_without_fetching(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare.closure, "find_closure", lambda: {"numpy": {"x"}, "sglang": {"x"}})
    monkeypatch.setattr(prepare.wheels, "resolve", lambda *_: pytest.fail("asked the registry"))
    assert prepare.main(["--dry-run", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "sglang" in printed
    assert "FlashAttention 3" in printed
    assert json.loads((tmp_path / "closure.json").read_text()) == {"numpy": ["x"], "sglang": ["x"]}


def test_a_wheel_that_cannot_be_had_is_an_error_that_names_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare.closure, "find_closure", lambda: {"sglang": {"x"}})

    def nothing(wanted, target):
        raise prepare.wheels.NotAvailable("ERROR: No matching distribution found for sglang")

    monkeypatch.setattr(prepare.wheels, "resolve", nothing)
    assert prepare.main(["--out", str(tmp_path)]) == 1
    assert "No matching distribution found for sglang" in capsys.readouterr().err


def test_decisions_are_plain_values():
    rows = as_rows(_decided(["new"], {}).values())
    assert json.loads(json.dumps(rows))[0]["verdict"] == "travels"


def test_a_rehearsal_links_what_travels_without_what_is_left_out(tmp_path):
    assert rehearsal.link("tabulate", ["tabulate*/version.py", "*/LICENSE*"], tmp_path) > 0
    assert list(tmp_path.glob("tabulate*"))
    assert not list(tmp_path.rglob("version.py"))
    assert not list(tmp_path.rglob("LICENSE*"))
    assert all(path.is_symlink() for path in tmp_path.rglob("*.py"))
    assert rehearsal.link("not-installed-anywhere", [], tmp_path) == 0


def test_a_rehearsal_that_fails_stops_before_anything_is_fetched(tmp_path, monkeypatch, capsys):
    def missing(*_):
        raise rehearsal.Missing("ModuleNotFoundError: No module named 'dill'")

    monkeypatch.setattr(prepare.closure, "find_closure", lambda: {"sglang": {"x"}})
    monkeypatch.setattr(prepare.rehearsal, "rehearse", missing)
    monkeypatch.setattr(prepare.wheels, "resolve", lambda *_: pytest.fail("asked the registry"))
    assert prepare.main(["--rehearse", "--out", str(tmp_path)]) == 1
    assert "No module named 'dill'" in capsys.readouterr().err
