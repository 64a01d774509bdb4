"""The settings: what is read, what is refused and where, what is printed again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wnodes_core import settings
from wnodes_core.errors import SettingsError
from wnodes_core.settings import Rule, Settings, show, values
from wnodes_core.settings.schema import PoolRule, WarmSettings


@pytest.fixture
def write(tmp_path: Path):
    """Write wnodes.yaml (or a fragment) into a folder of its own and return its path."""

    def put(text: str | bytes, name: str = "wnodes.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return put


def load(path: Path) -> Settings:
    return settings.load(path, environ={})


def test_no_file_gives_the_defaults_without_yaml(tmp_path: Path) -> None:
    code = f"""if True:
        import sys
        from wnodes_core.settings import Settings, load
        print(load(trusted=True, site_folder={str(tmp_path)!r}) == Settings(), "yaml" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


def test_a_file_in_full(write) -> None:
    found = load(
        write(
            """
state_dir: /srv//wnodes/
accel: tcg
images: {fetch_timeout_s: 30m, purge: {max_age_days: 2w, low_percent: 50%}}
policy:
  - users: [ann, no, 1e3]
    default_image: el9:2026.10
    max_memory_mib: 8G
vm: {console_kib: 1M}
daemon: {metrics: "127.0.0.1:9000", log_level: debug}
plugins: {disabled: [wnodes_core.images.sources]}
lrms: {slurm: {enforce: yes, tries: 3, name: 010x}}
"""
        )
    )
    assert found == Settings(
        state_dir="/srv/wnodes",
        accel="tcg",
        images=settings.ImageSettings(
            fetch_timeout_s=1800, purge=settings.PurgeSettings(max_age_days=14, low_percent=50)
        ),
        policy=(Rule(users=("ann", "no", "1e3"), default_image="el9:2026.10", max_memory_mib=8192),),
        vm=settings.VmSettings(console_kib=1024),
        daemon=settings.DaemonSettings(metrics="127.0.0.1:9000", log_level="debug"),
        plugins=settings.PluginSettings(disabled=("wnodes_core.images.sources",)),
        lrms={"slurm": {"enforce": True, "tries": 3, "name": "010x"}},
    )
    assert found.images.folder == "/srv/wnodes/images"
    assert found.daemon.socket == "/run/wnodes/wnodesd.sock"


def test_derived_values_follow_a_replaced_folder() -> None:
    moved = replace(Settings(), state_dir="/a", run_dir="/b")
    assert (moved.images.folder, moved.daemon.socket, moved.daemon.metrics) == (
        "/a/images",
        "/b/wnodesd.sock",
        "unix:/b/metrics.sock",
    )
    own = replace(Settings(images=settings.ImageSettings(folder="/own")), state_dir="/a")
    assert own.images.folder == "/own"


def test_fragments_override_scalars_and_append_rules(write) -> None:
    main = write("accel: kvm\nvm: {boot_timeout_s: 10}\npolicy: [{users: [a]}]\nplugins: {disabled: [x]}\n")
    write("vm: {boot_timeout_s: 20}\npolicy: [{users: [c]}]\n", "conf.d/20.yaml")
    write("vm: {boot_timeout_s: 30}\npolicy: [{users: [b]}]\nplugins: {disabled: [y]}\n", "conf.d/10.yaml")
    write("nonsense", "conf.d/.hidden.yaml")
    write("nonsense", "conf.d/notes.txt")
    found = load(main)
    assert (found.accel, found.vm.boot_timeout_s, found.plugins.disabled) == ("kvm", 20, ("y",))
    assert [rule.users for rule in found.policy] == [("a",), ("b",), ("c",)]
    assert [Path(source).name for source in found.sources] == ["wnodes.yaml", "10.yaml", "20.yaml"]
    assert found.origins["vm.boot_timeout_s"].endswith("conf.d/20.yaml:1")
    assert found.origins["policy[1].users"].endswith("conf.d/10.yaml:2")


@pytest.mark.parametrize("text", ["", "# nothing\n", "vm:\n", "---\n", "lrms: {slurm: }\n"])
def test_empty_files_and_sections_are_fine(write, text: str) -> None:
    assert load(write(text)).vm == settings.VmSettings()


BAD = {
    "stat_dir: /x": (1, 1, "unknown key 'stat_dir'", "did you mean state_dir?"),
    "vm:\n  console: 1": (2, 3, "unknown key 'console' in vm", "did you mean console_kib?"),
    "policy:\n - users: [a]\n   imags: [b]": (3, 4, "unknown key 'imags' in policy[0]", "did you mean images?"),
    "zzz: 1": (1, 1, "unknown key 'zzz'", "known here: state_dir, run_dir"),
    "accel: vmx": (1, 8, "accel: 'vmx': want auto, kvm or tcg", ""),
    "state_dir: var": (1, 12, "state_dir: 'var': want an absolute path", ""),
    "state_dir: /a/../b": (1, 12, "without '..'", ""),
    "state_dir:": (1, 11, "state_dir: want a value, not an empty one", ""),
    'state_dir: ""': (1, 12, "state_dir: want a value, not an empty one", ""),
    "state_dir: [a]": (1, 12, "state_dir: want a value, not a list", ""),
    "vm: 3": (1, 5, "vm: want a mapping, not the value '3'", ""),
    "vm: {boot_timeout_s: 0}": (1, 22, "want at least 1s", ""),
    "vm: {boot_timeout_s: 1.5}": (1, 22, "want a duration", ""),
    "vm: {boot_timeout_s: -1}": (1, 22, "want a duration", ""),
    "vm: {min_memory_mib: lots}": (1, 22, "want a size as in 8G", ""),
    "images: {purge: {max_age_days: 90s}}": (1, 32, "in whole d", ""),
    "images: {purge: {high_percent: 101}}": (1, 32, "percentage", ""),
    "images: {purge: {high_percent: 10, low_percent: 20}}": (1, 17, "low_percent 20 exceeds high_percent 10", ""),
    "policy: {users: [a]}": (1, 9, "policy: want a list, not a mapping", ""),
    "policy: [{users: ann}]": (1, 18, "policy[0].users: want a list, not the value 'ann'", "[VALUE, VALUE]"),
    "policy: [{mounts: ['a:b']}]": (1, 20, "source must be an absolute path", ""),
    "policy: [{allow_mounts: ['~/../x']}]": (1, 26, "without '..'", ""),
    "policy: [x]": (1, 10, "policy[0]: want a mapping, not the value 'x'", ""),
    "daemon: {metrics: '0.0.0.0:80'}": (1, 19, "want unix:/PATH or 127.0.0.1:PORT", ""),
    "daemon: {metrics: '127.0.0.1:99999'}": (1, 19, "want unix:/PATH or 127.0.0.1:PORT", ""),
    f"daemon: {{socket: /{'x' * 107}}}": (1, 18, "at most 107 bytes", ""),
    "lrms: {slurm: 3}": (1, 15, "lrms.slurm: want a mapping", ""),
    "lrms: {slurm: {a: 1, a: 2}}": (1, 22, "key 'a' is given twice, first in line 1", ""),
    "accel: kvm\naccel: tcg": (2, 1, "key 'accel' is given twice, first in line 1", ""),
    "- a": (1, 1, "want a mapping of KEY: VALUE lines, not a list", ""),
    "word": (1, 1, "want a mapping of KEY: VALUE lines, not the value 'word'", ""),
    "vm:\n\tboot_timeout_s: 3": (2, 1, "not YAML", "blanks, not with tabs"),
    "vm: [": (2, 1, "not YAML", ""),
    "a: 1\n---\nb: 2": (2, 1, "not YAML", ""),
    "accel: !!python/object:os.system x": (1, 8, "tag", ""),
    "vm: &a {}\ndaemon: *a": (2, 9, "aliases (*a) are not allowed", ""),
    "a: " + "[" * 40 + "]" * 40: (1, 33, "nested deeper than 32", ""),
    "a: " + "[" * 100_000: (1, 0, "nest", ""),  # which limit is met first is libyaml's affair, too
    "? [a]\n: b": (1, 3, "want a word as key, not a list", ""),
}


@pytest.mark.parametrize("text", BAD, ids=[text[:40] for text in BAD])
def test_a_mistake_names_its_place(write, text: str) -> None:
    line, column, wanted, hint = BAD[text]
    path = write(text)
    with pytest.raises(SettingsError) as caught:
        load(path)
    place = caught.value.message.removeprefix(str(path))
    if wanted in ("not YAML", "nest"):  # the column of a syntax error is libyaml's affair
        assert place.startswith(f":{line}:")
    else:
        assert place.startswith(f":{line}:{column}: ")
    assert wanted in place
    assert hint in caught.value.hint


def test_bytes_that_are_no_text(write) -> None:
    for data, wanted in ((b"a: 1\nb: \xff", ":2:1: byte 0xff is not UTF-8"), (b"a: \x01", "not YAML")):
        with pytest.raises(SettingsError, match=re.escape(wanted)):
            load(write(data))


def test_a_file_too_large(write) -> None:
    with pytest.raises(SettingsError, match="want at most 256 KiB"):
        load(write("# " + "x" * (257 << 10)))


def test_no_file_where_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        load(tmp_path / "wnodes.yaml")


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "wnodes.yaml")
    with pytest.raises(SettingsError, match="want a regular file"):
        load(tmp_path / "wnodes.yaml")


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o602])
def test_root_refuses_what_others_may_write(write, mode: int) -> None:
    path = write("accel: tcg")
    path.chmod(mode)
    with pytest.raises(SettingsError, match="only root may write it"):
        settings.load(path, trusted=True)


