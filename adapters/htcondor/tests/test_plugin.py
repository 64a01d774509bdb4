"""The plug-in on captured texts of both releases, on forged and malformed ones, and under fire of hypothesis."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wnodes_htcondor import advertise, condorconf, native, plugin, task

from wnodes_core.api import Job, NativeCall, Owner, Phase, Process, errors
from wnodes_core.model import VmRequest

CAPTURED = Path(__file__).parent / "captured"
RELEASES = pytest.mark.parametrize("release", ["23", "25"])
SANDBOX = "/var/lib/condor/execute/dir_1"


def captured(name):
    return (CAPTURED / name).read_text()


def runtime(verb, *command, image="wnodes:debian12"):
    """argv as the starter composes it (captured from 23.9.6)."""
    options = ["-S", "/tmp", "-S", "/var/tmp", "-W", SANDBOX, "--pwd", SANDBOX, "-B", SANDBOX, "--home", SANDBOX]
    return ("/runtime", "-s", verb, *options, "--contain", "--ipc", "--cleanenv", image, *command)


def environ(tmp_path, text):
    (tmp_path / ".job.ad").write_bytes(text if isinstance(text, bytes) else text.encode())
    return {"_CONDOR_JOB_AD": str(tmp_path / ".job.ad"), "SINGULARITYENV_A": "1", "A": "1"}


def job(node="slot1_1", job_id="1.0"):
    return Job("htcondor", job_id, node, os.getuid(), os.getgid(), "root")


@RELEASES
def test_captured_ads(release):
    ad = native.parse_ad(captured(f"job-ad-{release}.txt"))
    request = native.request_from(ad)
    assert native.job_id(ad) == "1.0" and ad["odd"] == 'quote " back \\ slash'
    assert (request.image, request.cpus, str(request.mounts[0])) == ("debian12:latest", 1, "/data:/data:ro")
    told = plugin.wnodes_lrms_facts_parse(job(), captured(f"who-{release}.txt"))
    assert (told.cpus, told.memory_mib, told.account) == (1, 128, "g.a")


@RELEASES
def test_a_job_that_the_startd_denies_is_refused(release):
    text = captured(f"who-{release}.txt")
    with pytest.raises(errors.RequestError, match=r"slot slot1_1 runs job '1.0', and not '7.0'"):
        plugin.wnodes_lrms_facts_parse(job(job_id="7.0"), text)
    for missing in (text.replace("slot1_1@", "slot1_9@"), "", text + "\n" + text):
        with pytest.raises(errors.TransientError, match="shows no job in slot"):
            plugin.wnodes_lrms_facts_parse(job(), missing)


def test_the_runtimes_calls(tmp_path):
    ad = environ(tmp_path, 'vm_image = "el9"\nvm = "cpus=2"\nNumShadowStarts = 3\n')
    request, claimed = plugin.wnodes_lrms_read(NativeCall(Phase.PREPARE, runtime("test"), ad))
    assert (request.image, request.cpus, claimed) == ("el9", 2, None)
    found = task.read_task(runtime("exec", f"{SANDBOX}/job", "a b", "wnodes:x", "-S"), ad)
    assert found.argv == (f"{SANDBOX}/job", "a b", "wnodes:x", "-S")
    assert found.environ == {"A": "1", "HOME": SANDBOX, "PATH": task.GUEST_PATH}
    assert VmRequest.parse(found.request) == VmRequest("el9", cpus=2)
    assert task.read_task(("/enter", "--", "/bin/sh", "-c", "x"), {"TERM": "vt"})[0] == ("/bin/sh", "-c", "x")
    for wrong in (("/runtime",), runtime("exec"), ("/runtime", "exec")):
        with pytest.raises(errors.BadRequest, match="want exec OPTIONS IMAGE COMMAND"):
            task.read_task(wrong, ad)
    with pytest.raises(errors.BadRequest, match="asks for no VM"):
        task.read_task(runtime("exec", "/job"), environ(tmp_path, "ProcId = 0\n"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('vm_image = 3\n', "want text in double quotes"),
        ('vm_image = "a b"\n', "image 'a b'"),
        ('vm = "cpu=2"\n', "did you mean cpus"),
        ('vm_image = "a"\nVM = "image=b"\n', "two images"),
        ('vm_image = "a"\nVM_Image = "b"\n', "twice"),
        ("vm_image\n", "want NAME = EXPRESSION"),
        ('= "x"\n', "want NAME = EXPRESSION"),
        (b'vm_image = "\xff\xfe"\n', "image"),
        ("x = " + "9" * (1 << 21) + '\nvm_image = "-"\n', "asks for no VM|want NAME|no VM"),
    ],
)  # fmt: skip
def test_malformed_ads_are_bad_requests(tmp_path, text, says):
    with pytest.raises(errors.BadRequest, match=says):
        task.read_task(runtime("exec", "/job"), environ(tmp_path, text))


def test_a_missing_ad_is_a_bad_request(tmp_path):
    with pytest.raises(errors.BadRequest, match="No such file"):
        task.job_ad({"_CONDOR_SCRATCH_DIR": str(tmp_path)})


def test_what_is_told_of_a_run_that_came_to_nothing(tmp_path):
    ad = {**environ(tmp_path, "NumShadowStarts = 2\n"), "WNODES_CHIRP": "/chirp"}
    held = task.refusal(errors.UnknownImage("image 'x\"\n'", hint="y"), ad)
    assert held == (
        ("/chirp", "set_job_attr_delayed", "ChirpWnodesRun", "2"),
        ("/chirp", "set_job_attr_delayed", "ChirpWnodesHold", '"wnodes: image \'x\\" \' hint: y"'),
        ("/chirp", "set_job_attr_delayed", "ChirpWnodesCode", "101"),
    )
    busy = errors.HostBusy("full")
    busy.again = True
    assert [words[2] for words in task.refusal(busy, ad)] == ["ChirpWnodesRun", "ChirpWnodesAgain", "ChirpWnodesHold"]
    ad = {**environ(tmp_path, 'NumShadowStarts = 3\nChirpWnodesAgain = "wnodes: full"\n'), "WNODES_CHIRP": "/chirp"}
    assert task.refusal(busy, ad)[-1][-2:] == ("ChirpWnodesCode", "104")
    assert task.refusal(busy, {}) == ()  # without condor_chirp the exit code must do


KINDS = {
    errors.BadFormat: "102",
    errors.SettingsError: "103",
    errors.BrokenPlugin: "103",
    errors.FailedAgain: "104",
    errors.NoKvm: "105",
    errors.WnodesError: "106",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_its_sub_code(kind):
    told = {words[2]: words[3] for words in task.refusal(kind("x"), {"WNODES_CHIRP": "/c"})}
    assert told["ChirpWnodesCode"] == KINDS[kind]


def test_replies():
    busy = errors.HostBusy("full")
    # A failing test call would send the job round unbounded.
    assert plugin.wnodes_lrms_reply(NativeCall(Phase.PREPARE), busy).exit_code == 0
    assert plugin.wnodes_lrms_reply(NativeCall(Phase.LAUNCH), busy).exit_code == 125
    assert plugin.wnodes_lrms_live_query("slot1_1")[0] == "condor_who"
    assert plugin.wnodes_lrms_live_parse("3.0\n\n4.1\n") == {"3.0", "4.1"}
    assert plugin.wnodes_lrms_facts_query(job()) == ("condor_who", "-long") and not plugin.wnodes_lrms_advertise(
        "n", {}
    )


def test_what_the_node_says_of_itself(tmp_path, capsys):
    me = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    file = tmp_path / "capacity"
    nothing = 'HasWnodes = false\nWnodesAccel = ""\nWnodesFreeVMs = 0\nWnodesImages = {}\nWnodesWarm = {}\n'
    nothing += "- update:true\n"
    rest = "accel tcg\nslots 2\nimage el9\n"
    for head in ("", "wnodesd 1 1\n", f"wnodesd {os.getpid()} 1\n", f"wnodesd {os.getpid()} {me}\nslots 2\n", "\xff"):
        file.write_text(head + (rest if "slots" not in head else ""))
        assert advertise.main(str(tmp_path)) == 0
        assert "HasWnodes = false" in (said := capsys.readouterr().out) and ("slots" in head or said == nothing)
    file.write_text(f"wnodesd {os.getpid()} {me}\n{rest}")
    advertise.main(str(tmp_path))
    assert 'HasWnodes = true\nWnodesAccel = "tcg"\nWnodesFreeVMs = 2\nWnodesImages = {"el9"}' in capsys.readouterr().out
    file.unlink()
    advertise.main(str(tmp_path))
    assert capsys.readouterr().out == nothing


def test_only_a_starter_of_roots_makes_an_owner(tmp_path):
    """A program of the name condor_starter proves nothing, and neither does what it says of itself."""
    fake = tmp_path / "condor_starter"
    fake.write_bytes(b"")
    me = Process(os.getpid(), os.getppid(), 1000, 1, str(fake), ("condor_starter", "-f", "-a", "slot1_1", "host"))
    gone = Process(1 << 22, 1, 0, 1, "/usr/sbin/condor_starter", ("condor_starter", "-a", "slot1_1", "x"))
    other = Process(os.getpid(), 1, 0, 1, "/usr/bin/python3", ("condor_starter", "-a", "slot1_1", "x"))
    assert plugin.wnodes_lrms_owner([gone]) is None and plugin.wnodes_lrms_owner([other]) is None
    assert plugin.wnodes_lrms_owner([]) is None
    with pytest.raises(errors.RequestError, match="want a running job and an account"):
        plugin.wnodes_lrms_claim(Owner("1.0", "exec", gone, True, "slot1_1"), 1, 1)
    if os.getuid() == 0:  # root runs this test: its own folder holds no ad, which is refused and not believed
        with pytest.raises(errors.RequestError, match="the job's ad cannot be read"):
            plugin.wnodes_lrms_owner([me])


@pytest.mark.parametrize(
    "words", [(), ("-a",), ("-a", "../x"), ("-a", "a b"), ("-a", ""), ("-a", "x" * 65), ("-f", "slot1")]
)
def test_a_strange_slot_is_none(words):
    assert native.slot_of(("condor_starter", *words)) == ""


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_is_parsed_or_a_bad_request(text):
    try:
        ad = native.parse_ad(text)
    except errors.BadRequest:
        return
    assert all(
        isinstance(value, str | int | float | bool | None) and name == name.lower() for name, value in ad.items()
    )


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["C"])))
def test_a_quoted_text_comes_back(text):
    known, value = native.literal(native.quoted(text, limit=10**6))
    assert known and value == " ".join(text.split())


WORDS = st.sampled_from(["-s", "exec", "test", "-S", "-B", "--pwd", "-C", "wnodes:x", "/x"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(WORDS, st.text()), max_size=12))
def test_any_argv_is_a_call(words):
    call = native.runtime_call(words)
    assert call.image in ("", *words) and (not call.command or words[-len(call.command) :] == list(call.command))
    if call.image.startswith(native.PREFIX):
        assert call.verb and not call.verb.startswith("-")


ITEMS = ["image=a", "cpus=2", "memory=1G", "scratch=3G", "network=n", "mount=/a:/b:ro", "mount=/a\\,b"]
ITEMS += ["start=warm", "trace=yes", "cpu=1", "x"]
KEYS = st.sampled_from([*ITEMS, ""])


@settings(max_examples=300, deadline=None)
@given(st.lists(KEYS, max_size=5).map(",".join))
def test_the_schedd_refuses_nothing_that_the_grammar_allows(text):
    """Its pattern may let more through, which the node refuses; never less."""
    import re

    try:
        VmRequest.parse(text)
    except errors.BadRequest:
        return
    assert re.search(condorconf.VM_PATTERN, text)


GOOD = ["el9", "el9:2026.1", "a.b-c_d", "x@sha256:" + "0" * 64, "x:y@sha256:" + "f" * 64]
BAD = ["é", "-x", "a b", "a:", "a@sha256:0", "", "a" * 64]


@pytest.mark.parametrize("image", [*GOOD, *BAD])
def test_the_schedds_pattern_for_images_is_ours(image):
    import re

    from wnodes_core.model import ImageRef

    try:
        ImageRef.parse(image)
        fits = True
    except errors.BadRequest:
        fits = False
    assert bool(re.search(condorconf.IMAGE_PATTERN, image)) is fits
