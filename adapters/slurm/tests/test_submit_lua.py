"""The job_submit.lua snippet in a real slurmctld, against a client whose plug-in was replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from wnodes_slurm import install
from wnodes_slurm.lab import Lab
from wnodes_slurm.testing import make_user

from wnodes_core import command

pytestmark = pytest.mark.slurm
FORGED = """
#include <slurm/spank.h>
SPANK_PLUGIN(forged, 1);
int slurm_spank_init_post_opt(spank_t sp, int ac, char **av)
{ return spank_remote(sp) ? 0 : spank_job_control_setenv(sp, "%s", "%s", 1); }
"""


REFUSED = {
    ("VM_IMAGE", "../etc"): b"wnodes: --vm-image '../etc': want NAME",
    ("VM_START", "hot"): b"wnodes: --vm-start 'hot': want auto, warm or cold",
    ("VM_IMAGE", "debian12"): b"",
    ("VM_START", "warm"): b"",
}


@pytest.mark.parametrize("sent", REFUSED, ids="-".join)
def test_controller_refuses_what_a_forged_client_sends(public_folder: Path, sent: tuple[str, str]) -> None:
    user, library = make_user(), public_folder / "forged.so"
    (public_folder / "forged.c").write_text(FORGED % sent)
    command.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(public_folder / "forged.c")])
    lab = Lab(
        public_folder / "lab",
        prefix=f"l{os.getpid()}x",
        extra=["JobSubmitPlugins=lua"],
        plugstack=[f"required {library}"],
    )
    try:
        lab.write()
        (lab.folder / "job_submit.lua").write_text((install.HERE / "hooks" / "job_submit.lua").read_text())
        lab.start()
        done = lab.run_as(user, ["sbatch", "--output=/dev/null", "--wrap=true"], check=False)
        assert (done.exit_code == 0) == (not REFUSED[sent]), done
        assert REFUSED[sent] in done.stderr
    finally:
        lab.down()