def test_root_refuses_what_others_own(write, mocker) -> None:
    path = write("accel: tcg")
    mine = path.stat()
    other = os.stat_result([*mine[:4], 1000, *mine[5:]])
    mocker.patch("wnodes_core.settings.source.os.fstat", return_value=other)
    mocker.patch("wnodes_core.settings.source.check_folder")
    with pytest.raises(SettingsError, match="owned by uid 1000"):
        settings.load(path, trusted=True)


def test_root_refuses_a_folder_others_may_write(write) -> None:
    path = write("accel: tcg")
    write("accel: kvm", "conf.d/1.yaml").parent.chmod(0o777)
    with pytest.raises(SettingsError, match=r"conf\.d: .*only root may write here"):
        settings.load(path, trusted=True)


def test_the_environment_counts_only_for_commands_by_hand(write, tmp_path: Path) -> None:
    environ = {"WNODES_CONFIG": str(write("accel: kvm"))}
    empty = tmp_path / "none"
    assert settings.load(environ=environ, site_folder=empty).accel == "kvm"
    assert settings.load(environ=environ, site_folder=empty, trusted=True).accel == "auto"


def test_an_ordinary_user_has_own_folders_and_the_sites_policy(write, tmp_path: Path, mocker) -> None:
    mocker.patch("wnodes_core.settings.load.os.geteuid", return_value=1234)
    write("state_dir: /srv/w\nrun_dir: /run/w\nimages: {folder: /srv/i, fetch_timeout_s: 5}\npolicy: [{users: [a]}]\n")
    write("accel: tcg\npolicy: [{users: [b]}]\n", "config/wnodes/wnodes.yaml".replace("config/wnodes", "home"))
    config = tmp_path / "config"
    (config / "wnodes").mkdir(parents=True)
    (tmp_path / "home" / "wnodes.yaml").rename(config / "wnodes" / "wnodes.yaml")
    environ = {"HOME": "/home/u", "XDG_CONFIG_HOME": str(config)}
    found = settings.load(environ=environ, site_folder=tmp_path)
    assert (found.state_dir, found.images.folder) == ("/var/tmp/wnodes-1234", "/home/u/.cache/wnodes/images")
    assert (found.run_dir, found.images.fetch_timeout_s, found.accel) == ("/run/w", 5, "tcg")
    assert [rule.users for rule in found.policy] == [("a",), ("b",)]
    # A hook that runs as the user sees the site's words and nothing else.
    assert settings.load(trusted=True, environ=environ, site_folder=tmp_path).state_dir == "/srv/w"


def test_xdg_cache_must_be_absolute() -> None:
    found = settings.defaults_for_user({"HOME": "/h", "XDG_CACHE_HOME": "/c"})
    assert found.images.folder == "/c/wnodes/images"
    assert settings.defaults_for_user({"HOME": "/h", "XDG_CACHE_HOME": "c"}).images.folder == "/h/.cache/wnodes/images"


words = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12)
rules = st.builds(
    Rule,
    users=st.lists(words, max_size=3).map(tuple),
    images=st.none() | st.lists(words, max_size=2).map(tuple),
    default_image=words | st.just(""),
    max_cpus=st.integers(0, 999),
    max_memory_mib=st.integers(0, 1 << 20),
)


@given(
    policy=st.lists(rules, max_size=3).map(tuple),
    accel=st.sampled_from(["auto", "kvm", "tcg"]),
    days=st.integers(0, 99),
)
def test_dump_loads_to_the_same(tmp_path_factory, policy, accel: str, days: int) -> None:
    wanted = Settings(
        accel=accel,
        policy=policy,
        images=settings.ImageSettings(purge=settings.PurgeSettings(max_age_days=days)),
        warm=WarmSettings(pool=(PoolRule(image="el9", count=days + 1), PoolRule())),
    )
    path = tmp_path_factory.mktemp("dump") / "wnodes.yaml"
    path.write_text(show.dump(wanted))
    assert load(path) == wanted


def test_every_value_has_an_origin(write) -> None:
    path = write("vm:\n  console_kib: 2\npolicy:\n  - max_cpus: 3\nwarm: {pool: [{image: el9}, {count: 2}]}\n")
    rows = {row.key: (row.value, row.origin) for row in show.rows(load(path))}
    assert rows["vm.console_kib"] == (2, f"{path}:2")
    assert rows["policy[0].max_cpus"] == (3, f"{path}:4")
    assert rows["warm.pool[0].image"] == ("el9", f"{path}:5")
    assert rows["warm.pool[1].count"] == (2, f"{path}:5")
    assert rows["images.folder"] == ("/var/lib/wnodes/images", "default")
    assert len(rows) >= 30


def test_the_sample_file_says_the_defaults(write) -> None:
    sample = show.example()
    uncommented = "\n".join(
        line[1:] if re.match(r"#[a-z ]*(- )?[a-z_]+:", line) else line for line in sample.splitlines()
    )
    found = load(write(uncommented))
    told = replace(found, policy=(), lrms={}, daemon=Settings().daemon, warm=replace(found.warm, pool=()))
    assert replace(told, network=Settings().network) == Settings()
    assert found.warm.pool == (PoolRule(image="debian12"),)
    assert found.policy[0].max_memory_mib == 65536
    keys = {row.key.rpartition(".")[2] for row in show.rows(found)}
    assert all(f"{key}:" in sample for key in keys if key != "lrms")


@pytest.mark.parametrize(
    "convert, text, value",
    [
        (values.size("m"), "8G", 8192),
        (values.size("m"), "8 GiB", 8192),
        (values.size("m"), "1k", 1),
        (values.size("m"), "512", 512),
        (values.size("k"), "1M", 1024),
        (values.duration("s"), "2h", 7200),
        (values.duration("d"), "1w", 7),
        (values.percent, "90 %", 90),
        (values.folder, "/a//./b/", "/a/b"),
        (values.metrics_address, "unix:/run/x//m", "unix:/run/x/m"),
        (values.metrics_address, "[::1]:9100", "[::1]:9100"),
        (values.yes_no, "Off", False),
    ],
)
def test_words_become_values(convert, text: str, value: object) -> None:
    assert convert(text) == value


def test_every_field_has_words_of_help() -> None:
    lines = show.reference().splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) >= 40
    assert all(len(row.split("|")[3].strip()) > 10 for row in rows)
